"""Benchmarks: `just bench NAME... [--json]`. What is compared is measured in turns within one run."""

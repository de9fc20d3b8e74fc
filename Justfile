export PATH := justfile_directory() / ".tools/bin:" + env("PATH")
export UV_PYTHON := "/usr/bin/python3"
export UV_PYTHON_DOWNLOADS := "never"
export UV_NATIVE_TLS := "1"
export UV_SYSTEM_CERTS := "1"
# Programs and tests start sooner when no first import has to compile.
export UV_COMPILE_BYTECODE := "1"

python := ".venv/bin/python"
images := "/var/lib/sandboxd/images"
released_protos := "tests/protos/0.1.0"

# List the recipes
default:
    @just --list

# Install the Python environment of uv.lock
setup:
    uv sync --frozen --quiet

# Generate the package sandboxd from proto/
proto: setup
    {{ python }} hatch_build.py

# Build an image (minimal, default) unless its inputs are unchanged
image name="minimal": setup
    {{ python }} -m rootfs build {{ name }} >&2

# Create a microVM over gRPC, run `ls -lh /` in it, and delete it
demo: proto image
    {{ python }} -m tests.tools.demo

# Run the daemon in the foreground
run *ARGS: proto image
    .venv/bin/sandboxd {{ ARGS }}

# Check style, formatting, layers of imports, dependencies, protos and changelog fragments
lint: proto proto-lint
    .venv/bin/ruff check .
    .venv/bin/ruff format --check --quiet .
    .venv/bin/lint-imports
    .venv/bin/deptry agent guest rootfs systemd
    .venv/bin/deptry tests --ignore DEP002,DEP004
    .venv/bin/towncrier build --draft --version next >/dev/null

# Check the protos' style, and that clients of the last release still work
proto-lint: setup
    .venv/bin/buf lint
    .venv/bin/buf breaking --against {{ released_protos }}

# Check types with mypy
type: proto
    .venv/bin/mypy

# Run the tests that need neither root nor VMs
unit *ARGS: proto
    {{ python }} -m pytest -m "not vm" {{ ARGS }}

# Run all checks and all tests, including those with VMs
test *ARGS: lint type image (image "default")
    {{ python }} -m pytest {{ if ARGS == "" { "tests/integration tests/unit" } else { ARGS } }}
    {{ if ARGS == "" { python + " -m pytest tests/sdk" } else { "true" } }}

# Run all checks except the VM tests
check: lint type unit

# Run benchmarks: just bench boot egress exec stream files sdk recover [--json] [--compare REV]
bench *ARGS: proto image
    @{{ python }} -m tests.tools.bench {{ ARGS }}

# Run random operations with restarts of the agent: just churn --minutes 30
churn *ARGS: proto image
    @{{ python }} -m tests.tools.churn {{ ARGS }}

# Run the fault tests, and write docs/reliability.md from their results
reliability: proto image (image "default")
    rm -f .reliability.jsonl
    SANDBOXD_RELIABILITY=.reliability.jsonl {{ python }} -m pytest -m fault tests/integration
    SANDBOXD_RELIABILITY=.reliability.jsonl {{ python }} -m pytest -m fault tests/sdk
    {{ python }} -m tests.tools.reliability .reliability.jsonl
    rm .reliability.jsonl

# Measure the phases of a create, and draw them
waterfall: proto image
    @uv run --frozen --group plot python -m tests.tools.bench boot --plot docs/create-waterfall.png

# Check what sandboxd needs on this host, and show what it would use
doctor: proto
    .venv/bin/sandboxctl doctor

# Remove the files of setup, proto and the tools (images are kept)
clean:
    rm -rf .venv sandboxd build dist .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# Install git's hooks (lint and type before a commit, unit before a push) and run those of a commit now
hooks: setup
    .venv/bin/prek install
    .venv/bin/prek run --all-files

# Measure the coverage of the tests that need no root and no VM, branches included
cover *ARGS: proto
    {{ python }} -m pytest -m "not vm" --cov --cov-report=term:skip-covered {{ ARGS }} tests/unit

# Show the changelog of the next version; with a version, write it to CHANGELOG.md and delete the fragments
changelog version="": setup
    @.venv/bin/towncrier build {{ if version == "" { "--draft --version next" } else { "--yes --version " + version } }}

# Build the Debian package into a directory
deb directory="dist": proto
    {{ python }} systemd/build_deb.py {{ directory }}

"""Standard output: JSON of messages, tables on a terminal."""

from __future__ import annotations

import json
import os

from agent.cli import output
from sandboxd.v1 import process_pb2, sandbox_pb2

ID = "sbx-0123456789abcdef"


def test_a_table_on_a_terminal_fits_80_columns_and_keeps_its_ids() -> None:
    from rich.console import Console

    headers = ("ID", "STATE", "IMAGE", "CPU", "MEMORY", "AGE", "EXPIRES", "LABELS")
    rows = [(ID, "running", "default", "32", "16.5GiB", "47h", "100m", "a=" + "x" * 300)]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(output.rich_table(headers, rows, fixed=2))
    console.file.close()
    lines = console.export_text().splitlines()
    assert len(lines) == 2
    assert max(len(line) for line in lines) <= 80
    assert lines[1].startswith(f"{ID}  running")


def test_json_of_a_message() -> None:
    sandbox = sandbox_pb2.Sandbox(id=ID, state=sandbox_pb2.Sandbox.STATE_RUNNING, memory_bytes=1 << 40)
    sandbox.labels["a"] = "b"
    sandbox.create_time.FromJsonString("2026-01-01T00:00:00Z")
    sandbox.lifetime.lease.FromMilliseconds(1500)
    sandbox.phases.add(name="boot").duration.FromMilliseconds(2500)
    shown = json.loads(json.dumps(output.to_json(sandbox)))
    assert shown["state"] == "running"
    assert shown["memory_bytes"] == 1 << 40
    assert shown["labels"] == {"a": "b"}
    assert shown["create_time"] == "2026-01-01T00:00:00Z"
    assert shown["expire_time"] is None
    assert shown["lifetime"] == {"lease": 1.5, "idle_timeout": None}
    assert shown["phases"] == [{"name": "boot", "duration": 2.5}]


def test_json_of_bytes_oneofs_and_optionals() -> None:
    assert output.to_json(process_pb2.ExecResponse(stdout=b"\xff")) == {"stdout": "/w=="}
    assert output.to_json(process_pb2.Exit(signal="SIGKILL", signal_number=9))["exit_code"] is None
    assert output.to_json(process_pb2.Exit(exit_code=0))["exit_code"] == 0

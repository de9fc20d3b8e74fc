"""Who did what, to which sandbox, and what came of it: the audit log, and events on the command line."""

from __future__ import annotations

import asyncio
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import grpc
import pytest

from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.client import Client
from tests.support.ctl import Ctl
from tests.support.daemon import Daemon, refused, until
from tests.tools.reliability import Reliability

pytestmark = pytest.mark.vm

VALUE = "sk-this-must-be-in-no-log-0123456789"


def lines(daemon: Daemon) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in daemon.log.splitlines() if '"event": "audit"' in line]
    return [line for line in found if line["event"] == "audit"]


async def test_each_call_has_a_line_and_no_secret_is_in_any(
    client: Client, daemon: Daemon, reliability: Reliability
) -> None:
    before = len(lines(daemon))
    secret = pb.Secret(value=VALUE, hosts=["api.example"])
    async with client.sandbox(secrets={"KEY": secret}, env={"PLAIN": "of-the-environment"}) as made:
        await client.run(made.id, "sh", "-c", "true")
        with refused(grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND"):
            await client.sandboxes.GetSandbox(pb.GetSandboxRequest(id="sbx-0000000000000000"))
        update = pb.UpdateSandboxRequest(id=made.id)
        update.set_secrets["KEY"].CopyFrom(secret)
        await client.sandboxes.UpdateSandbox(update)

    async def all_there() -> bool:
        return len(lines(daemon)) >= before + 5

    await until(all_there)
    told = [(line["rpc"], line["target"], line["code"]) for line in lines(daemon)[before:]]
    assert told == [
        ("CreateSandbox", made.id, "OK"), ("Exec", made.id, "OK"),
        ("GetSandbox", "sbx-0000000000000000", "NOT_FOUND"), ("UpdateSandbox", made.id, "OK"),
        ("DeleteSandbox", made.id, "OK"),
    ]  # fmt: skip
    assert {line["who"] for line in lines(daemon)[before:]} == {f"uid=0,pid={os.getpid()}"}
    kept = [path for path in (daemon.directory).rglob("*") if path.is_file() and path.suffix != ".img"]
    holding = [path for path in kept if VALUE.encode() in path.read_bytes()]
    assert holding == []
    reliability.seen(
        "somebody reads logs, state and files of the agent",
        "each call is in the audit log; the value of no secret is anywhere",
        f"5 calls, 5 lines; {len(kept)} files searched, logs at level debug among them",
    )


async def test_a_report_has_what_is_needed_and_nothing_that_somebody_wrote(
    client: Client, daemon: Daemon, tmp_path: Path
) -> None:
    ctl, path = Ctl(daemon.env), tmp_path / "report.tar.gz"
    secret = pb.Secret(value=VALUE, hosts=["api.example"])
    words = {"env": {"PLAIN": "of-the-environment"}, "labels": {"label": "of-a-label"}, "secrets": {"KEY": secret}}
    async with client.sandbox(**words) as made:
        assert (await asyncio.to_thread(ctl, "report", "-o", str(path))).decode().strip() == str(path)
    with tarfile.open(path) as archive:
        parts = {entry.name: archive.extractfile(entry).read().decode() for entry in archive}  # type: ignore[union-attr]
    assert made.id in parts["sandboxd-report/daemon/sandboxes.json"]
    assert {"accelerator", "memory_bytes"} <= json.loads(parts["sandboxd-report/daemon/node.json"]).keys()
    assert "uid_base" in parts["sandboxd-report/settings.json"]
    for text in (VALUE, "of-the-environment", "of-a-label", "api.example", "KEY"):
        assert [name for name, part in parts.items() if text in part and "/host/" not in name] == []
    assert path.stat().st_mode & 0o777 == 0o600
    broken = Ctl(daemon.env | {"SANDBOXD_ADDRESS": "unix:/nowhere"})
    other = tmp_path / "other.tar.gz"
    await asyncio.to_thread(broken, "report", "-o", str(other))
    with tarfile.open(other) as archive:
        assert "sandboxd-report/daemon.error" in archive.getnames()


async def test_events_are_printed_as_they_come(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    ctl = Ctl(daemon.env)
    async with client.sandbox(labels={"audit": "yes"}) as made:
        assert made.id in (await asyncio.to_thread(ctl, "events", "--label", "audit")).decode()
        printed = tmp_path / "printed"
        with printed.open("wb") as file:
            following = await asyncio.create_subprocess_exec(
                *ctl.argv("events", "-f", made.id), env=daemon.env, stdout=file
            )

            async def begun() -> bool:
                return made.id in printed.read_text()

            await until(begun)
            await client.sandboxes.PauseSandbox(pb.PauseSandboxRequest(id=made.id))
            await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=made.id))

            async def over() -> bool:
                return " deleted deleted requested" in printed.read_text()

            await until(over)
            following.terminate()
            await following.wait()
    told = [line.split(maxsplit=2)[2] for line in printed.read_text().splitlines()]
    assert told == ["snapshot running", "updated paused", "updated deleting requested", "deleted deleted requested"]

"""Retries: how often, for how long, and what ends them."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from structlog.testing import capture_logs

from agent.common.errors import GuestUnreachable, HostError, VmmError
from agent.daemon.host import cgroup
from agent.daemon.host.cgroup import Cgroups
from agent.daemon.sandbox.machine import guest_setup
from agent.daemon.vmm.driver import Vm
from agent.daemon.vmm.qemu import vsock_backend
from agent.gateway.sandboxes import lease
from agent.gateway.sandboxes.session import Session

Code = grpc.StatusCode


# -- dialling ----------------------------------------------------------------------------------------------------------


class DialledVm:
    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.times: list[float] = []

    async def dial(self) -> str:
        self.times.append(asyncio.get_running_loop().time())
        if self.failures:
            raise self.failures.pop(0)
        return "stream"


class OpenedChannel:
    @staticmethod
    async def open(stream: str, *, fresh: bool) -> tuple[str, bool]:
        return stream, fresh


async def test_a_guest_is_dialled_at_growing_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_setup, "Channel", OpenedChannel)
    vm = DialledVm(*[GuestUnreachable("no"), VmmError("no")] * 4)
    assert await guest_setup._dial(cast("Vm", vm), fresh=True) == cast("Any", ("stream", True))
    pauses = [later - earlier for earlier, later in zip(vm.times, vm.times[1:], strict=False)]
    assert len(pauses) == 8
    for pause, least in zip(pauses, (0.002, 0.004, 0.008, 0.016, 0.032, 0.05, 0.05, 0.05), strict=True):
        assert pause >= least


async def test_another_error_ends_dialling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_setup, "Channel", OpenedChannel)
    vm = DialledVm(GuestUnreachable("no"), HostError("out of descriptors"))
    with pytest.raises(HostError, match="out of descriptors"):
        await guest_setup._dial(cast("Vm", vm), fresh=True)
    assert len(vm.times) == 2


# -- control groups ----------------------------------------------------------------------------------------------------


def busy(monkeypatch: pytest.MonkeyPatch, times: int, number: int = errno.EBUSY) -> None:
    """Have the kernel refuse the removal of a group so often."""
    left = [OSError(number, "refused")] * times
    remove = Path.rmdir

    def rmdir(path: Path) -> None:
        if left:
            raise left.pop()
        remove(path)

    monkeypatch.setattr(Path, "rmdir", rmdir)


def test_what_is_in_a_group_is_ended_until_it_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "sbx-1"
    group.mkdir()
    killed: list[Path] = []
    monkeypatch.setattr(Path, "write_text", lambda path, text: killed.append(path))
    busy(monkeypatch, 3)
    Cgroups(tmp_path).remove("sbx-1")
    assert not group.exists()
    assert killed == [group / "cgroup.kill"] * 3
    Cgroups(tmp_path).remove("sbx-1")  # absence is success


def test_a_group_that_stays_busy_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_KILL_TIMEOUT_S", 0.05)
    (tmp_path / "sbx-1").mkdir()
    busy(monkeypatch, 10_000)
    with pytest.raises(HostError, match=r"cannot remove .*sbx-1: refused"):
        Cgroups(tmp_path).remove("sbx-1")


def test_a_group_that_must_not_be_removed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbx-1").mkdir()
    busy(monkeypatch, 1, errno.EPERM)
    with pytest.raises(HostError, match="cannot remove"):
        Cgroups(tmp_path).remove("sbx-1")
    assert (tmp_path / "sbx-1").exists()


# -- vhost-device-vsock ------------------------------------------------------------------------------------------------


def backend(directory: Path, script: str) -> str:
    path = directory / "backend"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def test_the_vsock_backend_is_waited_for(tmp_path: Path) -> None:
    binary = backend(tmp_path, f"sleep 0.1; touch {tmp_path}/vhost.sock; exec sleep 60")
    process = await vsock_backend.start(binary, tmp_path, 3)
    assert (tmp_path / "vhost.sock").exists()
    await process.kill()


async def test_a_vsock_backend_that_ends(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match=r"vhost-device-vsock .*7.*: no such device"):
        await vsock_backend.start(backend(tmp_path, "echo no such device >&2; exit 7"), tmp_path, 3)


async def test_a_vsock_backend_that_never_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_backend, "_START_TIMEOUT_S", 0.1)
    with pytest.raises(VmmError, match=r"did not start within 0\.1 s"):
        await vsock_backend.start(backend(tmp_path, "exec sleep 60"), tmp_path, 3)


# -- leases of the gateway's sessions ----------------------------------------------------------------------------------


class LeaseApi:
    """KeepAlive streams that end with one code or exception after another, None: never; and DeleteSandbox."""

    def __init__(self, *ends: grpc.StatusCode | Exception | None) -> None:
        self.ends = list(ends)
        self.renewals = self.cancelled = 0
        self.deleted: list[str] = []
        self.sandbox_id, self.node, self.api, self.sandboxes = "sbx-1", self, self, self

    def KeepAlive(self) -> LeaseApi:  # noqa: N802  as the API calls it
        self.end = self.ends.pop(0)
        return self

    async def write(self, request: Any) -> None:
        self.renewals += 1

    async def read(self) -> None:
        if isinstance(self.end, Exception):
            raise self.end
        if self.end is not None:
            raise grpc.aio.AioRpcError(self.end, grpc.aio.Metadata(), grpc.aio.Metadata(), None, None)

    def cancel(self) -> None:
        self.cancelled += 1

    async def DeleteSandbox(self, request: Any) -> None:  # noqa: N802
        self.deleted.append(request.id)


async def keep_alive(api: LeaseApi, max_lifetime_s: int) -> None:
    await lease.keep_alive(cast("Session", api), max_lifetime_s)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RETRY_S", 0.001)
    monkeypatch.setattr(lease, "_RENEW_S", 0.001)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("last", [Code.FAILED_PRECONDITION, Code.NOT_FOUND])
async def test_a_lease_is_renewed_over_restarts_of_the_node(last: grpc.StatusCode) -> None:
    api = LeaseApi(Code.UNAVAILABLE, Code.CANCELLED, Code.INTERNAL, last)
    await keep_alive(api, 0)
    assert (api.ends, api.renewals, api.cancelled, api.deleted) == ([], 4, 4, [])


@pytest.mark.usefixtures("quick")
async def test_a_lease_is_renewed_after_an_unexpected_failure() -> None:
    # grpc raises InvalidStateError for a write to a stream that the node has ended without an error.
    with capture_logs() as logs:
        api = LeaseApi(asyncio.InvalidStateError("RPC already finished"), TimeoutError(), ValueError(), Code.NOT_FOUND)
        await keep_alive(api, 0)
    assert (api.ends, api.renewals, api.cancelled, api.deleted) == ([], 4, 4, [])
    assert [(entry["event"], entry["sandbox_id"]) for entry in logs] == [("cannot renew lease", "sbx-1")] * 3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("end", [None, Code.UNAVAILABLE])
async def test_a_session_ends_with_the_lifetime_of_its_token(end: grpc.StatusCode | None) -> None:
    api = LeaseApi(*[end] * 10_000)
    await keep_alive(api, cast("int", 0.1))
    assert api.deleted == ["sbx-1"]
    assert api.renewals >= 1
    assert api.cancelled == 10_000 - len(api.ends)


@pytest.mark.usefixtures("quick")
async def test_a_session_that_is_left_deletes_nothing_here() -> None:
    api = LeaseApi(None)
    task = asyncio.create_task(keep_alive(api, 60))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (api.cancelled, api.deleted) == (1, [])

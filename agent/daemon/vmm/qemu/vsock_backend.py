"""vhost-device-vsock: AF_VSOCK for QEMU where the host's kernel has no vhost-vsock.

The backend cannot be snapshotted, and it hangs for good if a client on the host connects before the guest's driver is
up (rust-vmm/vhost-device). So virtio-serial is the default link; this backend is for tests, and for hosts that
configure vmm.link = "vsock".
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from agent.common.errors import VmmError
from agent.daemon.host.process import HostProcess, spawn

_BINARY = "vhost-device-vsock"
_START_TIMEOUT_S = 5.0
# Larger packets span several descriptors, on which 6.12 guests stall every connection.
_TX_BUFFER_BYTES = 32768


def find_binary(tools_dir: Path) -> str:
    """Return the path of the backend's binary.

    :raises VmmError: it is not installed (VSOCK_BACKEND_MISSING).
    """
    found = shutil.which(_BINARY) or shutil.which(_BINARY, path=str(tools_dir))
    if found is None:
        raise VmmError(
            f"{_BINARY} is neither in PATH nor in {tools_dir}: run `./bootstrap.sh setup`, or set vmm.link to serial",
            reason="VSOCK_BACKEND_MISSING",
        )
    return found


async def start(binary: str, run_dir: Path, cid: int, cgroup: Path | None = None) -> HostProcess:
    """Start a backend that listens at `run_dir/vhost.sock` for QEMU and at `run_dir/vsock.sock` for the agent.

    :raises VmmError: it did not start; no process is left.
    """
    sockets = [run_dir / "vhost.sock", run_dir / "vsock.sock"]
    for path in sockets:
        path.unlink(missing_ok=True)
    argv = [
        binary, "--guest-cid", str(cid), "--socket", str(sockets[0]), "--uds-path", str(sockets[1]),
        "--tx-buffer-size", str(_TX_BUFFER_BYTES),
    ]  # fmt: skip
    process = await spawn(argv, netns=None, stderr_path=run_dir / "vsock.log", cgroup=cgroup)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not all(path.exists() for path in sockets[:1]):
                if not process.alive:
                    exit_info = await process.wait()
                    raise VmmError(f"{_BINARY} {exit_info.describe()}: {exit_info.stderr_tail}")
                await asyncio.sleep(0.005)
        await process.joined_cgroup()
    except BaseException as error:
        await asyncio.shield(asyncio.ensure_future(process.kill()))
        if isinstance(error, TimeoutError):
            raise VmmError(f"{_BINARY} did not start within {_START_TIMEOUT_S:g} s") from error
        raise
    return process

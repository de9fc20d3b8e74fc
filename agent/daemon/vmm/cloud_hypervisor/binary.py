"""Find the cloud-hypervisor binary and check its version."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

from agent.common.errors import VmmError
from agent.daemon.host.capture import stdout_of

NAME = "cloud-hypervisor"
# Snapshot format and API depend on the version; the driver follows the source of v53.0.
MAJOR_VERSION = 53
_TIMEOUT_S = 10.0


async def find(configured: str, tools_dir: Path) -> tuple[str, str]:
    """Return (path, version) of the binary: the configured one, the one in `tools_dir`, or the one in PATH.

    :raises VmmError: it is not installed or cannot be run (VMM_MISSING), or is not v53 (VMM_UNSUPPORTED).
    """
    binary = configured or shutil.which(NAME, path=str(tools_dir)) or shutil.which(NAME) or ""
    if not binary:
        raise VmmError(
            f"{NAME} is neither in PATH nor in {tools_dir}: install v{MAJOR_VERSION}.0 (`sandboxctl vmm install`), "
            "or set vmm.binary",
            reason="VMM_MISSING",
        )
    try:
        output = await _version_text(binary)
    except (VmmError, OSError) as error:  # a TimeoutError is an OSError
        raise VmmError(f"{binary} cannot be run: {error}; check vmm.binary", reason="VMM_MISSING") from error
    match = re.search(rb"cloud-hypervisor v?(\d+(?:\.\d+)+)", output)
    if match is None:
        raise VmmError(f"{binary} does not say which version of Cloud Hypervisor it is", reason="VMM_UNSUPPORTED")
    version = match[1].decode()
    require_version(version, binary)
    return binary, version


def require_version(version: str, what: str) -> None:
    """Check the major version.

    :param what: the binary, for the message.
    :raises VmmError: the driver does not support `version` (VMM_UNSUPPORTED).
    """
    if version.partition(".")[0] != str(MAJOR_VERSION):
        raise VmmError(
            f"{what} is Cloud Hypervisor {version[:40]!r}; this release of sandboxd drives v{MAJOR_VERSION} only",
            reason="VMM_UNSUPPORTED",
        )


async def _version_text(binary: str) -> bytes:
    async with stdout_of([binary, "--version"]) as output, asyncio.timeout(_TIMEOUT_S):
        return await output.read(4096)
    raise AssertionError("unreachable: nothing above suppresses exceptions")

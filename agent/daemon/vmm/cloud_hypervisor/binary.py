"""Which cloud-hypervisor program is used, and what its version must be."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

from agent.common.errors import VmmError
from agent.daemon.host.capture import stdout_of

NAME = "cloud-hypervisor"
# Snapshots, their edits and the API are version-bound: what the driver knows was read in v53.0's source.
MAJOR_VERSION = 53
_TIMEOUT_S = 10.0


async def find(configured: str, tools_dir: Path) -> tuple[str, str]:
    """Returns (path, version) of the program: the configured one, the one in `tools_dir`, or that in PATH.

    :raises VmmError: there is none, it cannot be run, or it is not v53.
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
    """:raises VmmError: `version` is not one that the driver knows."""
    if version.partition(".")[0] != str(MAJOR_VERSION):
        raise VmmError(
            f"{what} is Cloud Hypervisor {version[:40]!r}; this release of sandboxd drives v{MAJOR_VERSION} only",
            reason="VMM_UNSUPPORTED",
        )


async def _version_text(binary: str) -> bytes:
    async with stdout_of([binary, "--version"]) as output, asyncio.timeout(_TIMEOUT_S):
        return await output.read(4096)
    raise AssertionError("unreachable: nothing above suppresses exceptions")

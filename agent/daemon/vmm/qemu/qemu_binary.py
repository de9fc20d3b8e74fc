"""Find the QEMU binary and check its version."""

from __future__ import annotations

import asyncio
import re
import shutil

from agent.common.errors import VmmError
from agent.daemon.host.capture import stdout_of

_BINARY = "qemu-system-x86_64"
_MIN_VERSION = (8, 2)  # migration to a file, which templates need
_VERSION_TIMEOUT_S = 10.0


async def find_qemu(configured: str) -> tuple[str, str]:
    """Return (path, version) of QEMU: the configured binary, or else the one in PATH.

    :raises VmmError: QEMU is not installed or cannot be run (VMM_MISSING), or is too old (VMM_UNSUPPORTED).
    """
    binary = configured or shutil.which(_BINARY) or ""
    if not binary:
        raise VmmError(
            f"{_BINARY} is not installed: run `./bootstrap.sh setup`, or set vmm.binary", reason="VMM_MISSING"
        )
    try:
        output = await _version_text(binary)
    except (VmmError, OSError) as error:  # a TimeoutError is an OSError
        raise VmmError(f"{binary} cannot be run: {error}; check vmm.binary", reason="VMM_MISSING") from error
    match = re.search(rb"version (\d+)\.(\d+)\.(\d+)", output)
    if match is None:
        raise VmmError(f"{binary} does not say which version of QEMU it is", reason="VMM_UNSUPPORTED")
    major, minor, patch = (int(number) for number in match.groups())
    if (major, minor) < _MIN_VERSION:
        needed = ".".join(str(number) for number in _MIN_VERSION)
        raise VmmError(
            f"{binary} is QEMU {major}.{minor}; {needed} or newer is needed: run `./bootstrap.sh setup`",
            reason="VMM_UNSUPPORTED",
        )
    return binary, f"{major}.{minor}.{patch}"


async def _version_text(binary: str) -> bytes:
    async with stdout_of([binary, "--version"], stderr=2) as output, asyncio.timeout(_VERSION_TIMEOUT_S):
        return await output.read()
    raise AssertionError("unreachable: nothing above suppresses exceptions")

"""Choose KVM or emulation (TCG) by a trial boot.

A /dev/kvm that opens proves nothing: nested and partial implementations crash in the middle of a stock kernel. So the
kernel of an image is booted under KVM once, until it runs its first program; the result is cached for this boot of the
host.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent.common import stored_json
from agent.common.atomic_file import write_atomically
from agent.common.errors import VmmError
from agent.daemon.host.capture import stdout_of

_KVM = "/dev/kvm"
_DEADLINE_S = 10.0
_MARKER = b"Run /init as init process"
_CMDLINE = "console=ttyS0 loglevel=7 panic=-1 random.trust_cpu=on 8250.nr_uarts=1"


Trial = Callable[[str, Path, Path, str], list[str]]  # (binary, kernel, initramfs, cmdline) -> argv


def qemu_trial(binary: str, kernel: Path, initramfs: Path, cmdline: str) -> list[str]:
    """Return the command line that boots a kernel in QEMU under KVM with its console on stdout."""
    return [
        binary, "-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-M", "q35", "-accel", "kvm",
        "-cpu", "host", "-m", "256M", "-kernel", str(kernel), "-initrd", str(initramfs),
        "-append", cmdline, "-serial", "stdio",
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a trial has found, as it is kept."""

    accelerator: Literal["kvm", "tcg"]
    reason: str


class AcceleratorProbe:
    """Chooses the accelerator; caches results of trial boots in `cache_dir`.

    :param kernel: kernel to boot; None, as without an image: no trial, hence "tcg".
    :param trial: command line of the trial boot. Results are cached by `version`, which must name the VMM, too, for any
        but QEMU.
    """

    def __init__(self, cache_dir: Path, kernel: Path | None, initramfs: Path | None, trial: Trial = qemu_trial) -> None:
        self._cache_dir = cache_dir
        self._kernel = kernel
        self._initramfs = initramfs
        self._trial = trial

    async def choose(self, wanted: str, binary: str, version: str) -> tuple[str, str]:
        """Return ("kvm" or "tcg", reason).

        :param wanted: "kvm", "tcg", or "auto" for a trial boot.
        :raises VmmError: `wanted` is "kvm", and /dev/kvm cannot be opened (KVM_MISSING).
        """
        openable = os.access(_KVM, os.R_OK | os.W_OK)
        if wanted == "kvm":
            if not openable:
                raise VmmError(f"vmm.accelerator is kvm, but {_KVM} cannot be opened", reason="KVM_MISSING")
            return "kvm", "vmm.accelerator is kvm"
        if wanted == "tcg":
            return "tcg", "vmm.accelerator is tcg"
        if not openable:
            return "tcg", f"{_KVM} is missing or cannot be opened by this user"
        if self._kernel is None or self._initramfs is None or not self._kernel.exists():
            return "tcg", f"{_KVM} opens, but there is no image yet to try it with"
        return await self._tried(binary, version)

    async def _tried(self, binary: str, version: str) -> tuple[str, str]:
        cache = self._cache_dir / f"kvm-{self._key(version)}.json"
        with contextlib.suppress(OSError, ValueError):
            verdict = stored_json.decode(cache.read_bytes(), _Verdict)
            return verdict.accelerator, verdict.reason
        if await self._boots(binary):
            verdict = _Verdict("kvm", "a guest kernel boots on this host's KVM")
        else:
            reason = "opens, but a guest kernel does not reach its first program on it"
            verdict = _Verdict("tcg", f"{_KVM} {reason} (tried for up to {_DEADLINE_S:g} s)")
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, stored_json.encode(verdict).encode(), mode=0o600, durable=False)
        return verdict.accelerator, verdict.reason

    def _key(self, version: str) -> str:
        assert self._kernel is not None
        facts = self._kernel.stat()
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        text = f"{version} {facts.st_size} {facts.st_mtime_ns} {boot_id}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    async def _boots(self, binary: str) -> bool:
        assert self._kernel is not None
        assert self._initramfs is not None
        argv = self._trial(binary, self._kernel, self._initramfs, _CMDLINE)
        seen = b""
        async with stdout_of(argv) as output:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DEADLINE_S):
                    while data := await output.read(4096):
                        seen = seen[-256:] + data
                        if _MARKER in seen:
                            return True
        return False

"""A Debian machine of a test's own: a clean root file system with systemd as PID 1, in namespaces (systemd-nspawn(1)).

It has its own network, which leads nowhere, its own cgroups, and an overlay over a root that is made once and kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.daemon.host import cgroup
from rootfs.apt import Apt, find_mirror
from tests.support import leaks

CACHE = Path("/var/cache/sandboxd/test-roots")
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "python3", "e2fsprogs", "libnftables1", "util-linux", "ca-certificates",
    "passwd",
)  # fmt: skip
QEMU = "qemu-system-x86"
BOOT_S = 60.0
_REBOOTS = 133  # what nspawn ends with if the machine is to boot again


def _release() -> str:
    return str(re.findall(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)[0])


def clean_root() -> Path:
    """Returns a root file system of this host's release with systemd and what the package needs; made once."""
    release, mirror = _release(), find_mirror(None)
    sources = mirror.sources(release)
    chosen = [QEMU]
    if release == "bookworm":  # whose own QEMU is too old
        sources.append(f"deb [signed-by={mirror.keyring}] {mirror.archive} bookworm-backports main")
        chosen = ["-t", "bookworm-backports", QEMU]
    digest = hashlib.sha256(json.dumps([release, PACKAGES, chosen]).encode()).hexdigest()[:12]
    root = CACHE / f"{release}-{digest}"
    if root.exists():
        return root
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        settings = [f"--aptopt={line.rstrip(';')}" for line in Apt(Path(scratch, "apt"), mirror, release).settings]
        words = " ".join(chosen)
        argv = [
            "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}", *settings,
            '--aptopt=APT::Install-Recommends "false"',
            f'--customize-hook=chroot "$1" apt-get install --quiet --yes {words}', release, f"{scratch}/root", *sources,
        ]  # fmt: skip
        subprocess.run(argv, check=True, capture_output=True, text=True)
        Path(scratch, "root").rename(root)
    return root


@dataclass
class Machine:
    """A machine that has booted."""

    supervisor: subprocess.Popen[bytes]
    console: Path

    def __call__(self, *argv: str, timeout_s: float = 60, check: bool = True) -> str:
        """Runs a command in it as root; returns what it printed. :raises subprocess.CalledProcessError:"""
        enter = ["nsenter", f"--target={self._init()}", "--all", "--root", "--wdns=/", "--", *argv]
        done = subprocess.run(
            enter,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={"PATH": os.defpath + ":/usr/sbin:/sbin"},
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{argv} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + ("" if check else done.stderr)

    def _init(self) -> int:
        with contextlib.suppress(psutil.NoSuchProcess):  # its supervisor has ended
            for process in psutil.Process(self.supervisor.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    parent = process.parent()
                    is_container = parent is not None and parent.name().startswith("systemd-nspawn")
                    if process.name() == "systemd" and is_container:
                        return int(process.pid)
        raise AssertionError("the machine has no PID 1")

    def path(self, inside: str) -> Path:
        """Returns where the host finds a file of the machine, those of its mounts included."""
        return Path(f"/proc/{self._init()}/root{inside}")

    def until(self, condition: Callable[[], bool], timeout_s: float = BOOT_S) -> None:
        """Waits for something. :raises AssertionError: it did not come."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(AssertionError, OSError, subprocess.TimeoutExpired):
                if condition():
                    return
            assert self.supervisor.poll() is None, f"the machine has ended: {self.console.read_text(errors='replace')}"
            assert time.monotonic() < deadline, self.journal()
            time.sleep(0.1)

    def end(self) -> None:
        """Ends all of it at once."""
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(self._init(), signal.SIGKILL)  # and with it all that is in its PID namespace
        try:
            self.supervisor.wait(BOOT_S)
        finally:
            self.supervisor.kill()
            self.supervisor.wait()

    def reboot(self) -> None:
        """Shuts it down in order and boots it again."""
        before = self._init()
        self("systemctl", "reboot", check=False)
        self.until(lambda: self._init() != before and self.booted())

    def booted(self) -> bool:
        """Whether all services are up."""
        return self("systemctl", "is-system-running", check=False).strip() == "running"

    def active(self, unit: str) -> bool:
        """Whether a unit is up."""
        return self("systemctl", "is-active", unit, check=False).strip() == "active"

    def property(self, unit: str, name: str) -> str:
        """Returns a property of a unit."""
        return self("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def journal(self) -> str:
        """Returns the end of the journal of sandboxd's units."""
        return self("journalctl", "--no-pager", "--lines=80", "--output=cat", "--unit=sandbox*", check=False)

    def files(self) -> set[str]:
        """Returns all files of it but those of kernel and services that come and go."""
        found = self("find", "/", "-xdev", "-not", "-path", "/proc/*", "-not", "-path", "/sys/*")
        return set(found.splitlines())


@contextmanager
def machine(*binds: str) -> Iterator[Machine]:
    """Boots a machine with these directories of the host in it ("from:to"), and ends it."""
    place = leaks.make_directory()
    root = place / "root"
    for folder in ("root", "upper", "work"):
        (place / folder).mkdir()
    layers = f"lowerdir={clean_root()},upperdir={place / 'upper'},workdir={place / 'work'}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, root], check=True)
    name = place.name.replace("_", "0")  # which a temporary directory's name may have, and a host's may not
    argv = [
        "systemd-nspawn", "--quiet", "--boot", "--register=no", "--private-network", "--capability=all",
        "--console=pipe", "--bind=/dev/net/tun", f"--machine={name}", f"--directory={root}",
        *(f"--bind-ro={bind}" for bind in binds),
    ]  # fmt: skip
    if not Path("/run/systemd/system").exists():
        argv.append("--keep-unit")  # nobody is there to give it a unit of its own
    settings = {
        "SYSTEMD_SECCOMP": "0", "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    }  # fmt: skip

    try:
        with _group(f"{leaks.CGROUP}-test-{place.name}") as grouped, (place / "console").open("wb") as console:
            made = Machine(
                subprocess.Popen(
                    [*grouped, *argv], stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                    env={**os.environ, **settings},
                ),
                place / "console",
            )  # fmt: skip
            try:
                made.until(made.booted)
                yield made
            finally:
                made.end()
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)
        shutil.rmtree(place)


@contextmanager
def _group(name: str) -> Iterator[list[str]]:
    """Yields the words before a call of nspawn that put it into a cgroup of its own, in which it makes more."""
    places = {cgroup.hierarchy(), Path("/sys/fs/cgroup/systemd")}
    groups = [place / name for place in places if place is not None and (place / "cgroup.procs").exists()]
    for group in groups:
        group.mkdir()
    move = "; ".join(f"echo $$ > {group}/cgroup.procs" for group in groups)
    try:
        yield ["sh", "-c", f'{move}; while "$@"; [ $? -eq {_REBOOTS} ]; do :; done', "sh"]
    finally:
        deadline = time.monotonic() + BOOT_S
        while any(group.exists() for group in groups):  # its processes end a moment after their PID 1
            for group in groups:
                for directory, _, _ in os.walk(group, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(directory)
            assert time.monotonic() < deadline, groups
            time.sleep(0.01)

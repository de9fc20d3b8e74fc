"""Run other programs, with a fixed environment and errors that say what to do."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rootfs.errors import BuildError

# Program -> Debian package, for error messages.
PACKAGES = {
    "apt-get": "apt",
    "apt-config": "apt",
    "dpkg-deb": "dpkg",
    "lz4": "lz4",
    "mkfs.erofs": "erofs-utils",
    "mmdebstrap": "mmdebstrap",
    "setpriv": "util-linux",
    "tar": "tar",
    "unshare": "util-linux",
    "zstd": "zstd",
}
# Killed with the builder, even by SIGKILL, and its mounts are in a namespace: nothing is left to clean up.
_ISOLATED = ("setpriv", "--pdeathsig", "KILL", "--",
             "unshare", "--mount", "--pid", "--fork", "--kill-child", "--")  # fmt: skip
_TAIL_LINES = 20


def require(*programs: str) -> None:
    """Check that programs are installed.

    :raises BuildError: one is not; the message names the Debian packages to install.
    """
    missing = sorted({PACKAGES.get(name, name) for name in programs if shutil.which(name, path=_path()) is None})
    if missing:
        raise BuildError(f"the builder needs more Debian packages: apt-get install {' '.join(missing)}")


def run(argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a program; return its standard output.

    :param env: added to a small, fixed environment: results do not depend on the caller's locale or umask.
    :raises BuildError: the program cannot be started, or its status is not 0; the message has its last output.
    """
    require(str(argv[0]))
    done = subprocess.run(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        cwd=cwd,
        env={**_environment(), **(env or {})},
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(_describe(argv, done))
    return done.stdout


def run_isolated(argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> str:
    """Run a program as `run` does, in new mount and PID namespaces: no mount or process outlives it.

    :raises BuildError: as `run`.
    """
    require("setpriv", "unshare", str(argv[0]))
    return run([*_ISOLATED, *argv], env=env)


def _environment() -> dict[str, str]:
    """Return the fixed environment, with the caller's settings of proxies, the npm registry and TMPDIR."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.lower() in {"http_proxy", "https_proxy", "no_proxy", "tmpdir", "npm_config_registry"}
    }
    return {**kept, "PATH": _path(), "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root"}


def _path() -> str:
    return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _describe(argv: Sequence[str | Path], done: subprocess.CompletedProcess[str]) -> str:
    output = done.stderr.strip() or done.stdout.strip()
    tail = "\n".join(f"    {line}" for line in output.splitlines()[-_TAIL_LINES:])
    hint = ""
    if "No space left on device" in output:
        hint = "The disk is full: free space, or choose other disks with --images-dir and --cache-dir.\n"
    elif "Temporary failure resolving" in output or "Could not connect" in output:
        hint = "The package mirror cannot be reached: check the network and /etc/apt, or give another with --mirror.\n"
    return f"{hint}command failed with status {done.returncode}: {shlex.join(map(str, argv))}\n{tail}"

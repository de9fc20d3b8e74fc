"""The recipes of images, called flavours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SUITE = "trixie"

_NO_DOCUMENTATION = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/doc-base/*",
    "path-exclude=/usr/share/bug/*",
    "path-exclude=/usr/share/groff/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/man/*",
)
_NO_CHARACTER_SETS = (
    "path-exclude=/usr/lib/x86_64-linux-gnu/gconv/*",
    "path-include=/usr/lib/x86_64-linux-gnu/gconv/gconv-modules*",
)

# All files of the image get one time stamp, and Python ignores a .pyc file whose source has another time stamp than it
# records. So they are compiled again, in the mode that does not check the source. Measured under emulation: a guest's
# imports take 0.3 s with .pyc files, 1.4 s without.
COMPILE = "-m compileall -q -f --invalidation-mode unchecked-hash"
_PYTHON = 'chroot "$1" env -i PYTHONHASHSEED=0 /usr/bin/python3 -S'
_COMPILE_LIBRARY = f"{_PYTHON} {COMPILE} /usr/lib/python3.13 /usr/lib/python3 /etc/python3.13"

# Lets `pip install` work without a virtual environment: a sandbox's system belongs to its user and is temporary.
_FREE_PIP = r"""printf '[global]\nbreak-system-packages = true\n' >"$1/etc/pip.conf" """

_TOOLS = ("bash", "ca-certificates", "coreutils", "curl", "iproute2", "mount", "python3", "sudo")


@dataclass(frozen=True, slots=True)
class NpmTool:
    """A program published as an npm package; `integrity` is the registry's digest of that version."""

    package: str
    version: str
    integrity: str
    member: str  # the program's path in the package
    install: str  # its path in the image


@dataclass(frozen=True, slots=True)
class Flavour:
    """A recipe: Debian packages (installed without recommended ones), options and hooks."""

    name: str
    packages: tuple[str, ...]
    min_memory_bytes: int
    dpkg_options: tuple[str, ...] = _NO_DOCUMENTATION
    hooks: tuple[str, ...] = (_COMPILE_LIBRARY,)  # sh commands run at the end of the package step; $1 is the tree
    npm_tools: tuple[NpmTool, ...] = ()


_DENO = NpmTool(
    package="@deno/linux-x64-glibc",
    version="2.9.6",
    integrity="sha512-3md4TKLCuzsLDmfOoC5KN7NAZaxSVkMgm64vg6foD00JBADCpYS2/5QqXfzgnP5ZQz3iLP9vBQJtEgc116OAoQ==",
    member="package/deno",
    install="usr/local/bin/deno",
)

FLAVOURS: Mapping[str, Flavour] = {
    flavour.name: flavour
    for flavour in (
        Flavour(
            name="minimal",
            packages=_TOOLS,
            min_memory_bytes=128 << 20,
            dpkg_options=_NO_DOCUMENTATION + _NO_CHARACTER_SETS,
        ),
        Flavour(
            name="default",
            packages=(
                *_TOOLS,
                "apt",
                "build-essential",
                "bzip2",
                "debian-archive-keyring",
                "file",
                "git",
                "jq",
                "less",
                "nano",
                "nodejs",
                "npm",
                "openssh-client",
                "openssh-sftp-server",
                "patch",
                "pipx",
                "procps",
                "python3-dev",
                "python3-pip",
                "python3-venv",
                "ripgrep",
                "rsync",
                "unzip",
                "wget",
                "xz-utils",
                "zip",
            ),
            min_memory_bytes=192 << 20,
            hooks=(_COMPILE_LIBRARY, _FREE_PIP),
            npm_tools=(_DENO,),
        ),
    )
}

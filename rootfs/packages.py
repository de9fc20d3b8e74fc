"""Package step of a build: install Debian packages into a tree, kept as a tarball until one of them changes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rootfs import digest
from rootfs.apt import Apt, parse_fields
from rootfs.command import run_isolated
from rootfs.errors import BuildError
from rootfs.flavours import SUITE, Flavour
from rootfs.progress import say, step
from rootfs.store import DRAFT_PREFIX

# SOURCE_DATE_EPOCH for package scripts. The image's time stamps are set when its file system is made.
_EPOCH = "1754697600"


def base_tarball(flavour: Flavour, versions: Mapping[str, str], apt: Apt, tool_version: str, cache: Path) -> Path:
    """Return the tarball of the installed packages from `cache`, or make it.

    :param versions: name -> version of all packages, as the mirror has them now.
    :raises BuildError: packages cannot be downloaded or installed.
    """
    key = digest.of_value(
        {
            "recipe": dataclasses.asdict(dataclasses.replace(flavour, npm_tools=(), min_memory_bytes=0)),
            "versions": dict(versions),
            "mmdebstrap": tool_version,
            "code": digest.of_file(Path(__file__)),
        }
    )
    final = cache / f"{flavour.name}-{key[:16]}.tar"
    if final.exists():
        say(f"packages of {flavour.name}: {len(versions)}, unchanged")
        return final
    with (
        step(f"packages of {flavour.name}: downloading and installing {len(versions)}"),
        tempfile.TemporaryDirectory(prefix=DRAFT_PREFIX, dir=cache) as folder,
    ):
        draft = Path(folder) / "base.tar"
        run_isolated(_mmdebstrap(flavour, apt, draft), env={"SOURCE_DATE_EPOCH": _EPOCH, "TMPDIR": folder})
        draft.replace(final)
    _remove_older(final, flavour.name)
    return final


def check_installed(tree: Path, versions: Mapping[str, str]) -> dict[str, str]:
    """Return name -> version of the packages in a tree.

    :raises BuildError: they differ from `versions`, since the mirror has changed during the build.
    """
    installed = parse_status((tree / "var/lib/dpkg/status").read_text())
    if installed != dict(versions):
        differing = sorted({name for name, _ in installed.items() ^ versions.items()})
        raise BuildError(f"the mirror changed during the build ({', '.join(differing[:5])}): build again")
    return installed


def parse_status(text: str) -> dict[str, str]:
    """Return name -> version of the installed packages in dpkg's status file."""
    installed: dict[str, str] = {}
    for paragraph in text.split("\n\n"):
        fields = parse_fields(paragraph)
        if fields.get("Status") == "install ok installed":
            installed[fields["Package"]] = fields["Version"]
    return installed


def _mmdebstrap(flavour: Flavour, apt: Apt, tarball: Path) -> list[str | Path]:
    settings = ['APT::Install-Recommends "false";', *apt.settings]
    return [
        "mmdebstrap",
        "--mode=root",
        "--variant=essential",
        "--architectures=amd64",
        f"--include={','.join(flavour.packages)}",
        *(f"--aptopt={setting}" for setting in settings),
        *(f"--dpkgopt={option}" for option in flavour.dpkg_options),
        *(f"--customize-hook={hook}" for hook in flavour.hooks),
        SUITE,
        tarball,
        *apt.sources,
    ]


def _remove_older(kept: Path, name: str) -> None:
    """Keep the newest tarball of a flavour and the one before it."""
    others = sorted((p for p in kept.parent.glob(f"{name}-*.tar") if p != kept), key=lambda p: p.stat().st_mtime)
    for path in others[:-1]:
        path.unlink()

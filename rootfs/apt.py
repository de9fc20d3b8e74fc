"""Query the package mirror with apt in a private directory; the package state of the machine is not changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rootfs import digest
from rootfs.command import run
from rootfs.errors import BuildError

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TARGETS = "$(RELEASE)|$(COMPONENT)|$(REPO_URI)|$(ORIGIN)"
_INSTALL_LINE = re.compile(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) ", re.MULTILINE)
# Settings of the machine's apt for access to the mirror (proxies, certificates), which the builder keeps.
_KEPT_SETTINGS = re.compile(r'^Acquire::(?:https?|Check|Retries|ForceIPv)[^ ]* "[^"]+";$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Mirror:
    """URLs of a Debian archive and its security archive, and the keyring for both."""

    archive: str
    security: str
    keyring: Path = _KEYRING

    def sources(self, suite: str) -> list[str]:
        """Return the lines of sources.list(5) for a suite with its updates and security updates."""
        kept = f"deb [signed-by={self.keyring}]"
        return [
            f"{kept} {self.archive} {suite} main",
            f"{kept} {self.archive} {suite}-updates main",
            f"{kept} {self.security} {suite}-security main",
        ]


def find_mirror(override: str | None) -> Mirror:
    """Return the mirror given by the operator, or else that of this machine's apt.

    :param override: URL of a Debian archive; its security archive is expected beside it.
    :raises BuildError: this machine's apt has no Debian archive, or the keyring is not installed.
    """
    if not _KEYRING.is_file():
        raise BuildError(f"{_KEYRING} is missing: apt-get install debian-archive-keyring")
    if override:
        archive = override.rstrip("/")
        return Mirror(archive, f"{archive}-security")
    return parse_targets(run(["apt-get", "indextargets", "--format", _TARGETS, "Created-By: Packages"]))


def parse_targets(text: str) -> Mirror:
    """Return the mirror in the output of `apt-get indextargets`: lines of `release|component|uri|origin`.

    The origin is empty before the first `apt-get update`; such lines are selected by release and component alone.

    :raises BuildError: no line is of a Debian release.
    """
    archive = security = ""
    for line in text.splitlines():
        release, component, uri, origin = (line.split("|") + [""] * 4)[:4]
        if component != "main" or not (origin == "Debian" or origin.startswith("$") or not origin):
            continue
        if release.endswith("-security"):
            security = security or uri.rstrip("/")
        elif re.fullmatch(r"[a-z]+", release):
            archive = archive or uri.rstrip("/")
    if not archive:
        raise BuildError("this machine's apt has no Debian archive to build from: give one with --mirror URL")
    return Mirror(archive, security or f"{archive}-security")


def parse_fields(paragraph: str) -> dict[str, str]:
    """Return the fields of one paragraph of a control file (deb822(5)), without continuation lines."""
    lines = (line for line in paragraph.splitlines() if ": " in line and not line.startswith(" "))
    return dict(line.split(": ", 1) for line in lines)


class Apt:
    """Package lists of a suite of a mirror, kept in `cache` between builds."""

    def __init__(self, cache: Path, mirror: Mirror, suite: str) -> None:
        self.sources = mirror.sources(suite)
        self._folder = folder = cache / f"apt-{digest.of_value(self.sources)[:8]}"
        self._config = folder / "apt.conf"
        self.settings = _KEPT_SETTINGS.findall(run(["apt-config", "dump"]))
        for name in ("lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d", "downloads"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "etc/sources.list").write_text("\n".join(self.sources) + "\n")
        self._config.write_text(self._render())

    def update(self) -> None:
        """Download the package lists that have changed.

        :raises BuildError: the mirror cannot be reached, or its signature does not match.
        """
        self._apt("update", "--error-on=any")

    def has_lists(self) -> bool:
        """Return whether an earlier `update` succeeded, so that packages can be resolved without a network."""
        return any((self._folder / "lists").glob("*_Packages*"))

    def resolve(self, packages: Sequence[str], *, essential: bool = False) -> dict[str, str]:
        """Return name -> version of all packages that an installation of `packages` on an empty system includes.

        :param essential: include the packages that are essential on every Debian system.
        :raises BuildError: the suite lacks a package, or it cannot be installed.
        """
        wanted = ["?essential", *packages] if essential else list(packages)
        return dict(_INSTALL_LINE.findall(self._apt("--simulate", "install", *wanted)))

    def candidates(self, *packages: str) -> dict[str, dict[str, str]]:
        """Return name -> control fields (deb-control(5)) of the version that would be installed, of each package.

        :raises BuildError: a package does not exist in the suite.
        """
        shown = self._run(["apt-cache", "--no-all-versions", "show", *packages])
        found = [parse_fields(paragraph) for paragraph in shown.split("\n\n") if paragraph.strip()]
        return {fields["Package"]: fields for fields in found}

    def download(self, package: str, version: str) -> Path:
        """Download a package file, which apt checks against the signed lists; return its path. Removes older versions.

        :raises BuildError: the package cannot be downloaded.
        """
        folder = self._folder / "downloads"
        pattern = f"{package}_{version.replace(':', '%3a')}_*.deb"
        if not (found := sorted(folder.glob(pattern))):
            for older in folder.glob(f"{package}_*.deb"):
                older.unlink()
            self._apt("download", f"{package}={version}", cwd=folder)
            found = sorted(folder.glob(pattern))
        if not found:
            raise BuildError(f"apt fetched no file for {package} {version}; remove {self._folder} and try again")
        return found[0]

    def _apt(self, *words: str, cwd: Path | None = None) -> str:
        return self._run(["apt-get", "--quiet", "--assume-yes", *words], cwd)

    def _run(self, argv: list[str], cwd: Path | None = None) -> str:
        return run(argv, env={"APT_CONFIG": str(self._config)}, cwd=cwd)

    def _render(self) -> str:
        root = self._folder
        own = {
            "Dir": root,
            "Dir::State": root,
            "Dir::State::lists": root / "lists",
            "Dir::State::status": root / "status",
            "Dir::Cache": root / "cache",
            "Dir::Etc": root / "etc",
            "Dir::Etc::parts": root / "etc/apt.conf.d",
            "Acquire::Languages": "none",
            "APT::Architecture": "amd64",
            "APT::Install-Recommends": "false",
            "pkgCacheGen::ForceEssential": ",",  # else apt treats itself as essential, which minimal images do not have
            "APT::Sandbox::User": "root",  # the cache directory is not accessible to the user _apt
        }
        return "".join(f'{name} "{value}";\n' for name, value in own.items()) + "\n".join(self.settings) + "\n"

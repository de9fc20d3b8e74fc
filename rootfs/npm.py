"""Install programs published as npm packages, downloaded with the image's own npm."""

from __future__ import annotations

import base64
import hashlib
import shutil
import tarfile
import tempfile
from pathlib import Path

from rootfs.command import run_isolated
from rootfs.errors import BuildError
from rootfs.flavours import NpmTool
from rootfs.progress import step
from rootfs.store import DRAFT_PREFIX

# Mounts the machine's CA certificates, resolv.conf and a scratch directory into the tree for one command. The mounts
# are in a new namespace, so that nothing of them remains in the image.
_FETCH = """
set -e
mount --bind /etc/resolv.conf "$1/etc/resolv.conf"
mount --bind /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/ca-certificates.crt"
mount --bind "$2" "$1/mnt"
mount -t proc proc "$1/proc"
mount --bind /dev "$1/dev"
exec chroot "$1" /usr/bin/env -C /mnt HOME=/mnt NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt \
    npm pack --silent --update-notifier=false "$3"
"""


def install(tool: NpmTool, tree: Path, cache: Path) -> None:
    """Install a program into the tree; its package is kept in `cache`.

    :raises BuildError: the package cannot be downloaded, or its digest differs from the recipe's.
    """
    archive = cache / f"{tool.package.replace('/', '-').lstrip('@')}-{tool.version}.tgz"
    if not archive.exists():
        with step(f"npm package {tool.package} {tool.version}: downloading"):
            _fetch(tool, tree, archive)
    check(archive, tool)
    target = tree / tool.install
    with tarfile.open(archive) as packed:
        member = packed.extractfile(tool.member)
        if member is None:
            raise BuildError(f"the npm package {tool.package} {tool.version} has no file {tool.member}")
        with target.open("wb") as file:
            shutil.copyfileobj(member, file)
    target.chmod(0o755)


def check(archive: Path, tool: NpmTool) -> None:
    """Check the digest of a package file; remove the file if it differs.

    :raises BuildError: the digest differs from the recipe's.
    """
    with archive.open("rb") as file:
        found = "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if found != tool.integrity:
        archive.unlink()
        raise BuildError(
            f"the npm package {tool.package} {tool.version} has the digest {found}, not {tool.integrity}: "
            "the registry gave another file; check the network, then build again"
        )


def _fetch(tool: NpmTool, tree: Path, archive: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=DRAFT_PREFIX, dir=archive.parent) as folder:
        run_isolated(["sh", "-c", _FETCH, "sh", tree, folder, f"{tool.package}@{tool.version}"])
        found = list(Path(folder).glob("*.tgz"))
        if len(found) != 1:
            raise BuildError(f"npm downloaded {len(found)} files for {tool.package}, expected one; build again")
        found[0].replace(archive)

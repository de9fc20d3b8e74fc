"""Volumes and snapshots: disks that outlive sandboxes.

Each is a directory with `facts.json` and `disk.img`, created under a draft name and renamed into place, so that it is
always complete. The facts file has everything known of it, so that it survives the loss of the database.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import string
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.common import stored_json
from agent.common.aio import run_to_completion
from agent.common.atomic_file import publish_directory, write_atomically
from agent.common.errors import AlreadyExists, HostError, InvalidSpec, InvalidState, NotFound, ResourceExhausted
from agent.common.telemetry import log, step
from agent.daemon.host.sparse_copy import copy_sparse
from agent.daemon.storage.disks import MAX_DISK_BYTES, MIN_DISK_BYTES, disk_error, format_volume

VOLUME, SNAPSHOT = "vol-", "snp-"
_MIB = 1 << 20
MAX_PER_TENANT = 1000
_OWNER = 1000  # owner of an empty volume: uid of the default user of every image
_FACTS, _DISK, _DRAFT = "facts.json", "disk.img", ".draft-"
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])")
_ALPHABET = string.ascii_lowercase + string.digits


def is_snapshot(identifier: str) -> bool:
    """Whether this is the id of a snapshot."""
    return identifier.startswith(SNAPSHOT)


def check_slug(slug: str) -> None:
    """Check the name of a volume or snapshot.

    :raises InvalidSpec: the name is malformed.
    """
    if _SLUG.fullmatch(slug) is None or slug[2:4] == "--":
        raise InvalidSpec(
            f"slug {slug[:60]!r} is not valid: 2 to 32 of a-z, 0-9 and '-', none at the ends, no '--' in third place",
            reason="INVALID_SLUG",
        )


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume, or a snapshot, told apart by the prefix of the id.

    :param slug: name, unique among the tenant's volumes and snapshots.
    :param create_time: seconds since 1970.
    :param image: image that boots with this disk as its root; "" if the disk cannot be a root.
    :param origin: (id, slug) of the snapshot that a volume was created from, or of the volume of a snapshot.
    """

    id: str
    slug: str
    tenant: str
    capacity_bytes: int
    create_time: float
    image: str = ""
    origin: tuple[str, str] | None = None


class Volumes:
    """Volumes and snapshots of this node. Their facts are in memory; files are created and deleted in threads."""

    def __init__(self, directory: Path) -> None:
        self._dir = directory
        self._known: dict[str, Volume] = {}
        self._users: dict[str, str] = {}  # volume -> sandbox
        self._busy: set[str] = set()  # being copied
        self._making: set[tuple[str, str]] = set()  # (tenant, slug) of those being created

    def open(self) -> None:
        """Load all volumes and delete unfinished drafts. Blocks.

        :raises HostError: the directory cannot be created or read.
        """
        try:
            self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._dir.iterdir():
                if path.name.startswith(_DRAFT):
                    shutil.rmtree(path)
                elif path.name.startswith((VOLUME, SNAPSHOT)):
                    self._load(path)
        except OSError as error:
            raise HostError(f"cannot read {self._dir}: {error.strerror}", reason="STATE_UNAVAILABLE") from error

    def _load(self, path: Path) -> None:
        try:
            volume = stored_json.decode((path / _FACTS).read_bytes(), Volume)
            if volume.id != path.name or not (path / _DISK).is_file():
                raise ValueError("facts.json has another id, or disk.img is missing")
        except (OSError, ValueError) as error:  # kept, for an operator to repair
            log.error("a volume is damaged", path=str(path), error=str(error))
            return
        self._known[volume.id] = volume

    # -- finding -------------------------------------------------------------------------------------------------------

    def find(self, tenant: str, id_or_slug: str, *kinds: str) -> Volume:
        """Return a volume or snapshot of a tenant.

        :param kinds: id prefixes to look for: VOLUME, SNAPSHOT, or both.
        :raises NotFound: the tenant has none of this id or slug.
        """
        for volume in self._of(tenant, *kinds):
            if id_or_slug in (volume.id, volume.slug):
                return volume
        what = "snapshot" if kinds == (SNAPSHOT,) else "volume" if kinds == (VOLUME,) else "volume or snapshot"
        reason = "SNAPSHOT_NOT_FOUND" if kinds == (SNAPSHOT,) else "VOLUME_NOT_FOUND"
        raise NotFound(f"no {what} {id_or_slug[:80]!r} on this node; list them to see which there are", reason=reason)

    def list(self, tenant: str, kind: str, search: str) -> list[Volume]:
        """Return the tenant's volumes or snapshots whose slug contains `search` or whose id equals it, oldest first."""
        found = [volume for volume in self._of(tenant, kind) if search in volume.slug or search == volume.id]
        return sorted(found, key=lambda volume: (volume.create_time, volume.id))

    def _of(self, tenant: str, *kinds: str) -> Iterator[Volume]:
        return (known for known in self._known.values() if known.tenant == tenant and known.id.startswith(kinds))

    def disk(self, identifier: str) -> Path:
        """Return the path of the disk image of a volume or snapshot."""
        return self._dir / identifier / _DISK

    def capacity(self, identifier: str) -> int:
        """Return the size of a volume or snapshot in bytes.

        :raises NotFound: it does not exist.
        """
        known = self._known.get(identifier)
        if known is None:
            raise NotFound(f"no volume {identifier} on this node", reason="VOLUME_NOT_FOUND")
        return known.capacity_bytes

    def used_bytes(self, volume: Volume) -> int:
        """Return the space that a disk image occupies on the host; 0 if it cannot be read."""
        try:
            return self.disk(volume.id).stat().st_blocks * 512
        except OSError:
            return 0

    def user(self, volume: Volume) -> str:
        """Return the id of the sandbox that a volume is attached to; "" if it is free."""
        return self._users.get(volume.id, "")

    # -- using ---------------------------------------------------------------------------------------------------------

    def attach(self, sandbox_id: str, volumes: Collection[str]) -> None:
        """Reserve volumes, by id, for one sandbox. Idempotent.

        :raises InvalidSpec: a volume is given twice.
        :raises InvalidState: another sandbox has one of them, or it is being copied.
        """
        if len(set(volumes)) != len(volumes):
            raise InvalidSpec("a volume cannot be root and be mounted, too")
        for identifier in volumes:
            user = self._users.get(identifier, sandbox_id)
            if user != sandbox_id or identifier in self._busy:
                holder = user if user != sandbox_id else "a copy"
                raise InvalidState(
                    f"volume {identifier} is in use by {holder}; it can have one user at a time",
                    reason="VOLUME_IN_USE",
                )
        self._users |= dict.fromkeys(volumes, sandbox_id)

    def detach(self, sandbox_id: str) -> None:
        """Release all volumes of a sandbox. Idempotent."""
        self._users = {volume: user for volume, user in self._users.items() if user != sandbox_id}

    async def copy(self, identifier: str, target: Path) -> None:
        """Copy a disk image to `target`, as the disk of a sandbox.

        :raises NotFound: the volume or snapshot does not exist.
        :raises ResourceExhausted: the host's disk is full.
        :raises HostError: the copy failed.
        """
        self.capacity(identifier)
        await asyncio.to_thread(_copy, self.disk(identifier), target)

    # -- making and deleting -------------------------------------------------------------------------------------------

    async def create(self, tenant: str, slug: str, capacity_bytes: int, *, image: str = "", base: str = "") -> Volume:
        """Create a volume: empty, or as a copy of the snapshot `base`.

        :param capacity_bytes: rounded up to a multiple of 1 MiB.
        :raises NotFound: the snapshot does not exist.
        :raises InvalidSpec: capacity or slug is invalid.
        :raises AlreadyExists: the slug is in use.
        :raises ResourceExhausted: the tenant has 1000, or the host's disk is full.
        :raises HostError: the disk cannot be created; nothing is left.
        """
        capacity_bytes = -(-capacity_bytes // _MIB) * _MIB
        if not MIN_DISK_BYTES <= capacity_bytes <= MAX_DISK_BYTES:
            raise InvalidSpec(
                f"capacity is {capacity_bytes} bytes; it must be from {MIN_DISK_BYTES} to {MAX_DISK_BYTES}",
                reason="INVALID_CAPACITY",
            )
        origin = None
        if base:
            snapshot = self.find(tenant, base, SNAPSHOT)
            if capacity_bytes < snapshot.capacity_bytes:
                raise InvalidSpec(
                    f"capacity is {capacity_bytes} bytes; the snapshot needs {snapshot.capacity_bytes}",
                    reason="INVALID_CAPACITY",
                )
            origin, image = (snapshot.id, snapshot.slug), snapshot.image
        volume = Volume(_new_id(VOLUME), slug, tenant, capacity_bytes, time.time(), image, origin)
        return await self._make(volume, origin[0] if origin else "")

    async def snapshot(self, tenant: str, id_or_slug: str, slug: str) -> Volume:
        """Create a snapshot of a volume that is not attached.

        :raises NotFound: the volume does not exist.
        :raises InvalidState: the volume is attached or being copied.
        :raises AgentError: as `create`.
        """
        source = self.find(tenant, id_or_slug, VOLUME)
        self._refuse_in_use(source)
        made = Volume(
            _new_id(SNAPSHOT), slug, tenant, source.capacity_bytes, time.time(), source.image, (source.id, source.slug)
        )
        return await self._make(made, source.id)

    def _refuse_in_use(self, volume: Volume) -> None:
        user = self.user(volume)
        if user or volume.id in self._busy:
            raise InvalidState(f"{volume.slug} is in use by {user or 'a copy'}; end that first", reason="VOLUME_IN_USE")

    async def _make(self, volume: Volume, source: str) -> Volume:
        check_slug(volume.slug)
        key = (volume.tenant, volume.slug)
        mine = list(self._of(volume.tenant, VOLUME, SNAPSHOT))
        if key in self._making or any(volume.slug in (known.slug, known.id) for known in mine):
            raise AlreadyExists(f"a volume or snapshot {volume.slug} exists already", reason="SLUG_IN_USE")
        if len(mine) >= MAX_PER_TENANT:
            raise ResourceExhausted(
                f"{MAX_PER_TENANT} volumes and snapshots exist; delete some", reason="TOO_MANY_VOLUMES"
            )
        self._making.add(key)
        if source:
            self._busy.add(source)
        try:
            with step("volume.make"):
                writing = asyncio.ensure_future(asyncio.to_thread(self._write, volume, source))
                await run_to_completion(writing)
        finally:
            if writing.done() and not writing.cancelled() and writing.exception() is None:
                self._known[volume.id] = volume  # even if the caller was cancelled: the disk exists
            self._making.discard(key)
            self._busy.discard(source)
        log.info("volume created", volume=volume.id, slug=volume.slug, bytes=volume.capacity_bytes)
        return volume

    def _write(self, volume: Volume, source: str) -> None:
        draft = self._dir / f"{_DRAFT}{volume.id}"
        try:
            draft.mkdir(mode=0o700)
            disk = draft / _DISK
            with step("volume.disk"):
                if source:
                    _copy(self.disk(source), disk)
                else:
                    disk.touch(mode=0o600)
                with disk.open("r+b") as file:
                    file.truncate(volume.capacity_bytes)
                if not source:
                    format_volume(disk, 0 if volume.image else _OWNER)
            with step("volume.publish"):
                facts = (stored_json.encode(volume) + "\n").encode()
                write_atomically(draft / _FACTS, facts, mode=0o600, durable=False)
                publish_directory(draft, self._dir / volume.id)  # everything is durable before it has its name
        except OSError as error:
            raise disk_error(draft, error) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    async def delete(self, tenant: str, id_or_slug: str, kind: str) -> None:
        """Delete a volume or snapshot.

        :raises NotFound: it does not exist.
        :raises InvalidState: it is attached or being copied.
        :raises HostError: its directory cannot be renamed.
        """
        volume = self.find(tenant, id_or_slug, kind)
        self._refuse_in_use(volume)
        doomed = self._dir / f"{_DRAFT}{volume.id}"
        try:
            (self._dir / volume.id).rename(doomed)  # gone at once; its files are deleted afterwards
        except OSError as error:
            raise HostError(f"cannot delete {volume.id}: {error.strerror}", reason="REMOVE_FAILED") from error
        del self._known[volume.id]
        await run_to_completion(asyncio.to_thread(shutil.rmtree, doomed, ignore_errors=True))
        log.info("volume deleted", volume=volume.id, slug=volume.slug)


def _new_id(prefix: str) -> str:
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(16))


def _copy(source: Path, target: Path) -> None:
    try:
        copy_sparse(source, target)
    except FileNotFoundError:
        raise NotFound(f"{source.parent.name} was deleted", reason="VOLUME_NOT_FOUND") from None
    except OSError as error:
        raise disk_error(target, error) from error

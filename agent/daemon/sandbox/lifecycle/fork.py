"""Fork a sandbox: create copies of its memory and disk while its CPUs are stopped."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from agent.common.aio import run_to_completion
from agent.common.errors import AgentError, InvalidSpec, InvalidState
from agent.common.model import Lifetime, State, new_sandbox_id
from agent.common.telemetry import log, step
from agent.daemon.host.sparse_copy import copy_sparse
from agent.daemon.sandbox.capacity.admission import Admission
from agent.daemon.sandbox.lifecycle.create import Creator, request_id_reused
from agent.daemon.sandbox.lifecycle.delete import Deleter
from agent.daemon.sandbox.lifecycle.registry import SandboxEntry, SandboxRegistry
from agent.daemon.sandbox.lifecycle.transition import Transitions
from agent.daemon.sandbox.machine import resources, snapshot
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.machine.resources import create_empty_slots, grant_traversal
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from agent.daemon.sandbox.state.validation import changed_labels
from agent.daemon.storage.disks import disk_error
from agent.daemon.storage.images import Image, ImageStore
from agent.daemon.storage.volumes import is_snapshot

MAX_COPIES = 64


@dataclasses.dataclass(frozen=True, slots=True)
class _Fork:
    """One fork in progress.

    :param directory: holds the saved memory of the parent until all children have read it.
    :param frozen: done once the children's files are there, or failed with the reason why not.
    """

    parent: SandboxEntry
    image: Image
    directory: Path
    frozen: asyncio.Future[None]


class Forker:
    """Forks sandboxes.

    :param creator: creates the children, whose machines are restored from the parent's memory.
    :param deleter: deletes the children of a fork that failed for one of them.
    """

    def __init__(
        self,
        host: HostServices,
        images: ImageStore,
        store: Store,
        registry: SandboxRegistry,
        admission: Admission,
        creator: Creator,
        deleter: Deleter,
        transitions: Transitions,
    ) -> None:
        self._host = host
        self._images = images
        self._store = store
        self._registry = registry
        self._admission = admission
        self._creator = creator
        self._deleter = deleter
        self._transitions = transitions

    async def fork(
        self, sandbox_id: str, count: int, *, labels: Mapping[str, str], lifetime: Lifetime | None, request_id: str
    ) -> list[Record]:
        """Create `count` copies of a sandbox as it is now, and return their records once all run; all or none.

        :param labels: added to those of the sandbox.
        :param lifetime: of the copies, from now on; None: the sandbox's.
        :param request_id: a known one returns the copies of that request; "": a new fork each time.
        :raises NotFound: the node has no such sandbox.
        :raises InvalidSpec: `count` is out of range.
        :raises InvalidState: the sandbox is neither running nor paused, or has volumes.
        :raises ResourceExhausted: the node has no room for the copies.
        :raises AgentError: a step failed; no copy is left.
        """
        parent = self._registry.entry(sandbox_id)
        if request_id and self._registry.by_request(f"{request_id}.0") is not None:
            entries = self._find_children(parent, count, request_id)
        else:
            _check(parent.record, count)
            entries = self._begin(parent, count, labels, lifetime, request_id)
        results = await asyncio.gather(
            *(entry.operations.join_create("fork") for entry in entries), return_exceptions=True
        )
        failed = [result for result in results if isinstance(result, BaseException)]
        if failed:
            await asyncio.gather(
                *(self._deleter.delete(entry, "fork failed") for entry in entries if entry.runs), return_exceptions=True
            )
            raise failed[0]
        return [entry.record.copy() for entry in entries]

    def _find_children(self, parent: SandboxEntry, count: int, request_id: str) -> list[SandboxEntry]:
        """Return the children of an earlier request with this id.

        :raises AlreadyExists: that request had another parent or count.
        """
        entries = [self._registry.by_request(f"{request_id}.{number}") for number in range(count)]
        found = [entry for entry in entries if entry is not None and entry.record.parent == parent.record.id]
        if len(found) != count or self._registry.by_request(f"{request_id}.{count}") is not None:
            raise request_id_reused(request_id)
        return found

    def _begin(
        self, parent: SandboxEntry, count: int, labels: Mapping[str, str], lifetime: Lifetime | None, request_id: str
    ) -> list[SandboxEntry]:
        """Register all children, and start to freeze the parent.

        :raises ResourceExhausted: the node has no room, or no UID is left for a child.
        """
        record = parent.record
        labels = changed_labels(record.labels, labels, ())
        image = self._images.get_build(record.spec.image, record.image_digest)
        spec = dataclasses.replace(record.spec, lifetime=lifetime or record.spec.lifetime, labels=dict(labels))
        self._admission.check([spec] * count)
        directory = self._host.paths.forks(record.id) / new_sandbox_id()
        fork = _Fork(parent, image, directory, asyncio.get_running_loop().create_future())
        fork.frozen.add_done_callback(lambda done: done.exception())  # retrieved: all children may be gone by then
        entries: list[SandboxEntry] = []
        ready: list[asyncio.Event] = []
        try:
            for number in range(count):
                child = Record(
                    new_sandbox_id(),
                    dataclasses.replace(spec, request_id=f"{request_id}.{number}" if request_id else ""),
                    State.CREATING, time.time(), labels=dict(labels), image_digest=record.image_digest,
                    net=record.net, secrets=record.secrets, shape=dict(record.shape), parent=record.id,
                )  # fmt: skip
                entry, waits = self._begin_child(fork, child)
                entries.append(entry)
                ready.append(waits)
            parent.operations.start("fork", lambda: self._fork(fork, entries, ready))
        except AgentError as error:  # no UID is left, or the parent is being deleted: release the waiting children
            fork.frozen.set_exception(error)
            raise
        return entries

    def _begin_child(self, fork: _Fork, child: Record) -> tuple[SandboxEntry, asyncio.Event]:
        """Start the create of one child; return its entry, and an event set once it waits for the parent or ended."""
        ready = asyncio.Event()

        async def inherit_secrets() -> None:
            await self._host.secrets.inherit(child.id, child.parent)

        async def make() -> Machine:
            ready.set()
            # Even if cancelled: the freeze writes files of this child.
            await run_to_completion(asyncio.shield(fork.frozen))
            machine = await snapshot.restore(self._host, child, fork.image, fork.directory)
            try:
                with step("token"):
                    await self._store.put(child)
                with step("resume.guest"):
                    await machine.resume(self._host.settings.templates.clone_timeout_s, hostname=child.id)
            except BaseException:
                await machine.aclose()
                raise
            return machine

        entry = self._creator.begin(child, inherit_secrets, make)
        entry.needs_cleanup = True
        assert entry.operations.creating is not None
        entry.operations.creating.add_done_callback(lambda _: ready.set())
        return entry, ready

    async def _fork(self, fork: _Fork, children: list[SandboxEntry], ready: list[asyncio.Event]) -> None:
        """Freeze the parent once all children wait for it, and remove the saved memory once all have read it."""
        try:
            try:
                await asyncio.gather(*(event.wait() for event in ready))
                async with fork.parent.operations.exclusive():
                    await self._freeze(fork.parent, [child.record for child in children], fork.directory)
            except BaseException as error:
                known = isinstance(error, AgentError)
                fork.frozen.set_exception(error if known else InvalidState(f"the fork was given up: {error!r}"))
                raise
            fork.frozen.set_result(None)
            await asyncio.wait({task for child in children if (task := child.operations.creating) is not None})
        except AgentError as error:
            log.warning("fork failed", sandbox_id=fork.parent.record.id, error=error.message)
        finally:
            await run_to_completion(asyncio.to_thread(resources.remove_tree, fork.directory))

    async def _freeze(self, parent: SandboxEntry, children: list[Record], directory: Path) -> None:
        """Save the parent's memory and copy its disk for each child while its CPUs are stopped."""
        machine = self._transitions.pausable(parent)
        async with self._transitions.unmonitored(parent, machine):
            await snapshot.save(machine, directory)
            with step("fork.disks"):
                await run_to_completion(asyncio.to_thread(_copy_disks, self._host, parent.record, children))
            if parent.record.state is State.RUNNING:
                with step("fork.parent"):
                    await machine.resume(self._host.settings.sandbox.relink_timeout_s)


def _check(record: Record, count: int) -> None:
    """Check that a sandbox can be forked into so many copies.

    :raises InvalidSpec: `count` is out of range.
    :raises InvalidState: the sandbox is neither running nor paused, or has volumes.
    """
    if not 1 <= count <= MAX_COPIES:
        raise InvalidSpec(f"count is {count}; it must be from 1 to {MAX_COPIES}")
    if record.state not in (State.RUNNING, State.PAUSED):
        hint = "; resume it first" if record.state is State.SUSPENDED else ""
        raise InvalidState(f"sandbox {record.id} is {record.state}, not running{hint}", reason="SANDBOX_NOT_RUNNING")
    if record.spec.volumes or (record.spec.root and not is_snapshot(record.spec.root)):
        raise InvalidState(
            "a sandbox with volumes cannot be forked: each has one writer; copy them by snapshots instead",
            reason="FORK_HAS_VOLUMES",
        )


def _copy_disks(host: HostServices, parent: Record, children: list[Record]) -> None:
    """Give each child a copy of the parent's data disk. Blocks.

    :raises AgentError: the file system failed; directories of children may be left.
    """
    for child in children:
        disk = host.paths.disk(child.id)
        try:
            disk.parent.mkdir(mode=0o700, parents=True)
            grant_traversal(disk.parent, child.uid)
            copy_sparse(host.paths.disk(parent.id), disk)
        except OSError as error:
            raise disk_error(disk, error) from error
        create_empty_slots(host, child.id, int(child.shape["slots"]))

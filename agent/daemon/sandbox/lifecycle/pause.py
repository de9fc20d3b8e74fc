"""Sandboxes that stand still: paused in memory, suspended on the disk, forked meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from agent.common.aio import run_to_completion
from agent.common.errors import AgentError, AlreadyExists, InvalidState
from agent.common.model import Lifetime, State, new_sandbox_id
from agent.common.telemetry import log, step
from agent.daemon.sandbox.lifecycle import fork
from agent.daemon.sandbox.lifecycle.create import Lifecycle
from agent.daemon.sandbox.lifecycle.entry import Entry
from agent.daemon.sandbox.machine import resources, snapshot
from agent.daemon.sandbox.machine.machine import Machine
from agent.daemon.sandbox.state.events import EventType
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.validation import changed_labels
from agent.daemon.storage.images import Image


class Standing(Lifecycle):
    """Pauses, resumes and forks sandboxes."""

    async def pause(self, sandbox_id: str, *, to_disk: bool) -> Record:
        """Makes a sandbox stand still, in memory or, with its memory freed, on the disk. Idempotent.

        :raises NotFound: :raises InvalidState: it neither runs nor stands still.
        :raises AgentError: it failed; the sandbox is as it was.
        """
        return await self._change(sandbox_id, "pause", self._suspend if to_disk else self._pause)

    async def resume(self, sandbox_id: str) -> Record:
        """Lets a sandbox go on. Idempotent. :raises NotFound: :raises InvalidState: :raises ResourceExhausted: no room.

        :raises AgentError: it failed; what is on the disk alone stays so.
        """
        return await self._change(sandbox_id, "resume", self._resume)

    async def _change(self, sandbox_id: str, name: str, work: Callable[[Entry], Coroutine[Any, Any, None]]) -> Record:
        entry = self._entry(sandbox_id)
        await self._operations.run(entry, name, lambda: work(entry))
        return entry.record.copy()

    async def _pause(self, entry: Entry) -> None:
        if entry.record.state in (State.PAUSED, State.SUSPENDED):
            return
        machine = self.running(entry.record.id)
        await self._sync_volumes(entry, machine)
        async with self._still(entry, machine):
            with step("pause.stop"):
                await machine.pause()
            with step("pause.record"):
                await self._moved(entry, State.PAUSED)

    async def _suspend(self, entry: Entry) -> None:
        record = entry.record
        if record.state is State.SUSPENDED:
            return
        machine = self._standing(entry)
        await self._sync_volumes(entry, machine)
        async with self._still(entry, machine):
            saved = self._host.paths.memory(record.id)
            await snapshot.save(machine, saved)
            try:
                with step("pause.record"):
                    await self._moved(entry, State.SUSPENDED, lambda draft: draft.token.clear(), durable=True)
            finally:
                if entry.record.state is not State.SUSPENDED:  # a write may succeed although it is cancelled
                    await run_to_completion(asyncio.to_thread(resources.remove_tree, saved))
        entry.machine, entry.needs_cleanup = None, True
        entry.cleanup_stack.close()
        with step("pause.machine"):
            await machine.release()

    async def _sync_volumes(self, entry: Entry, machine: Machine) -> None:
        """Volumes outlive the sandbox: what it has written to them is there, whatever becomes of it."""
        if entry.record.spec.root or entry.record.spec.volumes:
            await machine.sync()

    def _standing(self, entry: Entry) -> Machine:
        """Returns the machine of a sandbox that runs or is paused. :raises InvalidState: it does neither."""
        if entry.record.state is State.PAUSED and entry.machine is not None:
            return entry.machine
        return self.running(entry.record.id)

    @contextlib.asynccontextmanager
    async def _still(self, entry: Entry, machine: Machine) -> AsyncIterator[None]:
        """A time in which nobody watches over a machine and its CPUs may stand still; what fails goes on as it was."""
        await self._stop_watch(entry)
        try:
            await self._note_standing(entry, standing=True)
            yield
        except BaseException:
            if entry.deleting is None and entry.record.state is State.RUNNING:
                with contextlib.suppress(AgentError):  # who watches over it finds out
                    await asyncio.shield(machine.resume(self._host.settings.sandbox.relink_timeout_s))
            raise
        finally:
            if entry.deleting is None and entry.record.state in (State.RUNNING, State.PAUSED):
                self._start_watch(entry)
                with contextlib.suppress(AgentError):  # at worst the next agent lets it go on once more
                    await asyncio.shield(self._note_standing(entry, standing=False))

    async def _note_standing(self, entry: Entry, *, standing: bool) -> None:
        """Keeps whether the CPUs of a sandbox that is RUNNING may stand still: the next agent lets them go on."""
        with step("pause.note"):
            await self._store.change(entry.record, lambda draft: setattr(draft, "standing", standing))

    async def _moved(
        self, entry: Entry, state: State, also: Callable[[Record], None] = lambda _: None, *, durable: bool = False
    ) -> None:
        """Change the state, and what `also` changes in the same write, once the database has it."""

        def edit(draft: Record) -> None:
            draft.move(state)
            also(draft)

        await self._store.change(entry.record, edit, durable=durable)
        self._publish(EventType.UPDATED, entry)
        log.info("sandbox", sandbox_id=entry.record.id, state=state.value)

    async def _resume(self, entry: Entry) -> None:
        record, timeout_s = entry.record, self._host.settings.sandbox.relink_timeout_s
        if record.state is State.RUNNING:
            return
        if record.state is State.PAUSED:
            assert entry.machine is not None
            await self._stop_watch(entry)
            await self._going_on(entry, entry.machine, timeout_s)
        elif record.state is State.SUSPENDED:
            saved = self._host.paths.memory(record.id)
            self.admission.check([record.spec])
            image = self.images.get_build(record.spec.image, record.image_digest)
            entry.needs_cleanup = True
            entry.machine = await self._restored(entry, image, saved)
            entry.needs_cleanup = False
            machine = entry.machine
            await self._going_on(entry, machine, timeout_s)
            await self._note_standing(entry, standing=False)
            with step("resume.saved"):
                await run_to_completion(asyncio.to_thread(resources.remove_tree, saved))
        else:
            self.running(record.id)  # says why not

    async def _restored(self, entry: Entry, image: Image, saved: Path) -> Machine:
        """Return the machine of a suspended sandbox, its CPUs stopped and its record RUNNING; undo all on failure."""
        record = entry.record
        volatile = record.token, record.slot, record.rules  # of the machine that is made
        try:
            machine = await snapshot.restore(self._host, record, image, saved)
            try:
                with step("resume.record"):
                    # The next agent resumes the CPUs if this one dies first.
                    await self._moved(
                        entry, State.RUNNING, lambda draft: setattr(draft, "standing", True), durable=True
                    )
            except BaseException:
                if record.state is State.SUSPENDED:
                    await machine.release()
                else:  # the write was done before its cancellation: the record needs this machine
                    entry.machine, entry.needs_cleanup = machine, False
                raise
        except BaseException:
            if record.state is State.SUSPENDED:
                record.token, record.slot, record.rules = volatile
            raise
        return machine

    async def _going_on(self, entry: Entry, machine: Machine, timeout_s: float) -> None:
        """Lets a machine go on; a guest that does not come back has failed."""
        try:
            with step("resume.guest"):
                await machine.resume(timeout_s)
        except AgentError as error:
            await self._fail(entry, error)
            raise
        if entry.record.state is not State.RUNNING:
            with step("resume.record"):
                await self._moved(entry, State.RUNNING)
        self._start_watch(entry)

    # -- forking -------------------------------------------------------------------------------------------------------

    async def fork(
        self, sandbox_id: str, count: int, *, labels: Mapping[str, str], lifetime: Lifetime | None, request_id: str
    ) -> list[Record]:
        """Makes so many copies of a sandbox as it is now, and returns them once they run; all or none.

        :param lifetime: of the copies; None: as the sandbox's, from now on.
        :raises NotFound: :raises InvalidState: it does not run, or has volumes. :raises ResourceExhausted: no room.
        :raises AgentError: it failed; no copy is left.
        """
        parent = self._entry(sandbox_id)
        if request_id and f"{request_id}.0" in self._by_request:
            entries = self._forked_before(parent, count, request_id)
        else:
            fork.check(parent.record, count)
            entries = self._begin_fork(parent, count, labels, lifetime, request_id)
        results = await asyncio.gather(
            *(self._operations.join(entry, "fork", entry.creating) for entry in entries if entry.creating is not None),
            return_exceptions=True,
        )
        failed = [result for result in results if isinstance(result, BaseException)]
        if failed:
            await asyncio.gather(
                *(asyncio.shield(self._start_delete(entry, "fork failed")) for entry in entries if entry.runs),
                return_exceptions=True,
            )
            raise failed[0]
        return [entry.record.copy() for entry in entries]

    def _forked_before(self, parent: Entry, count: int, request_id: str) -> list[Entry]:
        entries = [self._by_request.get(f"{request_id}.{number}") for number in range(count)]
        found = [entry for entry in entries if entry is not None and entry.record.parent == parent.record.id]
        if len(found) != count or f"{request_id}.{count}" in self._by_request:
            raise AlreadyExists(
                f"request_id {request_id} was used for another request; use a fresh one", reason="REQUEST_ID_REUSED"
            )
        return found

    def _begin_fork(
        self, parent: Entry, count: int, labels: Mapping[str, str], lifetime: Lifetime | None, request_id: str
    ) -> list[Entry]:
        record = parent.record
        labels = changed_labels(record.labels, labels, ())
        image = self.images.get_build(record.spec.image, record.image_digest)
        spec = dataclasses.replace(record.spec, lifetime=lifetime or record.spec.lifetime, labels=dict(labels))
        self.admission.check([spec] * count)
        directory = self._host.paths.forks(record.id) / new_sandbox_id()
        frozen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        frozen.add_done_callback(lambda done: done.exception())  # every child may be gone before it fails
        entries: list[Entry] = []
        ready: list[asyncio.Event] = []
        try:
            for number in range(count):
                child = Record(
                    new_sandbox_id(),
                    dataclasses.replace(spec, request_id=f"{request_id}.{number}" if request_id else ""),
                    State.CREATING, time.time(), labels=dict(labels), image_digest=record.image_digest,
                    net=record.net, secrets=record.secrets, shape=dict(record.shape), parent=record.id,
                )  # fmt: skip
                entry, its_turn = self._enter_child(child, image, directory, frozen)
                entries.append(entry)
                ready.append(its_turn)
            self._operations.start(parent, "fork", lambda: self._fork(parent, entries, ready, directory, frozen))
        except AgentError as error:  # no uid is left, or the parent is being deleted: the children wait for nothing
            frozen.set_exception(error)
            raise
        return entries

    def _enter_child(
        self, child: Record, image: Image, directory: Path, frozen: asyncio.Future[None]
    ) -> tuple[Entry, asyncio.Event]:
        """Returns a child's entry, and what is set once it waits for its parent, or has ended."""
        ready = asyncio.Event()
        assert child.parent

        async def hold() -> None:
            await self._host.network.inherit(child.id, child.parent)

        async def make() -> Machine:
            ready.set()
            await run_to_completion(asyncio.shield(frozen))  # whoever freezes makes files of this child
            machine = await snapshot.restore(self._host, child, image, directory)
            try:
                with step("token"):
                    await self._store.put(child)
                with step("resume.guest"):
                    await machine.resume(self._host.settings.templates.clone_timeout_s, hostname=child.id)
            except BaseException:
                await machine.aclose()
                raise
            return machine

        entry = self._enter(child, hold, make)
        entry.needs_cleanup = True
        assert entry.creating is not None
        entry.creating.add_done_callback(lambda _: ready.set())
        return entry, ready

    async def _fork(
        self, parent: Entry, children: list[Entry], ready: list[asyncio.Event], directory: Path,
        frozen: asyncio.Future[None],
    ) -> None:  # fmt: skip
        """Has the parent stand still for as long as it takes, and clears up once all children are made."""
        try:
            try:
                await asyncio.gather(*(event.wait() for event in ready))
                async with self._operations.exclusive(parent):
                    await self._freeze(parent, [child.record for child in children], directory)
            except BaseException as error:
                known = isinstance(error, AgentError)
                frozen.set_exception(error if known else InvalidState(f"the fork was given up: {error!r}"))
                raise
            frozen.set_result(None)
            await asyncio.wait({child.creating for child in children if child.creating is not None})
        except AgentError as error:
            log.warning("fork failed", sandbox_id=parent.record.id, error=error.message)
        finally:
            await run_to_completion(asyncio.to_thread(resources.remove_tree, directory))

    async def _freeze(self, parent: Entry, children: list[Record], directory: Path) -> None:
        machine = self._standing(parent)
        async with self._still(parent, machine):
            await fork.freeze(self._host, parent.record, machine, children, directory)
            if parent.record.state is State.RUNNING:
                with step("fork.parent"):
                    await machine.resume(self._host.settings.sandbox.relink_timeout_s)

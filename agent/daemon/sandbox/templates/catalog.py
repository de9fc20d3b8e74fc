"""Templates: VMs that were booted once, prepared and frozen, for clones to start from.

One per `Shape`, made on first need (or at start, or on request), kept within a disk budget, and never changed:

    <state_dir>/templates/<digest>/{manifest.json,ram,vmm/...}

A template counts only if its files have the digests of its manifest. That is checked when an agent first uses it; from
then on it is enough that nobody has touched the files since (size, modification and change time, inode).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from agent.common.errors import AgentError, InvalidState, NotFound
from agent.common.telemetry import TEMPLATE_BYTES, TEMPLATES, log, step
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.resources import remove_tree
from agent.daemon.sandbox.machine.vm_shape import Shape, shape_of
from agent.daemon.sandbox.templates import files
from agent.daemon.sandbox.templates.builder import build
from agent.daemon.sandbox.templates.files import Template, TemplateDamaged
from agent.daemon.storage.images import Image

_DRAFT_PREFIX = "tmp-"


class Templates:
    """The templates of one node."""

    def __init__(self, host: HostServices) -> None:
        self._host = host
        self._dir = host.paths.templates
        self._making: dict[str, asyncio.Task[Template]] = {}
        self._sound: dict[str, tuple[Template, tuple[object, ...]]] = {}
        self._refused: set[str] = set()
        self._users: Counter[str] = Counter()

    # -- the directory -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Removes what a maker left that was killed. Blocks. :raises HostError: it cannot."""
        if self._dir.exists():
            for draft in self._dir.glob(f"{_DRAFT_PREFIX}*"):
                remove_tree(draft)
        self._count()

    def list(self) -> list[Template]:
        """Returns the templates there are, last used first; damaged ones are left out. Blocks for a millisecond
        each.
        """
        found = []
        for path in self._dir.glob("*/manifest.json"):
            if not path.parent.name.startswith(_DRAFT_PREFIX):
                with contextlib.suppress(TemplateDamaged):
                    found.append(files.read(path.parent))
        return sorted(found, key=lambda template: template.last_used, reverse=True)

    def remove(self, digest: str) -> None:
        """Removes a template. :raises NotFound: :raises InvalidState: sandboxes run from it."""
        if digest not in {template.digest for template in self.list()}:
            raise NotFound(
                f"no template {digest}; list the templates to see which there are", reason="TEMPLATE_NOT_FOUND"
            )
        if self._users[digest]:
            raise InvalidState(
                f"template {digest} is in use by {self._users[digest]} sandboxes; delete them first",
                reason="TEMPLATE_IN_USE",
            )
        self._drop(digest)

    def _drop(self, digest: str) -> None:
        self._sound.pop(digest, None)
        doomed = self._dir / f"{_DRAFT_PREFIX}{digest}-{os.urandom(4).hex()}"
        with contextlib.suppress(FileNotFoundError):
            (self._dir / digest).rename(doomed)  # at once out of everyone's sight
            shutil.rmtree(doomed, ignore_errors=True)
        self._count()

    def _count(self) -> None:
        present = self.list()
        TEMPLATES.set(len(present))
        TEMPLATE_BYTES.set(sum(template.size_bytes for template in present))

    # -- using ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def pin(self, digest: str) -> Iterator[None]:
        """Keeps a template from being removed as long as the context lasts."""
        self._users[digest] += 1
        try:
            yield
        finally:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]

    async def get(self, image: Image, vcpu_count: int, memory_bytes: int, volumes: int = 0) -> Template:
        """Returns a sound template for a sandbox of these sizes and so many volumes.

        The first caller makes it, others wait for that.

        :raises AgentError: it could not be made; nothing is left of it.
        """
        vmm = await self._host.driver.probe()
        shape = shape_of(self._host.settings, image, vcpu_count, memory_bytes, vmm, volumes)
        known = self._sound.get(shape.digest)
        if known is not None and files.stamps(known[0]) == known[1]:
            files.touch(known[0])
            return known[0]
        if known is not None:
            del self._sound[shape.digest]  # somebody touched its files: all of them are compared again
        making = self._making.get(shape.digest)
        if making is None:
            making = asyncio.create_task(self._find_or_make(shape, image), name=f"template-{shape.digest}")
            self._making[shape.digest] = making
            making.add_done_callback(lambda task: self._made(shape.digest, task))
        return await asyncio.shield(making)

    def _made(self, digest: str, task: asyncio.Task[Template]) -> None:
        self._making.pop(digest, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            reason = error.message if isinstance(error, AgentError) else repr(error)
            log.error("cannot make a template", template=digest, reason=reason)

    async def _find_or_make(self, shape: Shape, image: Image) -> Template:
        path = self._dir / shape.digest
        if path.exists() and shape.digest not in self._refused:
            try:
                with step("template.verify"):
                    template = await asyncio.to_thread(files.verified, path, shape)
                return self._accept(template)
            except TemplateDamaged as error:
                log.warning("a template is made again", template=shape.digest, reason=error.message)
                await asyncio.to_thread(self._drop, shape.digest)
        try:
            with step("template.make"):
                draft = self._dir / f"{_DRAFT_PREFIX}{shape.digest}-{os.urandom(4).hex()}"
                template = await build(self._host, shape, image, draft, path)
        finally:
            self._refused.discard(shape.digest)  # if not even a new one can be made, the old one was not to blame
        log.info("template made", template=shape.digest, image=image.name, bytes=template.size_bytes)
        self._accept(template)
        await asyncio.to_thread(self._fit_budget, shape.digest)
        return template

    def _accept(self, template: Template) -> Template:
        self._sound[template.digest] = (template, files.stamps(template))
        files.touch(template)
        return template

    def reject(self, template: Template, reason: str) -> None:
        """Has the next need make a template again that the VMM does not take.

        The old one goes only when the new one is whole, for it may be the VMM that is out of order. Clones keep their
        pages.
        """
        log.warning("a template was refused", template=template.digest, reason=reason)
        self._sound.pop(template.digest, None)
        self._refused.add(template.digest)

    def _fit_budget(self, newest: str) -> None:
        """Removes the templates that were not used in the longest time until all fit; never one that is in use."""
        present = self.list()
        size = sum(template.size_bytes for template in present)
        for template in reversed(present):
            if size <= self._host.settings.templates.budget_bytes:
                break
            if template.digest == newest or self._users[template.digest] or template.digest in self._making:
                continue
            log.info("template removed to fit the budget", template=template.digest, bytes=template.size_bytes)
            self._drop(template.digest)
            size -= template.size_bytes
        self._count()

    async def aclose(self) -> None:
        """Ends makers under way; nothing is left of them. Idempotent."""
        making = list(self._making.values())
        for task in making:
            task.cancel()
        if making:
            await asyncio.wait(making)

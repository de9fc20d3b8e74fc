"""Catalog of templates: saved VMs, booted and prepared once, that clones start from.

There is one template per `Shape`, immutable, built on first use (or at start, or on request), within a disk budget:

    <state_dir>/templates/<digest>/{manifest.json,ram,vmm/...}

A template is valid if its files have the digests in its manifest. An agent computes the digests when it first uses the
template; afterwards it compares size, modification time, change time and inode of each file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from agent.common.aio import cancel_and_wait
from agent.common.errors import AgentError, InvalidState, NotFound
from agent.common.telemetry import TEMPLATE_BYTES, TEMPLATES, log, step
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.machine.resources import remove_tree
from agent.daemon.sandbox.machine.vm_shape import Shape, shape_of
from agent.daemon.sandbox.templates import builder, files
from agent.daemon.sandbox.templates.files import Template, TemplateDamaged
from agent.daemon.storage.images import Image

_DRAFT_PREFIX = "tmp-"


class Templates:
    """Templates of one node."""

    def __init__(self, host: HostServices) -> None:
        self._host = host
        self._dir = host.paths.templates
        self._builds: dict[str, asyncio.Task[Template]] = {}
        self._verified: dict[str, tuple[Template, tuple[object, ...]]] = {}
        self._rejected: set[str] = set()
        self._users: Counter[str] = Counter()

    # -- the directory -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Remove the drafts of an agent that died during a build. Blocks.

        :raises HostError: a draft cannot be removed.
        """
        if self._dir.exists():
            for draft in self._dir.glob(f"{_DRAFT_PREFIX}*"):
                remove_tree(draft)
        self._update_metrics()

    def list(self) -> list[Template]:
        """Return all templates without damaged ones, most recently used first. Blocks for a millisecond each."""
        found = []
        for path in self._dir.glob("*/manifest.json"):
            if not path.parent.name.startswith(_DRAFT_PREFIX):
                with contextlib.suppress(TemplateDamaged):
                    found.append(files.read(path.parent))
        return sorted(found, key=lambda template: template.last_used, reverse=True)

    def remove(self, digest: str) -> None:
        """Remove a template. Blocks.

        :raises NotFound: there is no template of that digest.
        :raises InvalidState: sandboxes run from it (TEMPLATE_IN_USE).
        """
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
        self._verified.pop(digest, None)
        doomed = self._dir / f"{_DRAFT_PREFIX}{digest}-{os.urandom(4).hex()}"
        with contextlib.suppress(FileNotFoundError):
            (self._dir / digest).rename(doomed)  # atomic: no reader sees half a template
            shutil.rmtree(doomed, ignore_errors=True)
        self._update_metrics()

    def _update_metrics(self) -> None:
        present = self.list()
        TEMPLATES.set(len(present))
        TEMPLATE_BYTES.set(sum(template.size_bytes for template in present))

    # -- using ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def pin(self, digest: str) -> Iterator[None]:
        """Protect a template from removal while the context lasts."""
        self._users[digest] += 1
        try:
            yield
        finally:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]

    async def get(self, image: Image, vcpu_count: int, memory_bytes: int, volumes: int = 0) -> Template:
        """Return a valid template for a sandbox; the first caller builds it, concurrent callers wait for that build.

        :param memory_bytes: MemTotal that the sandbox requests.
        :param volumes: number of volumes to attach.
        :raises AgentError: the template could not be built; nothing is left of it.
        """
        vmm = await self._host.driver.probe()
        shape = shape_of(self._host.settings, image, vcpu_count, memory_bytes, vmm, volumes)
        known = self._verified.get(shape.digest)
        if known is not None and files.stamps(known[0]) == known[1]:
            files.touch(known[0])
            return known[0]
        if known is not None:
            del self._verified[shape.digest]  # a file was touched: verify all digests again
        build = self._builds.get(shape.digest)
        if build is None:
            build = asyncio.create_task(self._find_or_build(shape, image), name=f"template-{shape.digest}")
            self._builds[shape.digest] = build
            build.add_done_callback(lambda task: self._on_built(shape.digest, task))
        return await asyncio.shield(build)

    def _on_built(self, digest: str, task: asyncio.Task[Template]) -> None:
        self._builds.pop(digest, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            reason = error.message if isinstance(error, AgentError) else repr(error)
            log.error("cannot build a template", template=digest, reason=reason)

    async def _find_or_build(self, shape: Shape, image: Image) -> Template:
        path = self._dir / shape.digest
        if path.exists() and shape.digest not in self._rejected:
            try:
                with step("template.verify"):
                    template = await asyncio.to_thread(files.verify, path, shape)
                return self._accept(template)
            except TemplateDamaged as error:
                log.warning("rebuilding a template", template=shape.digest, reason=error.message)
                await asyncio.to_thread(self._drop, shape.digest)
        try:
            with step("template.make"):
                draft = self._dir / f"{_DRAFT_PREFIX}{shape.digest}-{os.urandom(4).hex()}"
                template = await builder.build(self._host, shape, image, draft, path)
        finally:
            self._rejected.discard(shape.digest)  # if no new one can be built, the old one was not at fault
        log.info("template built", template=shape.digest, image=image.name, bytes=template.size_bytes)
        self._accept(template)
        await asyncio.to_thread(self._fit_budget, shape.digest)
        return template

    def _accept(self, template: Template) -> Template:
        self._verified[template.digest] = (template, files.stamps(template))
        files.touch(template)
        return template

    def reject(self, template: Template, reason: str) -> None:
        """Rebuild a template on its next use, since the VMM did not restore it.

        The old one is replaced only once the new one is complete, for the VMM may be at fault. Running clones keep
        their pages.
        """
        log.warning("a template was rejected", template=template.digest, reason=reason)
        self._verified.pop(template.digest, None)
        self._rejected.add(template.digest)

    def _fit_budget(self, newest: str) -> None:
        """Remove least recently used templates until all fit the budget; never one in use."""
        present = self.list()
        size = sum(template.size_bytes for template in present)
        for template in reversed(present):
            if size <= self._host.settings.templates.budget_bytes:
                break
            if template.digest == newest or self._users[template.digest] or template.digest in self._builds:
                continue
            log.info("template removed to fit the budget", template=template.digest, bytes=template.size_bytes)
            self._drop(template.digest)
            size -= template.size_bytes
        self._update_metrics()

    async def aclose(self) -> None:
        """Cancel running builds; nothing is left of them. Idempotent."""
        await cancel_and_wait(*self._builds.values())

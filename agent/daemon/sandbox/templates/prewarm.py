"""Prewarm templates of the configured sizes: build them when the agent starts, and after each rebuild of the image."""

from __future__ import annotations

import asyncio

from agent.common.config.settings import Settings
from agent.common.errors import AgentError
from agent.common.telemetry import log
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.storage.images import Image, ImageStore

_POLL_INTERVAL_S = 5.0  # cost of one poll: a stat of the default image's manifest


async def keep_prepared(settings: Settings, images: ImageStore, templates: Templates) -> None:
    """Build the templates of `templates.prepare` now, and whenever the default image changes.

    Returns only if no sizes are configured. A failed build is logged and not repeated before a sandbox needs the
    template: retries would exhaust a host that is short of memory or disk.

    :raises ExceptionGroup: unexpected errors of some templates; all others were built.
    """
    last = ""
    while settings.templates.prepare:
        try:
            image = await asyncio.to_thread(images.get, settings.images.default_image)
        except AgentError as error:
            if error.message != last:
                log.error("no image to build templates of", reason=error.message)
            last = error.message
        else:
            if image.digest != last:
                await _prepare(settings, image, templates)
            last = image.digest
        await asyncio.sleep(_POLL_INTERVAL_S)


async def _prepare(settings: Settings, image: Image, templates: Templates) -> None:
    """Build one template after another, since each build keeps all CPUs of its guest busy."""
    failures = []
    for memory_bytes in settings.templates.prepare:
        try:
            await templates.get(image, settings.sandbox.default_vcpus, memory_bytes)
        except AgentError as error:
            log.error("cannot prewarm a template", memory_bytes=memory_bytes, error=error.message)
        except Exception as error:  # noqa: BLE001  raised below
            failures.append(error)
    if failures:
        raise ExceptionGroup("templates cannot be prewarmed", failures)

"""Keeps the templates of the configured sizes ready: made when the agent starts, and again after the image was built
anew.
"""

from __future__ import annotations

import asyncio

from agent.common.config.settings import Settings
from agent.common.errors import AgentError
from agent.common.telemetry import log
from agent.daemon.sandbox.templates.catalog import Templates
from agent.daemon.storage.images import Image, ImageStore

_LOOK_INTERVAL_S = 5.0  # at the default image: a stat of its manifest


async def keep_prepared(settings: Settings, images: ImageStore, templates: Templates) -> None:
    """Makes the templates of `templates.prepare` whenever the default image is another than at the last look.

    Returns only if there is nothing to prepare. What fails is logged and left to the first sandbox that needs it: to
    try again and again would wear out a host that is short of something.

    :raises ExceptionGroup: unexpected errors of some templates; all others were made.
    """
    last = ""
    while settings.templates.prepare:
        try:
            image = await asyncio.to_thread(images.get, settings.images.default_image)
        except AgentError as error:
            if error.message != last:
                log.error("no image to prepare templates of", reason=error.message)
            last = error.message
        else:
            if image.digest != last:
                await _prepare(settings, image, templates)
            last = image.digest
        await asyncio.sleep(_LOOK_INTERVAL_S)


async def _prepare(settings: Settings, image: Image, templates: Templates) -> None:
    """One after another: each takes all the CPUs that its guest has."""
    failures = []
    for memory_bytes in settings.templates.prepare:
        try:
            await templates.get(image, settings.sandbox.default_vcpus, memory_bytes)
        except AgentError as error:
            log.error("cannot prepare a template", memory_bytes=memory_bytes, error=error.message)
        except Exception as error:  # noqa: BLE001  raised below
            failures.append(error)
    if failures:
        raise ExceptionGroup("templates cannot be prepared", failures)

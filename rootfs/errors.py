"""The error that the image builder raises on purpose."""

from __future__ import annotations


class BuildError(Exception):
    """The image cannot be built; the message says why and what to do about it."""

"""Types that the parameters of several methods share. A value that does not fit is rejected before a handler runs."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from agent.gateway.jsonrpc.messages import Params

Id = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]  # a safe integer of JavaScript
Port = Annotated[int, Meta(ge=1, le=65535)]
Mode = Annotated[int, Meta(ge=0, le=0o177777)]  # with the bits of the file type
Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Owner = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]
TimeValue = str | float  # ISO 8601, or seconds since 1970


class NoParams(Params):
    """No parameters."""

"""Parameters of the methods on the network."""

from __future__ import annotations

from typing import Literal

import msgspec

from agent.gateway.jsonrpc.messages import Params
from agent.gateway.methods.params.common import Id, Port


class Fetch(Params):
    """Parameters of fetch."""

    url: str
    method: str = "GET"
    headers: list[tuple[str, str]] = msgspec.field(default_factory=list)
    redirect: Literal["follow", "manual", "error"] = "follow"
    abort_id: Id | None = None
    body_stream_id: Id | None = None
    pid: Id | None = None


class Expose(Params):
    """Parameters of exposeHttp: a port, or a process whose listening port is exposed."""

    domain: str
    port: Port | None = None
    pid: Id | None = None

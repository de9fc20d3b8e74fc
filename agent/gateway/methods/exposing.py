"""The method exposeHttp: says where a domain leads that was asked for before, by REST."""

from __future__ import annotations

from agent.gateway.errors import Failure
from agent.gateway.jsonrpc import schema
from agent.gateway.jsonrpc.connection import Connection, method


@method("exposeHttp", schema.Expose)
async def expose_http(connection: Connection, params: schema.Expose) -> object:
    """Leads a domain to a port, or to whatever a process listens on."""
    attachment = connection.attachment
    if params.port is not None:
        attachment.exposures.bind(params.domain, attachment.id, port=params.port)
    elif params.pid is not None:
        process_id = await attachment.process_id(params.pid)
        attachment.exposures.bind(params.domain, attachment.id, process_id=process_id)
    else:
        raise Failure("TypeError", "port or pid must be given")
    return None

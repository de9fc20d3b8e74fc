"""The methods on the sandbox's environment, which processes get that start later."""

from __future__ import annotations

from agent.gateway.jsonrpc import schema
from agent.gateway.jsonrpc.connection import Connection, method
from agent.gateway.jsonrpc.session import USER
from sandboxd.v1 import process_pb2 as pb


async def _variables(connection: Connection) -> dict[str, str]:
    request = pb.GetEnvironmentRequest(sandbox_id=connection.attachment.id, user=USER)
    return dict((await connection.attachment.api.processes.GetEnvironment(request)).variables)


@method("envGet", schema.Key)
async def get(connection: Connection, params: schema.Key) -> object:
    """A variable's value; null if it is not set."""
    return (await _variables(connection)).get(params.key)


@method("envToObject", schema.Nothing)
async def to_object(connection: Connection, params: schema.Nothing) -> object:  # noqa: ARG001  as all handlers
    """All variables."""
    return await _variables(connection)


@method("envSet", schema.KeyValue)
async def set_variable(connection: Connection, params: schema.KeyValue) -> object:
    """Sets a variable."""
    request = pb.UpdateEnvironmentRequest(sandbox_id=connection.attachment.id, set={params.key: params.value})
    await connection.attachment.api.processes.UpdateEnvironment(request)
    return None


@method("envDelete", schema.Key)
async def delete(connection: Connection, params: schema.Key) -> object:
    """Removes a variable."""
    request = pb.UpdateEnvironmentRequest(sandbox_id=connection.attachment.id, remove=[params.key])
    await connection.attachment.api.processes.UpdateEnvironment(request)
    return None

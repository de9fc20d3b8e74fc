"""The methods that run Deno in the sandbox: programs, watched programs, REPLs, and VS Code beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import uuid
from collections.abc import Callable

import grpc

from agent.common.api_client import reason_of
from agent.gateway.errors import Failure, process_gone
from agent.gateway.jsonrpc import schema
from agent.gateway.jsonrpc.connection import Connection, method
from agent.gateway.jsonrpc.session import USER, Attachment
from agent.gateway.jsonrpc.streams import notification
from agent.gateway.methods.files import make_temp
from agent.gateway.methods.processes import Child, send_signal, start, wait_for
from agent.gateway.methods.repl import Repl
from agent.gateway.nodes.guest_tcp import GuestStream
from sandboxd.v1 import file_pb2, network_pb2

_RUN = ("deno", "run", "--allow-all")
_REPL = ("deno", "repl", "--allow-all", "--quiet", "--json")
# What `deno run --watch` writes to stderr when it restarts: since 2.9 at the latest, and before.
_RESTARTED = re.compile(rb"Restarting! File change detected|File change detected! Restarting!")
_RESTARTED_BYTES = 40
_CLOSE_GRACE_S = 2.0
_VSCODE_PORTS = (32000, 60000)
_VSCODE = "code-server"
_VSCODE_SETTINGS = ".local/share/code-server/User/settings.json"


# -- programs ----------------------------------------------------------------------------------------------------------


@method("spawnDeno", schema.SpawnDeno)
async def spawn_deno(connection: Connection, params: schema.SpawnDeno) -> object:
    """Runs a program, given by its file or as code."""
    folder = ""
    if params.entrypoint is not None:
        target = params.entrypoint
    elif params.code is not None:
        folder = await make_temp(connection, schema.TempOptions(prefix="deno-"), directory=True)
        target = f"{folder}/main.{params.extension or 'ts'}"
        await _write(connection.attachment, target, params.code)
    else:
        raise Failure("TypeError", "entrypoint or code must be given")
    watcher = str(uuid.uuid4()) if params.watch else None
    argv = [*_RUN, *_watch_options(params.watch), target, *(params.script_args or [])]
    child = await start(connection, argv, params, on_stderr=_restart_notices(connection, watcher) if watcher else None)
    if folder:
        connection.spawn(_remove_after(connection, child, folder))
    return {**child.describe(), "watcherId": watcher}


def _watch_options(watch: bool | list[str] | None) -> list[str]:
    if not watch:
        return []
    paths = "" if watch is True else ",".join(path.replace(",", ",,") for path in watch)
    return [f"--watch={paths}" if paths else "--watch", "--no-clear-screen"]


async def _write(attachment: Attachment, path: str, text: str) -> None:
    begin = file_pb2.WriteFileRequest.Open(sandbox_id=attachment.id, path=path, user=USER, make_parents=True)
    requests = [file_pb2.WriteFileRequest(open=begin)]
    data = text.encode()
    requests += [file_pb2.WriteFileRequest(data=data[at : at + (256 << 10)]) for at in range(0, len(data), 256 << 10)]
    await attachment.api.files.WriteFile(iter(requests))


def _restart_notices(connection: Connection, watcher: str) -> Callable[[bytes], None]:
    """Returns what sees the program's stderr, and tells the client of each restart."""
    tail = b""

    def look(data: bytes) -> None:
        nonlocal tail
        text, seen = tail + data, 0
        for match in _RESTARTED.finditer(text):
            seen = match.end()
            connection.spawn(connection.send(notification("$sandbox.deno.watcher.restart", watcherId=watcher)))
        tail = text[seen:][-_RESTARTED_BYTES:]

    return look


async def _remove_after(connection: Connection, child: Child, folder: str) -> None:
    attachment = connection.attachment
    with contextlib.suppress(Failure, grpc.aio.AioRpcError, asyncio.CancelledError):
        await asyncio.shield(child.exit)
        request = file_pb2.RemoveRequest(sandbox_id=attachment.id, path=folder, recursive=True, user=USER)
        await attachment.api.files.Remove(request)


@method("denoHttpWait", schema.Pid)
async def http_wait(connection: Connection, params: schema.Pid) -> object:
    """Whether a program listens, once it does; false if it ends first."""
    attachment = connection.attachment
    if params.pid in attachment.repls:  # asked for every REPL, which is no server
        await wait_for(connection, params.pid)
        return False
    return await listener(attachment, params.pid) is not None


async def listener(attachment: Attachment, pid: int) -> network_pb2.Listener | None:
    """Returns where a process listens, once it does; None if it ends first. :raises Failure: there is none."""
    request = network_pb2.WaitForListenerRequest(sandbox_id=attachment.id, process_id=await attachment.process_id(pid))
    try:
        return await attachment.api.network.WaitForListener(request)
    except grpc.aio.AioRpcError as error:
        if reason_of(error) == "PROCESS_EXITED":
            return None
        raise


# -- REPLs -------------------------------------------------------------------------------------------------------------


@method("spawnDenoRepl", schema.SpawnRepl)
async def spawn_repl(connection: Connection, params: schema.SpawnRepl) -> object:
    """Starts a REPL."""
    attachment = connection.attachment
    script_args = ["--", *params.script_args] if params.script_args else []
    child = await start(connection, [*_REPL, *script_args], params, channel=True)
    repl = Repl(child.pid, await GuestStream.channel(attachment.api, attachment.id, child.process_id))
    attachment.repls[child.pid] = repl
    connection.spawn(_forget_after(attachment, child, repl))
    return child.describe()


async def _forget_after(attachment: Attachment, child: Child, repl: Repl) -> None:
    try:
        with contextlib.suppress(Failure, asyncio.CancelledError):
            await asyncio.shield(child.exit)
    finally:
        repl.close()
        if attachment.repls.get(child.pid) is repl:
            del attachment.repls[child.pid]


def _repl(connection: Connection, pid: int) -> Repl:
    repl = connection.attachment.repls.get(pid)
    if repl is None:
        raise process_gone(pid)
    return repl


@method("denoReplEval", schema.ReplEval)
async def repl_eval(connection: Connection, params: schema.ReplEval) -> object:
    """The value of a snippet."""
    return await _repl(connection, params.pid).evaluate(params.code)


@method("denoReplCall", schema.ReplCall)
async def repl_call(connection: Connection, params: schema.ReplCall) -> object:
    """What a function returns."""
    return await _repl(connection, params.pid).call(params.fn, params.args)


@method("denoReplClose", schema.Pid)
async def repl_close(connection: Connection, params: schema.Pid) -> object:
    """Ends a REPL; one that is busy is ended by a signal."""
    await _repl(connection, params.pid).exit()
    try:
        async with asyncio.timeout(_CLOSE_GRACE_S):
            await wait_for(connection, params.pid)
    except TimeoutError:
        with contextlib.suppress(Failure):
            await send_signal(connection.attachment, params.pid, "SIGKILL")
    return None


# -- VS Code -----------------------------------------------------------------------------------------------------------


@method("vscode", schema.Vscode)
async def vscode(connection: Connection, params: schema.Vscode) -> object:
    """Starts code-server, for images that have it."""
    port = _VSCODE_PORTS[0] + secrets.randbelow(_VSCODE_PORTS[1] - _VSCODE_PORTS[0])
    argv = [
        _VSCODE, "--bind-addr", f"127.0.0.1:{port}", "--auth", "none", "--disable-telemetry", "--disable-update-check",
        params.path,
    ]  # fmt: skip
    try:
        for extension in params.extensions:
            installing = await start(
                connection, [_VSCODE, "--install-extension", extension], schema.Start(stdout="null", stderr="null")
            )
            await wait_for(connection, installing.pid)
        if params.editor_settings:
            await _write(connection.attachment, _VSCODE_SETTINGS, json.dumps(params.editor_settings))
        child = await start(connection, argv, schema.Start(env=params.env))
    except grpc.aio.AioRpcError as error:
        if reason_of(error) == "EXEC_NOT_FOUND":
            raise Failure(
                "NotFound", f"this sandbox's image has no {_VSCODE}, which VS Code in a browser needs: add it to the "
                "image, or use a volume as root that has it", code="ENOENT",
            ) from None  # fmt: skip
        raise
    return {**child.describe(), "port": port}

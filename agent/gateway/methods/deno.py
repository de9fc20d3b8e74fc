"""Methods that run Deno in the sandbox (programs, watched programs, REPLs), and code-server."""

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
from agent.gateway.errors import CallError, process_gone
from agent.gateway.jsonrpc.child_process import ChildProcess
from agent.gateway.jsonrpc.connection import RpcConnection
from agent.gateway.jsonrpc.messages import notification
from agent.gateway.methods.files import file_fields, make_temp
from agent.gateway.methods.network import wait_for_listener
from agent.gateway.methods.params import path_params, process_params
from agent.gateway.methods.processes import send_signal, start_process, wait_for_exit
from agent.gateway.nodes.guest_repl import GuestRepl
from agent.gateway.nodes.guest_stream import GuestStream
from agent.gateway.sandboxes.session import Session
from sandboxd.v1 import file_pb2

_RUN = ("deno", "run", "--allow-all")
_REPL = ("deno", "repl", "--allow-all", "--quiet", "--json")
# Written by `deno run --watch` to stderr at a restart; the first form by 2.9, the second by older releases.
_RESTARTED = re.compile(rb"Restarting! File change detected|File change detected! Restarting!")
_NOTICE_BYTES = 40  # a notice may be split over two pieces of output
_CLOSE_GRACE_S = 2.0
_WRITE_BYTES = 256 << 10
_VSCODE_PORTS = range(32000, 60000)
_CODE_SERVER = "code-server"
_VSCODE_SETTINGS = ".local/share/code-server/User/settings.json"


# -- programs ----------------------------------------------------------------------------------------------------------


async def spawn_deno(connection: RpcConnection, params: process_params.SpawnDeno) -> object:
    """Run a program, given as a file or as source code."""
    folder = ""
    if params.entrypoint is not None:
        target = params.entrypoint
    elif params.code is not None:
        folder = await make_temp(connection, path_params.TempOptions(prefix="deno-"), directory=True)
        target = f"{folder}/main.{params.extension or 'ts'}"
        await _write_text(connection, target, params.code)
    else:
        raise CallError("TypeError", "entrypoint or code must be given")
    watcher = str(uuid.uuid4()) if params.watch else None
    argv = [*_RUN, *_watch_options(params.watch), target, *(params.script_args or [])]
    on_stderr = _restart_notifier(connection, watcher) if watcher else None
    child = await start_process(connection, argv, params, on_stderr=on_stderr)
    if folder:
        connection.spawn(_remove_after(connection, child, folder))
    return {**child.to_json(), "watcherId": watcher}


def _watch_options(watch: bool | list[str] | None) -> list[str]:
    if not watch:
        return []
    paths = "" if watch is True else ",".join(path.replace(",", ",,") for path in watch)
    return [f"--watch={paths}" if paths else "--watch", "--no-clear-screen"]


async def _write_text(connection: RpcConnection, path: str, text: str) -> None:
    opening = file_pb2.WriteFileRequest.Open(**file_fields(connection), path=path, make_parents=True)
    requests = [file_pb2.WriteFileRequest(open=opening)]
    data = text.encode()
    for start in range(0, len(data), _WRITE_BYTES):
        requests.append(file_pb2.WriteFileRequest(data=data[start : start + _WRITE_BYTES]))
    await connection.session.api.files.WriteFile(iter(requests))


def _restart_notifier(connection: RpcConnection, watcher: str) -> Callable[[bytes], None]:
    """Return a function that takes pieces of stderr, and notifies the client of each restart of the program."""
    tail = b""

    def search(data: bytes) -> None:
        nonlocal tail
        text, end = tail + data, 0
        for match in _RESTARTED.finditer(text):
            end = match.end()
            connection.spawn(connection.send(notification("$sandbox.deno.watcher.restart", watcherId=watcher)))
        tail = text[end:][-_NOTICE_BYTES:]

    return search


async def _remove_after(connection: RpcConnection, child: ChildProcess, folder: str) -> None:
    with contextlib.suppress(CallError, grpc.aio.AioRpcError, asyncio.CancelledError):
        await asyncio.shield(child.exit)
        request = file_pb2.RemoveRequest(**file_fields(connection), path=folder, recursive=True)
        await connection.session.api.files.Remove(request)


async def http_wait(connection: RpcConnection, params: process_params.Pid) -> object:
    """Wait until a program listens on a port; return false if it exits first."""
    session = connection.session
    if params.pid in session.repls:  # the SDKs call this for each REPL, which is not a server
        await wait_for_exit(connection, params.pid)
        return False
    return await wait_for_listener(session, params.pid) is not None


# -- REPLs -------------------------------------------------------------------------------------------------------------


async def spawn_repl(connection: RpcConnection, params: process_params.SpawnRepl) -> object:
    """Start a REPL."""
    session = connection.session
    script_args = ["--", *params.script_args] if params.script_args else []
    child = await start_process(connection, [*_REPL, *script_args], params, channel=True)
    channel = await GuestStream.channel(session.api, session.sandbox_id, child.process_id)
    repl = GuestRepl(child.pid, channel)
    session.repls[child.pid] = repl
    connection.spawn(_close_after(session, child, repl))
    return child.to_json()


async def _close_after(session: Session, child: ChildProcess, repl: GuestRepl) -> None:
    try:
        with contextlib.suppress(CallError, asyncio.CancelledError):
            await asyncio.shield(child.exit)
    finally:
        repl.close()
        if session.repls.get(child.pid) is repl:
            del session.repls[child.pid]


def _repl(connection: RpcConnection, pid: int) -> GuestRepl:
    repl = connection.session.repls.get(pid)
    if repl is None:
        raise process_gone(pid)
    return repl


async def repl_eval(connection: RpcConnection, params: process_params.ReplEval) -> object:
    """Evaluate a snippet and return its value."""
    return await _repl(connection, params.pid).evaluate(params.code)


async def repl_call(connection: RpcConnection, params: process_params.ReplCall) -> object:
    """Call a function and return its result."""
    return await _repl(connection, params.pid).call(params.fn, params.args)


async def repl_close(connection: RpcConnection, params: process_params.Pid) -> object:
    """Ask a REPL to exit; kill one that is still busy after 2 s."""
    await _repl(connection, params.pid).exit()
    try:
        async with asyncio.timeout(_CLOSE_GRACE_S):
            await wait_for_exit(connection, params.pid)
    except TimeoutError:
        with contextlib.suppress(CallError):
            await send_signal(connection.session, params.pid, "SIGKILL")
    return None


# -- VS Code -----------------------------------------------------------------------------------------------------------


async def vscode(connection: RpcConnection, params: process_params.Vscode) -> object:
    """Start code-server, if the image has it."""
    port = secrets.choice(_VSCODE_PORTS)
    argv = [
        _CODE_SERVER, "--bind-addr", f"127.0.0.1:{port}", "--auth", "none", "--disable-telemetry",
        "--disable-update-check", params.path,
    ]  # fmt: skip
    try:
        for extension in params.extensions:
            installing = await start_process(
                connection,
                [_CODE_SERVER, "--install-extension", extension],
                process_params.StartProcess(stdout="null", stderr="null"),
            )
            await wait_for_exit(connection, installing.pid)
        if params.editor_settings:
            await _write_text(connection, _VSCODE_SETTINGS, json.dumps(params.editor_settings))
        child = await start_process(connection, argv, process_params.StartProcess(env=params.env))
    except grpc.aio.AioRpcError as error:
        if reason_of(error) == "EXEC_NOT_FOUND":
            raise CallError(
                "NotFound", f"this sandbox's image has no {_CODE_SERVER}, which VS Code in a browser needs: add it to "
                "the image, or use a volume as root that has it", code="ENOENT",
            ) from None  # fmt: skip
        raise
    return {**child.to_json(), "port": port}

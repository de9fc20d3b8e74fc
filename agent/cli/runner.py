"""Registration of commands with Typer, and the run of one: errors become a message and an exit status."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, cast

import typer

from agent.cli import options
from agent.cli.connect import rpc_error
from agent.cli.errors import EXIT_INTERRUPTED, CliError, error_exit_status, print_error
from agent.common.errors import AgentError

_EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def _set_json(value: bool) -> bool:
    options.current().json |= value
    return value


def _set_address(value: str) -> str:
    options.current().address = value or options.current().address
    return value


# Global options that are also accepted after the command's name.
_COMMAND_OPTIONS = {
    "json_": (bool, False, typer.Option("--json", callback=_set_json, help="Print JSON only.")),
    "address_": (
        str, "",
        typer.Option(
            "--address", callback=_set_address, metavar="ADDRESS", help="Daemon address: unix:PATH or HOST:PORT."
        ),
    ),
}  # fmt: skip


def add_command(app: typer.Typer, function: Callable[..., Any], name: str | None = None, **settings: Any) -> None:
    """Add `function` to `app` as a command that also accepts --json and --address after its name.

    A coroutine function runs under `run_async`. The returned number is the exit status; None is 0.
    """
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for added in _COMMAND_OPTIONS:
            del values[added]
        result = function(**values)
        if inspect.iscoroutine(result):
            result = run_async(cast("Coroutine[Any, Any, int | None]", result))
        raise typer.Exit(result or 0)

    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in _COMMAND_OPTIONS.items()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=[*parameters, *extra])  # type: ignore[attr-defined]
    app.command(name, **settings)(command)


def run_async(work: Coroutine[Any, Any, int | None]) -> int:
    """Run `work` to its end and return the exit status, after printing its error if it failed.

    SIGTERM and SIGHUP cancel `work`, so that its cleanup runs; the status is then 128 + signal.
    """
    import asyncio

    signals: list[int] = []
    try:
        return asyncio.run(_supervised(work, signals)) or 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except asyncio.CancelledError:
        return 128 + (signals[0] if signals else signal.SIGINT)
    except BrokenPipeError:
        # The reader of stdout has left. Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except AgentError as error:
        print_error(error)
        return error_exit_status(error)


async def _supervised(work: Coroutine[Any, Any, int | None], signals: list[int]) -> int | None:
    """Await `work`, cancel it on SIGTERM or SIGHUP, and translate foreign errors to CliError."""
    import asyncio

    import grpc

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        signals.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) stays in force
            loop.add_signal_handler(number, stop, number)
    try:
        return await work
    except grpc.aio.AioRpcError as error:
        raise rpc_error(error) from error
    except UnicodeEncodeError:
        raise CliError("an argument is not valid UTF-8, which the API requires", reason="NOT_UTF8", status=2) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CliError(_os_error_message(error), reason="OS_ERROR") from error


def _os_error_message(error: OSError) -> str:
    """Return "PATH: REASON", or the reason alone if the error names no path."""
    path = os.fsdecode(error.filename) + ": " if isinstance(error.filename, str | bytes) else ""
    return f"{path}{error.strerror or error}"

"""Runs one command to its end and turns how it ended into an exit status; no traceback for what is foreseen."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from agent.cli.connect import described_address
from agent.cli.errors import INTERRUPTED, CliError, complain, from_rpc, status_of
from agent.common.errors import AgentError

_BROKEN_PIPE = 141  # 128 + SIGPIPE


def run(work: Coroutine[Any, Any, int | None]) -> int:
    """Returns the exit status of `work`. SIGTERM and SIGHUP cancel it, so that it restores what it changed."""
    stopped: list[int] = []
    try:
        return asyncio.run(_supervised(work, stopped)) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except asyncio.CancelledError:
        return 128 + (stopped[0] if stopped else signal.SIGINT)
    except BrokenPipeError:
        # Nobody reads: what is still buffered would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except AgentError as error:
        complain(error)
        return status_of(error)


async def _supervised(work: Coroutine[Any, Any, int | None], stopped: list[int]) -> int | None:
    import grpc

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        stopped.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) stays in force
            loop.add_signal_handler(number, stop, number)
    try:
        return await work
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, described_address()) from error
    except UnicodeEncodeError:
        raise CliError(
            "an argument is not UTF-8, which the API cannot carry there", reason="NOT_UTF8", status=2
        ) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CliError(describe_os_error(error), reason="OS_ERROR") from error


def describe_os_error(error: OSError) -> str:
    """Returns an error of this machine's kernel as "PATH: what"."""
    where = os.fsdecode(error.filename) + ": " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{error.strerror or error}"

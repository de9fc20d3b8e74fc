"""The output of a host program that runs for a moment: a version query, a trial boot."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from agent.common.aio import run_to_completion
from agent.daemon.host import process as host_process


@asynccontextmanager
async def stdout_of(argv: Sequence[str], *, stderr: int = subprocess.DEVNULL) -> AsyncIterator[asyncio.StreamReader]:
    """Start `argv`, yield a reader of its stdout, and kill the process at the end of the block.

    `asyncio.create_subprocess_exec` is not used: its `kill()` polls the child, which takes the wait status that
    asyncio's watcher waits for, too; whoever comes second reports "Unknown child process" and return code 255. A
    process of `agent.daemon.host.process` has one owner.

    :param stderr: a descriptor for its stderr, or one of subprocess's constants.
    :raises VmmError: the program cannot be started.
    """
    read_end, write_end = os.pipe()
    output = os.fdopen(read_end, "rb", buffering=0)
    try:
        process = await host_process.spawn(
            argv, netns=None, stderr_path=Path(os.devnull), output_fds=(write_end, stderr)
        )
    except BaseException:
        output.close()
        raise
    finally:
        os.close(write_end)
    try:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), output
        )
        try:
            yield reader
        finally:
            transport.close()
    finally:
        output.close()
        await run_to_completion(process.kill())

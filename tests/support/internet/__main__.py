"""`python -m tests.support.internet DIR IFACE`: the servers of the test internet, where every address is theirs."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from pathlib import Path

from tests.support.internet import names, services, web
from tests.support.internet.log import Log


def _watch(log: Log, interface: str) -> None:
    for facts in services.packets(interface):
        log.note("packet", **facts)


async def _main(directory: Path, interface: str) -> None:
    log = Log(directory / "log")
    threading.Thread(target=_watch, args=(log, interface), daemon=True).start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await names.serve(log)
    server = await services.serve(log, directory)
    serving = asyncio.create_task(web.serve(log, directory, stop))
    await asyncio.sleep(0.2)
    (directory / "ready").touch()
    await serving
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2]))

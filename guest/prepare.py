"""Makes a fresh guest ready to be cloned: everything that all sandboxes have in common is done, and every path that a
create and a first exec take has been taken once, so that what they read is in memory. Nothing writable stays mounted.
"""

from __future__ import annotations

import gc
import os

from guest import root
from guest.configure import Identity, configure_network
from guest.prewarm import Ahead
from guest.process_ops import DEFAULT_USER, ProcessOps
from guest.wire import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Call

# What people run first. Each brings its program, its libraries and what these read into the page cache.
_PROGRAMS = (
    ["/bin/true"],
    ["/bin/echo"],
    ["/bin/sh", "-c", "true"],
    ["/bin/bash", "-c", "true"],
    ["/bin/ls", "/"],
    ["/bin/cat", "/etc/passwd"],
    ["/usr/bin/env"],
    ["/usr/bin/sudo", "--version"],
    ["/usr/bin/python3", "-c", "pass"],
)


class Prepare:
    """Handler of sys.prepare."""

    def __init__(self, identity: Identity, processes: ProcessOps, ahead: Ahead) -> None:
        self._ahead = ahead
        self._identity = identity
        self._processes = processes

    async def prepare(self, call: Call) -> dict[str, object]:
        """sys.prepare: returns {} once the guest may be frozen; for a guest that is not configured."""
        if self._identity.configured:
            raise CallError("STATE", "the sandbox is configured already", "CONFIGURED")
        configure_network(call.req)
        self._identity.network_ready = True
        self._identity.disk = root.find_disk(str(call.req.get("data_disk_serial")))
        root.rehearse(self._identity.disk)
        for argv in _PROGRAMS:
            if os.access(argv[0], os.X_OK):
                await self._run({"argv": argv})
        await self._run({"argv": ["/bin/true"], "tty": {"rows": 24, "cols": 80}})
        await self._run({"argv": ["/bin/true"], "user": "root", "stdin": "pipe"})
        self._processes.registry.start_again()
        gc.collect()
        gc.freeze()
        if call.req.get("emulated") and os.cpu_count() != 1:
            self._ahead.fork(DEFAULT_USER)
        return {}

    async def _run(self, req: dict[str, object]) -> None:
        process = self._processes.launch(req)
        while process.exit is None:
            await process.exited.wait()
        while not process.log.finished:
            await process.log.grown.wait()
        self._processes.registry.forget(process)

"""Prepare a guest for its template (sys.prepare).

Does the configuration that all clones share, and runs the code paths of a create and a first exec once, so that the
files they need are in the page cache. Unmounts everything writable.
"""

from __future__ import annotations

import gc
import os

from guest import root
from guest.configure import Configurator, configure_network
from guest.prewarm import Prewarmer
from guest.process_ops import DEFAULT_USER, ProcessOps
from guest.wire import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Call

# Commonly run first: loads each program, its libraries and their files into the page cache.
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


class Preparer:
    """Handler of sys.prepare."""

    def __init__(self, configurator: Configurator, processes: ProcessOps, prewarmer: Prewarmer) -> None:
        self._prewarmer = prewarmer
        self._configurator = configurator
        self._processes = processes

    async def prepare(self, call: Call) -> dict[str, object]:
        """Serve sys.prepare: return {} once the snapshot can be taken.

        :raises CallError: the guest is configured already.
        """
        if self._configurator.configured:
            raise CallError("STATE", "the sandbox is configured already", "CONFIGURED")
        configure_network(call.req)
        self._configurator.network_ready = True
        self._configurator.disk = root.find_disk(str(call.req.get("data_disk_serial")))
        root.warm_up_mounts(self._configurator.disk)
        for argv in _PROGRAMS:
            if os.access(argv[0], os.X_OK):
                await self._run({"argv": argv})
        await self._run({"argv": ["/bin/true"], "tty": {"rows": 24, "cols": 80}})
        await self._run({"argv": ["/bin/true"], "user": "root", "stdin": "pipe"})
        self._processes.registry.restart_numbers()
        gc.collect()
        gc.freeze()
        if call.req.get("emulated") and os.cpu_count() != 1:
            self._prewarmer.fork(DEFAULT_USER)
        return {}

    async def _run(self, req: dict[str, object]) -> None:
        process = self._processes.launch(req)
        while process.exit is None:
            await process.exited.wait()
        while not process.log.finished:
            await process.log.grown.wait()
        self._processes.registry.forget(process)

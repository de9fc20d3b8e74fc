"""PID 1 of the guest: mount file systems, bring up loopback, then serve the host's calls.

The phases in `main` are numbered, and each is one call. A failure is printed on the console and ends PID 1, which
panics the kernel; with panic=-1 that ends the VMM, so that the host notices at once.
"""

from __future__ import annotations

import gc
import os
import sys

from guest import interfaces, kernel, link, params, reactor, root, wire
from guest.configure import Configurator
from guest.dial import OPS as DIAL_OPS
from guest.files import OPS as FILE_OPS
from guest.oom import OomWatcher
from guest.prepare import Preparer
from guest.prewarm import Prewarmer
from guest.process import ProcessRegistry
from guest.process_ops import ProcessOps
from guest.stats import OPS as STATS_OPS
from guest.trust import Trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Call, Handler


def log(text: str) -> None:
    """Write a line to the console."""
    print(f"sandboxd-init: {text}", file=sys.stderr, flush=True)


def command_line_option(name: str, default: str) -> str:
    """Return the value of `name=value` on the kernel command line (/proc/cmdline), or `default` without one."""
    with open("/proc/cmdline") as file:
        for word in file.read().split():
            key, _, value = word.partition("=")
            if key == name:
                return value
    return default


class System:
    """All handlers of the guest, and the state that they share."""

    def __init__(self) -> None:
        self.registry = ProcessRegistry(OomWatcher())
        self.processes = ProcessOps(self.registry)
        self.configurator = Configurator(self.processes)
        self.trust = Trust(self.processes)
        self.prewarmer = Prewarmer()
        self.preparer = Preparer(self.configurator, self.processes, self.prewarmer)
        self.power_off_requested = False

    def handlers(self) -> dict[str, Handler]:
        """Return the handler of each operation."""
        return {
            "sys.hello": self.hello,
            "sys.prepare": self.preparer.prepare,
            "sys.configure": self.configurator.configure,
            "sys.refresh": self.configurator.refresh,
            "sys.clock": self.configurator.clock,
            "sys.trust": self.trust.trust,
            "sys.mount": self.mount,
            "sys.sync": self.sync,
            "sys.poweroff": self.power_off,
            **self.processes.handlers(),
            **FILE_OPS,
            **DIAL_OPS,
            **STATS_OPS,
        }

    async def hello(self, _call: Call) -> dict[str, object]:
        """Serve sys.hello: return version, PID and state of the guest's server."""
        return {
            "version": wire.VERSION, "pid": os.getpid(), "configured": self.configurator.configured,
            "python": sys.version.split()[0], "kernel": os.uname().release,
        }  # fmt: skip

    async def mount(self, call: Call) -> dict[str, object]:
        """Serve sys.mount {"serial", "path", "bytes"}: mount a volume."""
        root.mount_volume(str(call.req.get("serial")), params.path(call.req), params.number(call.req, "bytes"))
        return {}

    async def sync(self, _call: Call) -> dict[str, object]:
        """Serve sys.sync: write cached data to the disks (sync(2))."""
        os.sync()
        return {}

    async def power_off(self, _call: Call) -> dict[str, object]:
        """Serve sys.poweroff: answer, then power off the VM."""
        self.power_off_requested = True
        return {}


def serve(kind: str) -> None:
    """Run the server until the host asks for power-off."""
    system = System()
    reactor.spawn(system.registry.reap())
    handlers = system.handlers()
    on_host = system.prewarmer.start
    reactor.spawn(link.serve_vsock(handlers, on_host) if kind == "vsock" else link.serve_serial(handlers, on_host))
    gc.collect()
    gc.freeze()  # later collections skip the objects of now, which all stay
    log(f"serving on {kind}")
    reactor.run_until(lambda: system.power_off_requested)
    for _ in range(4):  # lets the answer to sys.poweroff be sent first
        reactor.run_once(wait=False)
    kernel.power_off()


def main() -> None:
    """Boot the guest and serve the host. Does not return."""
    os.umask(0o022)
    root.mount_boot_file_systems()  # 1
    interfaces.bring_up("lo")  # 2
    kind = command_line_option("sandboxd.link", "serial")  # 3
    serve(kind)  # 4

"""PID 1 of the guest: mounts, loopback, then a server for the host's calls, for ever.

Phases are numbered and each is one call. It ends only with the VM: a failure in a phase is printed on the console and
panics the kernel, which ends the VMM (panic=-1), so that the host sees it at once.
"""

from __future__ import annotations

import gc
import os
import sys

from guest import interfaces, kernel, link, params, reactor, root, wire
from guest.configure import Identity
from guest.dial import OPS as DIAL_OPS
from guest.files import OPS as FILE_OPS
from guest.oom import OomWatcher
from guest.prepare import Prepare
from guest.prewarm import Ahead
from guest.process import Registry
from guest.process_ops import ProcessOps
from guest.stats import OPS as STATS_OPS
from guest.trust import Trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Call, Handler


def log(text: str) -> None:
    """Writes a line on the console."""
    print(f"sandboxd-init: {text}", file=sys.stderr, flush=True)


def command_line_option(name: str, default: str) -> str:
    """Returns the value of `name=value` on the kernel's command line."""
    with open("/proc/cmdline") as file:
        for word in file.read().split():
            key, _, value = word.partition("=")
            if key == name:
                return value
    return default


class System:
    """Handlers that concern the whole guest."""

    def __init__(self) -> None:
        self.registry = Registry(OomWatcher())
        self.processes = ProcessOps(self.registry)
        self.identity = Identity(self.processes)
        self.trust = Trust(self.processes)
        self.ahead = Ahead()
        self.prepare = Prepare(self.identity, self.processes, self.ahead)
        self.power_off_asked = False

    def handlers(self) -> dict[str, Handler]:
        """Returns every operation of the guest."""
        return {
            "sys.hello": self.hello,
            "sys.prepare": self.prepare.prepare,
            "sys.configure": self.identity.configure,
            "sys.refresh": self.identity.refresh,
            "sys.clock": self.identity.clock,
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
        """sys.hello: says who answers."""
        return {
            "version": wire.VERSION, "pid": os.getpid(), "configured": self.identity.configured,
            "python": sys.version.split()[0], "kernel": os.uname().release,
        }  # fmt: skip

    async def mount(self, call: Call) -> dict[str, object]:
        """sys.mount: {"serial", "path", "bytes"}: mounts a volume."""
        root.mount_volume(str(call.req.get("serial")), params.path(call.req), params.number(call.req, "bytes"))
        return {}

    async def sync(self, _call: Call) -> dict[str, object]:
        """sys.sync: writes to the disks what is to be written."""
        os.sync()
        return {}

    async def power_off(self, _call: Call) -> dict[str, object]:
        """sys.poweroff: answers, then ends the VM."""
        self.power_off_asked = True
        return {}


def serve(kind: str) -> None:
    """Runs the server until the host asks for power-off."""
    system = System()
    reactor.spawn(system.registry.reap())
    handlers = system.handlers()
    on_host = system.ahead.start
    reactor.spawn(link.serve_vsock(handlers, on_host) if kind == "vsock" else link.serve_serial(handlers, on_host))
    gc.collect()
    gc.freeze()  # what is loaded now stays: do not look at it again
    log(f"serving on {kind}")
    reactor.run_until(lambda: system.power_off_asked)
    for _ in range(4):  # the answer to sys.poweroff leaves before the VM does
        reactor.run_once(wait=False)
    kernel.power_off()


def main() -> None:
    """Boots the guest. Never returns."""
    os.umask(0o022)
    root.mount_boot_file_systems()  # 1
    interfaces.bring_up("lo")  # 2
    kind = command_line_option("sandboxd.link", "serial")  # 3
    serve(kind)  # 4

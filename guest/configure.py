"""Configure the guest for its sandbox: entropy, clock, host name, addresses, writable root (sys.configure)."""

from __future__ import annotations

import base64
import os
import socket
import sys
import time

from guest import interfaces, kernel, reactor, root
from guest.process_ops import ProcessOps, parse_env
from guest.wire import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.call import Call

_MIN_ENTROPY_BYTES = 32
_REPORT_DELAY_S = 0.2


def _text(req: dict[str, object], name: str) -> str:
    value = req.get(name) or ""
    if not isinstance(value, str) or "\0" in value or "\n" in value:
        raise CallError("INVALID", f"{name} must be one line of text")
    return value


def _write(path: str, text: str) -> None:
    """Replace a file's contents, without a file object: that runs more code, which an emulated guest must translate."""
    data = text.encode()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, data)
        if os.fstat(fd).st_size > len(data):
            os.ftruncate(fd, len(data))
    finally:
        os.close(fd)


def _entropy(req: dict[str, object]) -> None:
    seed = base64.b64decode(_text(req, "entropy"), validate=True)
    if len(seed) < _MIN_ENTROPY_BYTES:
        raise CallError("INVALID", f"entropy must have at least {_MIN_ENTROPY_BYTES} bytes")
    kernel.add_entropy(seed)


def _clock(req: dict[str, object]) -> None:
    now = req.get("time_ns")
    if not isinstance(now, int) or now <= 0:
        raise CallError("INVALID", "time_ns must be nanoseconds since 1970")
    time.clock_settime_ns(time.CLOCK_REALTIME, now)


def _names(req: dict[str, object]) -> None:
    hostname = _text(req, "hostname")
    socket.sethostname(hostname)
    _write("/etc/hostname", f"{hostname}\n")
    _write("/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n::1 localhost ip6-localhost ip6-loopback\n")
    _write("/etc/machine-id", f"{_text(req, 'machine_id')}\n")


def configure_network(req: dict[str, object]) -> None:
    """Set the addresses and routes of the network card.

    :raises OSError: the kernel refused one.
    :raises CallError: a field of the request is malformed.
    """
    net = req.get("net")
    interface = interfaces.first_nic()
    if isinstance(net, dict) and interface:
        interfaces.configure_ipv4(interface, _text(net, "address"), _text(net, "gateway"))
        if _text(net, "address6") and os.path.exists("/proc/sys/net/ipv6"):
            interfaces.configure_ipv6(interface, _text(net, "address6"), _text(net, "gateway6"))


def _resolver(req: dict[str, object]) -> None:
    servers = req.get("dns")
    if isinstance(servers, list):
        _write("/etc/resolv.conf", "".join(f"nameserver {str(server)[:64]}\n" for server in servers))


_BEFORE_ROOT: tuple[tuple[str, Callable[[dict[str, object]], None]], ...] = (
    ("entropy", _entropy),
    ("clock", _clock),
)
_IN_ROOT: tuple[tuple[str, Callable[[dict[str, object]], None]], ...] = (
    ("names", _names),
    ("network", configure_network),
    ("resolver", _resolver),
)


async def _report_configured() -> None:
    """Write the first line of a clone's console (earlier ones are the template's); delayed, as consoles are slow."""
    await reactor.sleep(_REPORT_DELAY_S)
    print("sandboxd-init: configured", file=sys.stderr, flush=True)


class Configurator:
    """Handlers of sys.configure, which succeeds once per boot, sys.refresh and sys.clock."""

    def __init__(self, processes: ProcessOps) -> None:
        self.configured = False
        self.network_ready = False  # true in a clone whose template set the address: it is the same in all guests
        self.disk = ""  # device of the writable disk, if the template has looked it up
        self._processes = processes
        self._failed = ""

    async def configure(self, call: Call) -> dict[str, object]:
        """Serve sys.configure: return {"phases": [[name, milliseconds], ...]}.

        :raises CallError: the guest is configured already, or a phase failed: the guest cannot be used then.
        """
        if self.configured or self._failed:
            raise CallError("STATE", f"the sandbox is configured already {self._failed}".rstrip(), "CONFIGURED")
        env = parse_env(call.req.get("env") or {})
        phases: list[list[object]] = []
        for name, phase in (*_BEFORE_ROOT, ("root", self._root), *_IN_ROOT):
            if name == "network" and self.network_ready:
                continue
            start = time.perf_counter_ns()
            try:
                phase(call.req)
            except OSError as error:
                self._failed = f"(phase {name} failed)"
                raise CallError("INTERNAL", f"configuring {name}: {error}") from error
            phases.append([name, (time.perf_counter_ns() - start) / 1e6])
        self._processes.env = env
        self._processes.ready = self.configured = True
        reactor.spawn(_report_configured())
        return {"phases": phases}

    async def refresh(self, call: Call) -> dict[str, object]:
        """Serve sys.refresh after a pause: set entropy and clock; with "hostname" (in a fork), also the names."""
        if not self.configured:
            raise CallError("STATE", "the sandbox is not configured yet", "NOT_CONFIGURED")
        try:
            _entropy(call.req)
            _clock(call.req)
            if call.req.get("hostname"):
                _names(call.req)
        except OSError as error:
            raise CallError("INTERNAL", f"refreshing the guest: {error}") from error
        return {}

    async def clock(self, call: Call) -> dict[str, object]:
        """Serve sys.clock: set the wall clock."""
        _clock(call.req)
        return {}

    def _root(self, req: dict[str, object]) -> None:
        serial = _text(req, "data_disk_serial")
        if not serial:
            return
        device = self.disk or root.find_disk(serial)
        size = req.get("data_disk_bytes")
        if isinstance(size, int):
            root.wait_for_size(device, size)
        root.drop_cache(device)
        root.mount_writable_root(device, size if req.get("grow") and isinstance(size, int) else 0)

"""Guests without a virtual machine: a namespace that is wired to a sandbox's network where its VM would be.

The sandbox's side is the real one: namespace, rules, egress process. Only the tap is a veth, so that what is measured
or tried runs at the kernel's speed. Sockets of the guest are made in its namespace and used from the test's process.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import dns.message
import dns.rcode
import dns.rdatatype

from agent.common.background import Supervisor
from agent.common.config.daemon import PathSettings
from agent.common.config.egress import EgressSettings
from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.common.model import (
    GATEWAY_IPV4,
    GATEWAY_IPV6,
    GUEST_IPV4,
    GUEST_IPV6,
    GUEST_MAC,
    NetSpec,
    SandboxSpec,
    SecretSpec,
    State,
)
from agent.common.policy.reasons import Denial
from agent.common.policy.rules import parse_rules
from agent.common.telemetry import BACKGROUND_FAILING, BACKGROUND_FAILURES, LoopTelemetry
from agent.daemon.network.kernel import namespaces
from agent.daemon.network.operator_policy import OperatorPolicy
from agent.daemon.network.sandbox_network import SandboxNetwork
from agent.daemon.sandbox.machine.record_network import RecordNetwork
from agent.daemon.sandbox.state.denials import Denials
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.secrets.secret_store import SecretStore
from agent.daemon.storage.secrets.vault import Vault
from tests.support import leaks
from tests.support.internet.internet import Internet

GATEWAY = GATEWAY_IPV4.partition("/")[0]
_T = TypeVar("_T")
_numbers = iter(range(1, 1 << 30))


def _make_veth(guest: str) -> Callable[[str], None]:
    def make(name: str) -> None:
        words = [
            "ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "address", GUEST_MAC, "netns", guest,
        ]  # fmt: skip
        subprocess.run(words, check=True)

    return make


@dataclass
class Guest:
    """One guest: its sandbox's record, and the namespace that it is in."""

    net: GuestNet
    record: Record
    namespace: str
    denials: list[Denial] = field(default_factory=list)

    async def inside(self, work: Callable[[], _T]) -> _T:
        """Returns what `work` returns in the guest's namespace."""
        fd = namespaces.open_namespace(self.namespace)
        try:
            return await namespaces.run_in(fd, work, "do what a test does")
        finally:
            os.close(fd)

    async def make_socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        made = await self.inside(lambda: socket.socket(family, kind))
        made.setblocking(False)
        return made

    async def connect(self, address: str, port: int, timeout_s: float = 5.0) -> socket.socket:
        """Returns a connected socket of the guest's."""
        sock = await self.make_socket(socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(sock, (address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def ask(self, name: str, kind: str = "A", **options: Any) -> dns.message.Message:
        """Returns the sandbox's resolver's answer."""
        query = dns.message.make_query(name, kind, **options)
        sock = await self.make_socket(kind=socket.SOCK_DGRAM)
        with sock:
            loop = asyncio.get_running_loop()
            await loop.sock_sendto(sock, query.to_wire(), (GATEWAY, 53))
            async with asyncio.timeout(10):
                return dns.message.from_wire(await loop.sock_recv(sock, 65535))

    async def resolve(self, name: str, kind: str = "A") -> list[str]:
        """Returns the addresses that the guest is told."""
        answer = await self.ask(name, kind)
        return [str(record.address) for rrset in answer.answer for record in rrset if hasattr(record, "address")]

    async def open(
        self, host: str, port: int, *, tls: ssl.SSLContext | None = None, name: str = "", address: str = ""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Resolves and connects as a client would; `address` is dialled instead, if it is given."""
        target = address or (await self.resolve(host))[0]
        sock = await self.connect(target, port)
        if tls is None:
            return await asyncio.open_connection(sock=sock)
        return await asyncio.open_connection(sock=sock, ssl=tls, server_hostname=name or host)

    async def update(self, allow: Iterable[str] | None, **fields: Any) -> None:
        self.record.net = NetSpec(None if allow is None else parse_rules(allow, "allow"), **fields)
        await self.net.network.update(self.record)

    async def settle(self) -> dict[str, int]:
        """Returns the denials by reason once all that happened has been reported."""
        await asyncio.sleep(0.35)
        await self.net.network.count_drops(self.record.id)
        return dict(self.record.denials)

    def trust(self, internet: Internet, ca_pem: str = "") -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=internet.ca_file)
        if ca_pem:
            context.load_verify_locations(cadata=ca_pem)
        return context


@dataclass
class GuestNet:
    """A node's networks without its virtual machines."""

    network: RecordNetwork
    secrets: SecretStore
    internet: Internet
    directory: Path
    stack: AsyncExitStack
    guests: dict[str, Guest] = field(default_factory=dict)

    async def guest(
        self,
        allow: Iterable[str] | None = None,
        *,
        secrets: Mapping[str, tuple[SecretSpec, str]] | None = None,
        **net: Any,
    ) -> Guest:
        """Makes a guest; it is gone when the context ends."""
        given = secrets or {}
        specs = tuple(secret for secret, _ in given.values())
        spec = SandboxSpec("minimal", 1, 1 << 28, 1 << 30)
        number = next(_numbers)
        record = Record(f"sbx-{number:016d}", spec, State.RUNNING, 0.0)
        record.net = NetSpec(None if allow is None else parse_rules(allow, "allow"), **net)
        record.secrets = specs
        namespace = f"egg-{os.getpid()}-{number}"
        await asyncio.to_thread(subprocess.run, ["ip", "netns", "add", namespace], check=True)
        self.stack.callback(subprocess.run, ["ip", "netns", "delete", namespace], check=True)
        values = {name: value for name, (_, value) in given.items()}
        await self.secrets.store_secrets(record.id, record.secrets, values, inspect=record.net.inspect)
        self.stack.push_async_callback(self.secrets.release, record.id)
        vars(namespaces)["make_tap"] = _make_veth(namespace)  # restored by `guest_net`
        await self.network.make(record, self.stack)
        await asyncio.to_thread(_address, namespace)
        made = self.guests[record.id] = Guest(self, record, namespace)
        return made


def _address(namespace: str) -> None:
    for words in (
        ["addr", "add", GUEST_IPV4, "dev", "eth0"],
        ["addr", "add", GUEST_IPV6, "dev", "eth0", "nodad"],
        ["link", "set", "eth0", "up"],
        ["link", "set", "lo", "up"],
        ["route", "add", "default", "via", GATEWAY],
        ["route", "add", "default", "via", GATEWAY_IPV6.partition("/")[0]],
    ):
        subprocess.run(["ip", "-n", namespace, *words], check=True)


@asynccontextmanager
async def guest_net(internet: Internet, **egress: Any) -> AsyncIterator[GuestNet]:
    """Runs a node's networks, egress process included, on this internet."""
    directory = leaks.make_directory()
    given = {name.removeprefix("egress__"): value for name, value in internet.settings().items()}
    values = {**given, "resolvers": (given["resolvers"],), **egress}
    settings = Settings(
        paths=PathSettings(run_dir=directory / "run", state_dir=directory / "state"), egress=EgressSettings(**values)
    )
    (directory / "run").mkdir()
    make_tap = vars(namespaces)["make_tap"]
    paths = Paths.of(settings)
    supervisor = Supervisor(LoopTelemetry(BACKGROUND_FAILURES, BACKGROUND_FAILING))
    guests_by_id: dict[str, Guest] = {}

    def on_denial(record: Record, denial: Denial) -> None:
        if record.id in guests_by_id:
            guests_by_id[record.id].denials.append(denial)

    secrets, denials = SecretStore(Vault(paths.secrets)), Denials(on_denial)
    secrets.open()
    network = SandboxNetwork(settings, paths, secrets, denials, supervisor)
    by_record = RecordNetwork(network, OperatorPolicy.from_settings(settings.egress), denials)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        await network.start()
        stack.push_async_callback(network.aclose, keep=False)
        made = GuestNet(by_record, secrets, internet, directory, stack, guests_by_id)
        try:
            async with AsyncExitStack() as guests:
                made.stack = guests
                yield made
        finally:
            vars(namespaces)["make_tap"] = make_tap

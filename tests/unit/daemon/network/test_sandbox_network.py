"""The network of a sandbox over a fake kernel and a fake egress process: what is in force, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.common.background import Supervisor
from agent.common.config.egress import EgressSettings
from agent.common.config.paths import Paths
from agent.common.errors import HostError
from agent.common.model import NetSpec, SecretSpec
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import Denial, Reason
from agent.common.policy.rules import parse_rule, parse_rules
from agent.common.policy.secret import CaPair, EgressSecrets, Secret
from agent.daemon.network.kernel import namespaces
from agent.daemon.network.operator_policy import OperatorPolicy
from agent.daemon.network.sandbox_network import KernelState, SandboxNetwork
from tests.support.daemon_fakes import SilentObserver, settings

ID = "sbx-0000000000000001"
OPEN, CLOSED = Policy(), Policy(allow=())
SPEC = SecretSpec("KEY", (parse_rule("a.example"),), "mark")


class Kernel:
    """Rules are the allow list of the policy that was loaded last."""

    def __init__(self) -> None:
        self.loaded: object = None
        self.slots: dict[str, int] = {}
        self.listening: list[str] = []
        self.on_listen: Callable[[str], Awaitable[None]] | None = None

    async def setup(self, sandbox_id: str, policy: Policy, *, secrets: bool) -> list[Any]:
        await self.update(sandbox_id, policy, secrets=secrets)
        return []

    async def update(self, sandbox_id: str, policy: Policy, *, secrets: bool, present: str = "") -> None:
        self.loaded = policy.allow

    def slot(self, sandbox_id: str) -> int | None:
        return self.slots.get(sandbox_id)

    def restore(self, sandbox_id: str, slot: int | None) -> None:
        if slot is not None:
            self.slots[sandbox_id] = slot

    def digest(self, policy: Policy, *, secrets: bool) -> str:
        return f"{policy.allow} {secrets}"

    async def listen(self, sandbox_id: str) -> list[Any]:
        self.listening.append(sandbox_id)
        if self.on_listen is not None:
            await self.on_listen(sandbox_id)
        return []

    async def remove(self, sandbox_id: str) -> None:
        self.slots.pop(sandbox_id, None)


class Egress:
    def __init__(self) -> None:
        self.gone = False
        self.sandboxes: dict[str, str] = {}
        self.orders: list[tuple[str, dict[str, Any]]] = []

    async def wait_ready(self) -> None:
        if self.gone:
            raise HostError("the egress process does not run")

    async def call(self, op: str, fds: Any = (), /, **fields: Any) -> dict[str, Any]:
        await self.wait_ready()
        self.orders.append((op, fields))
        return {}


class Secrets:
    async def egress_secrets(self, sandbox_id: str, specs: tuple[SecretSpec, ...]) -> EgressSecrets:
        secrets = tuple(Secret(spec.name, spec.placeholder, "value", spec.hosts) for spec in specs)
        return EgressSecrets(secrets, CaPair("certificate", "key") if secrets else None)


class Sink:
    def __init__(self) -> None:
        self.counts: list[tuple[str, Reason, int]] = []
        self.denials: list[tuple[str, Denial]] = []

    def count(self, sandbox_id: str, reason: Reason, count: int) -> None:
        self.counts.append((sandbox_id, reason, count))

    def report(self, sandbox_id: str, denial: Denial) -> None:
        self.denials.append((sandbox_id, denial))


class Net:
    """A network whose kernel and egress process are fakes."""

    def __init__(self, directory: Path) -> None:
        chosen = settings(directory)
        self.kernel, self.egress, self.sink = Kernel(), Egress(), Sink()
        self.network = SandboxNetwork(chosen, Paths.of(chosen), Secrets(), self.sink, Supervisor(SilentObserver()))
        vars(self.network).update(_kernel=self.kernel, _egress=self.egress)


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Net:
    async def nothing(name: str) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(namespaces, "make", nothing)
    monkeypatch.setattr(namespaces, "remove", nothing)
    monkeypatch.setattr(namespaces, "pin", lambda name, pid: None)
    return Net(tmp_path)


async def test_the_egress_process_gets_policy_values_and_ca(net: Net) -> None:
    await net.network.make(ID, CLOSED, (SPEC,))
    ((op, order),) = net.egress.orders
    assert (op, order["sandbox"], order["sockets"]) == ("assign", ID, ())
    assert Policy.from_json(order["policy"]) == CLOSED
    assert [Secret.from_json(secret).value for secret in order["secrets"]] == ["value"]
    assert order["ca"] == {"certificate_pem": "certificate", "key_pem": "key"}
    assert "value" not in repr(vars(net.network)["_present"])  # read when they are sent, and not kept
    assert net.network.kernel_state(ID) == KernelState(None, "() True")


async def test_rules_of_the_kernel_are_put_back_while_no_egress_process_runs(net: Net) -> None:
    await net.network.make(ID, OPEN, ())
    net.egress.gone = True
    for policy in (CLOSED, OPEN):  # an update, and what undoes it
        with pytest.raises(HostError, match="does not run"):
            await net.network.update(ID, policy, ())
        assert net.kernel.loaded == policy.allow
        assert net.network.kernel_state(ID).rules == f"{policy.allow} False"


async def test_rules_are_unknown_once_the_kernel_fails(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    await net.network.make(ID, OPEN, ())

    async def refuse(*_: object, secrets: bool) -> None:
        raise HostError("no")

    monkeypatch.setattr(net.kernel, "update", refuse)
    with pytest.raises(HostError):
        await net.network.update(ID, CLOSED, ())
    assert net.network.kernel_state(ID) == KernelState(None, "")


async def test_an_adopted_sandbox_is_handed_over_unless_the_process_has_it(net: Net) -> None:
    await net.network.make(ID, CLOSED, (SPEC,))
    digest = net.egress.orders.pop()[1]["digest"]
    for known, handed in (({ID: digest}, False), ({ID: "other"}, True), ({}, True)):
        net.egress.sandboxes = known
        await net.network.adopt(ID, CLOSED, (SPEC,), KernelState(7, "old"), 1)
        assert bool(net.egress.orders) == handed == bool(net.kernel.listening)
        net.egress.orders.clear()
        net.kernel.listening.clear()
    assert net.network.kernel_state(ID) == KernelState(7, "() True")


async def test_a_sandbox_that_is_removed_meanwhile_is_not_handed_over(net: Net) -> None:
    other = ID.replace("1", "2")
    for one in (ID, other):
        await net.network.make(one, OPEN, ())
    net.egress.orders.clear()

    async def remove(sandbox_id: str) -> None:
        if sandbox_id == ID:
            await net.network.remove(ID)

    net.kernel.on_listen = remove
    await net.network._hand_over_all()
    assert [(op, order["sandbox"]) for op, order in net.egress.orders] == [("remove", ID), ("assign", other)]


async def test_reports_reach_the_sink(net: Net) -> None:
    net.network._on_report({
        "counts": [[ID, "host_not_allowed", 3]], "denials": [[ID, "host_not_allowed", "a.example", 443, "tls", 3]],
    })  # fmt: skip
    assert net.sink.counts == [(ID, Reason.HOST_NOT_ALLOWED, 3)]
    assert net.sink.denials == [(ID, Denial(Reason.HOST_NOT_ALLOWED, "a.example", 443, "tls", 3))]


def test_the_operators_rules_bound_those_of_a_sandbox() -> None:
    operator = OperatorPolicy.from_settings(
        EgressSettings(
            always=("mirror.example",), deny=("bad.example",), tenants={"acme": "*.example:443, 10.0.0.0/8"},
            permit_private=("10.1.0.0/16",), connections=5,
        )
    )  # fmt: skip
    policy = operator.effective(NetSpec(parse_rules(["a.example"], "x"), "acme", inspect=True))
    assert policy.ceiling == parse_rules(["*.example:443", "10.0.0.0/8"], "x")
    assert (policy.inspect, policy.limits.connections, str(policy.permitted[0])) == (True, 5, "10.1.0.0/16")
    assert policy.check_name("a.example", 443) is None
    assert policy.check_name("mirror.example", 80) is None
    assert policy.check_name("bad.example", 443) is Reason.DENIED_BY_OPERATOR
    assert operator.effective(NetSpec()).ceiling is None

"""The network of sandboxes, put together: namespace and rules, the egress process, and what their owners asked for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from agent.common.aio import run_to_completion
from agent.common.background import Supervisor
from agent.common.ca import LocalCa
from agent.common.config.egress import EgressSettings
from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.common.errors import AgentError, HostError
from agent.common.policy.addresses import parse_network
from agent.common.policy.policy import Policy, TrafficLimits
from agent.common.policy.reasons import Reason
from agent.common.policy.rules import parse_rules
from agent.common.policy.secret import Secret
from agent.common.telemetry import EGRESS_DENIALS, log, step
from agent.daemon.network.egress.client import EgressClient, order_digest
from agent.daemon.network.egress.supervisor import EgressFiles, EgressProcess, ExternalEgress, ManagedEgress
from agent.daemon.network.kernel import namespaces
from agent.daemon.network.kernel.network import Networks
from agent.daemon.sandbox.state.events import Denial
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.secrets.vault import CaPair, Held, Vault
from agent.egress.control_protocol import SOCKETS


def policy_of(settings: EgressSettings, record: Record) -> Policy:
    """Returns what a sandbox may reach: the caller's list, held down by the operator's settings."""
    net = record.net
    ceiling = settings.tenants.get(net.tenant)
    return Policy(
        allow=None if net.allow is None else parse_rules(net.allow, "allow"),
        always=parse_rules(settings.always, "egress.always"),
        ceiling=None if ceiling is None else parse_rules(_words(ceiling), f"egress.tenants.{net.tenant}"),
        deny=parse_rules(settings.deny, "egress.deny"),
        permitted=tuple(parse_network(text) for text in settings.permit_private),
        inspect=net.inspect,
        limits=TrafficLimits(settings.connections, settings.connections_per_s, settings.bytes_per_s),
    )


def _words(text: str) -> Iterable[str]:
    return (word.strip() for word in text.split(",") if word.strip())


class SandboxNetwork:
    """Makes, changes and removes the networks of sandboxes; see `agent.daemon.sandbox.machine.host_services.Network`.

    :param on_denial: called with the record and each denial that has details.
    """

    def __init__(
        self,
        settings: Settings,
        paths: Paths,
        vault: Vault,
        supervisor: Supervisor,
        on_denial: Callable[[Record, Denial], None],
    ) -> None:
        self._settings = settings.egress
        self._networks = Networks(settings.egress, paths.uplink_marker)
        self._vault = vault
        egress = settings.egress
        process: EgressProcess = (
            ExternalEgress(egress, Path(egress.control))
            if egress.control
            else ManagedEgress(egress, EgressFiles(paths.run_dir))
        )
        self._egress = EgressClient(process, self._on_report, self._hand_over_all, supervisor)
        self._present: dict[str, Record] = {}
        self._on_denial = on_denial

    async def start(self) -> None:
        """Starts the egress process, or finds the one that an earlier agent left. :raises HostError:"""
        self._vault.open()
        await self._egress.start()

    async def settle(self) -> None:
        """Removes what an earlier agent left in the uplink and nobody needs; once all sandboxes are adopted.

        :raises HostError:
        """
        await self._networks.tear_down_unused()

    async def aclose(self, *, keep: bool) -> None:
        """Ends the watch over the egress process, which runs on where sandboxes are kept."""
        await self._egress.aclose(stop=not keep or not self._present)
        await self._networks.aclose()

    async def make(self, record: Record, stack: AsyncExitStack) -> None:
        """Makes namespace, rules and servers of a sandbox; `stack` removes them. :raises AgentError:"""
        with step("netns"):
            await self.make_bare(record.id, stack)
        with step("network"):
            policy = policy_of(self._settings, record)
            await self._egress.wait_ready()
            sockets = await self._networks.setup(record.id, policy, secrets=bool(record.secrets))
            record.slot = self._networks.slot(record.id)
            record.rules = self._networks.digest(policy, secrets=bool(record.secrets))
            self._present[record.id] = record
            try:
                with step("network.egress"):
                    await self._assign(record, policy, sockets)
            finally:
                for sock in sockets:
                    sock.close()

    async def make_bare(self, sandbox_id: str, stack: AsyncExitStack) -> None:
        """Makes a namespace with a tap that leads nowhere; `stack` removes it. :raises HostError:"""
        stack.push_async_callback(self.remove, sandbox_id)
        await run_to_completion(namespaces.make(sandbox_id))

    async def adopt(self, record: Record, vmm_pid: int) -> None:
        """Takes over the network of a sandbox, in which its VMM is, from an earlier agent. :raises AgentError:"""
        namespaces.pin(record.id, vmm_pid)
        self._networks.restore(record.id, record.slot)
        self._present[record.id] = record
        policy = policy_of(self._settings, record)
        # Rules as this agent would make them: its settings may be others than those of the agent before it.
        await self._networks.update(record.id, policy, secrets=bool(record.secrets), present=record.rules)
        record.slot = self._networks.slot(record.id)
        record.rules = self._networks.digest(policy, secrets=bool(record.secrets))
        await self._egress.wait_ready()
        order = await self._order(record, policy)
        if self._egress.sandboxes.get(record.id) != order["digest"]:
            await self._hand_over(record)

    async def update(self, record: Record) -> None:
        """Puts `record.net` and `record.secrets` into force. What they no longer allow ends. :raises AgentError:"""
        policy = policy_of(self._settings, record)
        record.rules = ""  # unknown, should what follows fail
        # The kernel first: its rules can be put back while the egress process is gone, which gets the record's policy
        # once it is there again.
        await self._networks.update(record.id, policy, secrets=bool(record.secrets))
        record.slot = self._networks.slot(record.id)
        record.rules = self._networks.digest(policy, secrets=bool(record.secrets))
        await self._egress.wait_ready()
        await self._assign(record, policy, ())

    async def remove(self, sandbox_id: str) -> None:
        """Removes all of a sandbox's network. Idempotent. :raises HostError:"""
        record = self._present.pop(sandbox_id, None)
        if record is not None:
            with contextlib.suppress(AgentError):
                await self.count_drops(record)
        with contextlib.suppress(HostError):  # an egress process that is gone has nothing of it
            await self._egress.call("remove", sandbox=sandbox_id)
        await self._networks.remove(sandbox_id)
        await namespaces.remove(sandbox_id)

    # -- secrets -------------------------------------------------------------------------------------------------------

    async def hold(self, record: Record, values: Mapping[str, str]) -> dict[str, str]:
        """See `agent.daemon.sandbox.machine.host_services.Network`."""
        held = await self._vault.get(record.id)
        kept = {}
        for secret in record.secrets:
            value = values.get(secret.name, held.values.get(secret.name))
            if value is None:
                raise HostError(f"the value of secret {secret.name} is lost; set it anew", reason="STATE_DAMAGED")
            kept[secret.name] = value
        ca = held.ca
        if ca is None and (record.secrets or record.net.inspect):
            made = await asyncio.to_thread(LocalCa.generate, record.id)
            ca = CaPair(made.certificate_pem, made.key_pem)
        if kept != dict(held.values) or ca is not held.ca:
            await self._vault.put(record.id, Held(kept, ca))
        return dict(held.values)

    async def inherit(self, sandbox_id: str, parent: str) -> None:
        """See `agent.daemon.sandbox.machine.host_services.Network`."""
        await self._vault.put(sandbox_id, await self._vault.get(parent))

    def fingerprint(self, values: Mapping[str, str]) -> str:
        """See `agent.daemon.sandbox.machine.host_services.Network`."""
        return self._vault.fingerprint(values)

    async def release(self, sandbox_id: str) -> None:
        """See `agent.daemon.sandbox.machine.host_services.Network`."""
        await self._vault.forget(sandbox_id)

    async def ca_certificate(self, record: Record) -> str:
        """See `agent.daemon.sandbox.machine.host_services.Network`."""
        ca = (await self._vault.get(record.id)).ca
        return "" if ca is None else ca.certificate_pem

    async def trust(self, record: Record) -> dict[str, object] | None:
        """See `agent.daemon.sandbox.machine.host_services.Network`."""
        ca = (await self._vault.get(record.id)).ca
        if ca is None:
            return None
        return {
            "certificate": ca.certificate_pem,
            "env": {secret.name: secret.placeholder for secret in record.secrets},
        }

    async def count_drops(self, record: Record) -> None:
        """Adds what the kernel's rules dropped since the last look to the record's denials. :raises HostError:"""
        for reason, count in (await self._networks.drops(record.id)).items():
            if count:
                record.denials[reason.value] = record.denials.get(reason.value, 0) + count
                EGRESS_DENIALS.labels(reason.value).inc(count)
                self._on_denial(record, Denial(reason, "", 0, "ip", count))

    # -- the egress process --------------------------------------------------------------------------------------------

    async def _order(self, record: Record, policy: Policy) -> dict[str, Any]:
        held = await self._vault.get(record.id)
        secrets = [
            Secret(
                name=secret.name, placeholder=secret.placeholder, value=held.values[secret.name],
                hosts=parse_rules(secret.hosts, secret.name), in_body=secret.in_body, redact=secret.redact,
            ).to_json()
            for secret in record.secrets
        ]  # fmt: skip
        ca = None
        if held.ca is not None:
            ca = {"certificate_pem": held.ca.certificate_pem, "key_pem": held.ca.key_pem}
        order: dict[str, Any] = {"policy": policy.to_json(), "secrets": secrets, "ca": ca}
        return {"sandbox": record.id, "digest": order_digest(order), **order}

    async def _assign(self, record: Record, policy: Policy, sockets: Iterable[Any]) -> None:
        order = await self._order(record, policy)
        listening = list(sockets)
        fds = [sock.fileno() for sock in listening]
        await self._egress.call("assign", fds, **order, sockets=SOCKETS[: len(fds)])

    async def _hand_over(self, record: Record) -> None:
        sockets = await self._networks.listen(record.id)
        try:
            await self._assign(record, policy_of(self._settings, record), sockets)
        finally:
            for sock in sockets:
                sock.close()

    async def _hand_over_all(self) -> None:
        """Gives a fresh egress process every sandbox; one that cannot be given has no way out until it is changed."""
        for record in list(self._present.values()):
            if record.id in self._egress.sandboxes:
                continue
            try:
                await self._hand_over(record)
            except AgentError as error:
                log.error("a sandbox has no way out", sandbox_id=record.id, error=error.message)

    def _on_report(self, report: dict[str, Any]) -> None:
        for sandbox_id, reason, count in report["counts"]:
            EGRESS_DENIALS.labels(Reason(reason).value).inc(count)
            record = self._present.get(sandbox_id)
            if record is not None:
                record.denials[reason] = record.denials.get(reason, 0) + count
        for sandbox_id, reason, host, port, protocol, count in report["denials"]:
            record = self._present.get(sandbox_id)
            if record is not None:
                self._on_denial(record, Denial(Reason(reason), str(host), int(port), str(protocol), int(count)))

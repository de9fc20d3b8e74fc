"""Networks of sandboxes: namespace and kernel rules of each, and its share in the egress process.

Callers pass values (id, effective policy, secrets without their values) and get values back; this module knows no
records and no vault. Secret values are read through `SecretSource` at the moment they are sent to the egress process,
and not kept.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.common.aio import run_to_completion
from agent.common.background import Supervisor
from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.common.errors import AgentError, HostError
from agent.common.model import SecretSpec
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import Denial, Reason
from agent.common.policy.secret import EgressSecrets
from agent.common.telemetry import log, step
from agent.daemon.network.egress.client import EgressClient, order_digest
from agent.daemon.network.egress.supervisor import EgressFiles, EgressProcess, ExternalEgress, ManagedEgress
from agent.daemon.network.kernel import namespaces
from agent.daemon.network.kernel.kernel_network import KernelNetwork
from agent.egress.control_protocol import SOCKETS


class SecretSource(Protocol):
    """Store of secret values; implemented by `agent.daemon.storage.secrets.secret_store`."""

    async def egress_secrets(self, sandbox_id: str, specs: tuple[SecretSpec, ...]) -> EgressSecrets:
        """Return the secrets of a sandbox with their values, and its CA.

        :raises HostError: they cannot be read.
        """


class DenialSink(Protocol):
    """Receiver of the denials that the egress process reports."""

    def count(self, sandbox_id: str, reason: Reason, count: int) -> None:
        """Count denials of a sandbox; the sandbox may be gone already."""

    def report(self, sandbox_id: str, denial: Denial) -> None:
        """Take the details of one denial, which `count` has counted or will count."""


@dataclass(frozen=True, slots=True)
class KernelState:
    """State of a sandbox's network in the kernel, to be stored for the daemon that adopts the sandbox.

    :param slot: index into the address pools; None if the sandbox is not routed to the uplink.
    :param rules: digest of the loaded nftables rules; "" if unknown.
    """

    slot: int | None = None
    rules: str = ""


@dataclass(slots=True)
class _Present:
    """A sandbox that has a network now; the policy is in force or being put into force."""

    policy: Policy
    secrets: tuple[SecretSpec, ...]
    rules: str = ""


class SandboxNetwork:
    """Makes, changes, adopts and removes the networks of sandboxes.

    :param secrets: read whenever a sandbox is handed to the egress process.
    :param denials: told of every denial that the egress process reports.
    """

    def __init__(
        self, settings: Settings, paths: Paths, secrets: SecretSource, denials: DenialSink, supervisor: Supervisor
    ) -> None:
        egress = settings.egress
        self._kernel = KernelNetwork(egress, paths.uplink_marker)
        process: EgressProcess = (
            ExternalEgress(egress, Path(egress.control))
            if egress.control
            else ManagedEgress(egress, EgressFiles(paths.run_dir))
        )
        self._egress = EgressClient(process, self._on_report, self._hand_over_all, supervisor)
        self._secrets = secrets
        self._denials = denials
        self._present: dict[str, _Present] = {}

    async def start(self) -> None:
        """Start the egress process, or adopt the one of an earlier daemon.

        :raises HostError: it does not start or does not answer.
        """
        await self._egress.start()

    async def remove_unused_uplink(self) -> None:
        """Remove the uplink's rules of an earlier daemon if no sandbox needs them; call it after all adoptions.

        :raises HostError: the kernel refused.
        """
        await self._kernel.tear_down_unused()

    async def aclose(self, *, keep: bool) -> None:
        """Stop monitoring the egress process; end it, too, unless `keep` and a sandbox is left."""
        await self._egress.aclose(stop=not keep or not self._present)
        await self._kernel.aclose()

    async def make(self, sandbox_id: str, policy: Policy, secrets: tuple[SecretSpec, ...]) -> None:
        """Make the namespace, rules, listening sockets and egress entry of a sandbox.

        :raises AgentError: the kernel or the egress process refused; `remove` removes what was made.
        """
        with step("netns"):
            await self.make_bare(sandbox_id)
        with step("network"):
            await self._egress.wait_ready()
            sockets = await self._kernel.setup(sandbox_id, policy, secrets=bool(secrets))
            rules = self._kernel.digest(policy, secrets=bool(secrets))
            present = self._present[sandbox_id] = _Present(policy, secrets, rules)
            try:
                with step("network.egress"):
                    await self._assign(sandbox_id, present, sockets)
            finally:
                _close(sockets)

    async def make_bare(self, sandbox_id: str) -> None:
        """Make a namespace whose tap has no connection to anything.

        :raises HostError: the kernel refused; nothing is left.
        """
        await run_to_completion(namespaces.make(sandbox_id))

    async def adopt(
        self, sandbox_id: str, policy: Policy, secrets: tuple[SecretSpec, ...], state: KernelState, vmm_pid: int
    ) -> None:
        """Take over the network that an earlier daemon made, and update it to the policy.

        :param state: `kernel_state` of the earlier daemon.
        :param vmm_pid: process in the sandbox's namespace, which pins the namespace again if its mount was lost.
        :raises AgentError: the kernel or the egress process refused.
        """
        namespaces.pin(sandbox_id, vmm_pid)
        self._kernel.restore(sandbox_id, state.slot)
        present = self._present[sandbox_id] = _Present(policy, secrets, state.rules)
        # The settings of this daemon may differ from those of the daemon before.
        await self._kernel.update(sandbox_id, policy, secrets=bool(secrets), present=state.rules)
        present.rules = self._kernel.digest(policy, secrets=bool(secrets))
        await self._egress.wait_ready()
        order = await self._order(sandbox_id, present)
        if self._egress.sandboxes.get(sandbox_id) != order["digest"]:
            await self._hand_over(sandbox_id, present)

    async def update(self, sandbox_id: str, policy: Policy, secrets: tuple[SecretSpec, ...]) -> None:
        """Put another policy and other secrets into force; connections that they no longer allow end.

        :raises AgentError: the kernel or the egress process refused. The kernel's rules may have changed, see
            `kernel_state`; an egress process that is started again gets the new policy.
        """
        present = self._present[sandbox_id]
        present.policy, present.secrets, present.rules = policy, secrets, ""
        # The kernel first: its rules can be put back while no egress process runs.
        await self._kernel.update(sandbox_id, policy, secrets=bool(secrets))
        present.rules = self._kernel.digest(policy, secrets=bool(secrets))
        await self._egress.wait_ready()
        await self._assign(sandbox_id, present, ())

    async def remove(self, sandbox_id: str) -> None:
        """Remove the whole network of a sandbox. Idempotent.

        :raises HostError: the kernel refused.
        """
        self._present.pop(sandbox_id, None)
        with contextlib.suppress(HostError):  # an egress process that is gone has no entry of the sandbox
            await self._egress.call("remove", sandbox=sandbox_id)
        await self._kernel.remove(sandbox_id)
        await namespaces.remove(sandbox_id)

    def kernel_state(self, sandbox_id: str) -> KernelState:
        """Return the state that `adopt` of the next daemon needs."""
        present = self._present.get(sandbox_id)
        return KernelState(self._kernel.slot(sandbox_id), "" if present is None else present.rules)

    async def take_drops(self, sandbox_id: str) -> dict[Reason, int]:
        """Return the number of packets that the kernel's rules dropped since the last call, by reason.

        :raises HostError: the counters cannot be read.
        """
        return await self._kernel.take_drops(sandbox_id)

    # -- the egress process --------------------------------------------------------------------------------------------

    async def _order(self, sandbox_id: str, present: _Present) -> dict[str, Any]:
        """Return the arguments of the egress process's operation `assign`, but for its sockets."""
        resolved = await self._secrets.egress_secrets(sandbox_id, present.secrets)
        ca = resolved.ca
        order: dict[str, Any] = {
            "policy": present.policy.to_json(),
            "secrets": [secret.to_json() for secret in resolved.secrets],
            "ca": None if ca is None else {"certificate_pem": ca.certificate_pem, "key_pem": ca.key_pem},
        }
        return {"sandbox": sandbox_id, "digest": order_digest(order), **order}

    async def _assign(self, sandbox_id: str, present: _Present, sockets: Sequence[socket.socket]) -> None:
        order = await self._order(sandbox_id, present)
        if self._present.get(sandbox_id) is not present:
            return  # removed meanwhile: the egress process must not keep an entry and sockets of it
        fds = [sock.fileno() for sock in sockets]
        await self._egress.call("assign", fds, **order, sockets=SOCKETS[: len(fds)])

    async def _hand_over(self, sandbox_id: str, present: _Present) -> None:
        """Give the egress process a sandbox whose sockets it does not have yet."""
        sockets = await self._kernel.listen(sandbox_id)
        try:
            await self._assign(sandbox_id, present, sockets)
        finally:
            _close(sockets)

    async def _hand_over_all(self) -> None:
        """Give a new egress process all sandboxes; log each one that fails and stays offline until its next update."""
        for sandbox_id, present in list(self._present.items()):
            if sandbox_id in self._egress.sandboxes:
                continue
            try:
                await self._hand_over(sandbox_id, present)
            except AgentError as error:
                log.error("sandbox offline: egress hand-over failed", sandbox_id=sandbox_id, error=error.message)

    def _on_report(self, report: dict[str, Any]) -> None:
        for sandbox_id, reason, count in report["counts"]:
            self._denials.count(sandbox_id, Reason(reason), count)
        for sandbox_id, reason, host, port, protocol, count in report["denials"]:
            self._denials.report(sandbox_id, Denial(Reason(reason), str(host), int(port), str(protocol), int(count)))


def _close(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()

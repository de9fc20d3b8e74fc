"""Services of this host that every VM is made with: VMM driver, disks, network, volumes, UIDs, cgroups, settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.daemon.host.cgroup import Cgroups
from agent.daemon.host.uid_pool import UidPool
from agent.daemon.sandbox.state.record import Record
from agent.daemon.storage.disks import DiskMaker
from agent.daemon.storage.volumes import Volumes
from agent.daemon.vmm.driver import Driver


class Network(Protocol):
    """Networks of sandboxes; implemented by `agent.daemon.network.sandbox_network`."""

    async def make(self, record: Record, stack: AsyncExitStack) -> None:
        """Make namespace, rules and servers of a sandbox; `stack` removes them.

        :raises AgentError: the kernel or the egress process refused.
        """

    async def make_bare(self, sandbox_id: str, stack: AsyncExitStack) -> None:
        """Make a namespace with a tap that leads nowhere; `stack` removes it.

        :raises HostError: the kernel refused.
        """

    async def adopt(self, record: Record, vmm_pid: int) -> None:
        """Take over the network that an earlier agent made for a sandbox; its VMM runs in that namespace.

        :raises AgentError: the kernel or the egress process refused.
        """

    async def update(self, record: Record) -> None:
        """Put the record's network policy and secrets into force.

        :raises AgentError: the kernel or the egress process refused.
        """

    async def remove(self, sandbox_id: str) -> None:
        """Remove the whole network of a sandbox. Idempotent.

        :raises HostError: the kernel refused.
        """

    async def count_drops(self, record: Record) -> None:
        """Add the packets that the kernel dropped since the last call to the record's denials.

        :raises HostError: the counters cannot be read.
        """

    async def hold(self, record: Record, values: Mapping[str, str]) -> dict[str, str]:
        """Store these values of the record's secrets, delete values without a secret, and create a CA if one is needed.

        :return: the values stored before.
        :raises HostError: a secret has no value, or the vault cannot be written.
        """

    async def inherit(self, sandbox_id: str, parent: str) -> None:
        """Copy the stored secrets and CA of a parent to its fork.

        :raises HostError: the vault cannot be read or written.
        """

    def fingerprint(self, values: Mapping[str, str]) -> str:
        """Return a keyed digest of secret values; it tells values apart and reveals nothing without the node's key."""

    async def release(self, sandbox_id: str) -> None:
        """Delete the stored secrets and CA of a sandbox. Idempotent.

        :raises HostError: the vault cannot be written.
        """

    async def ca_certificate(self, record: Record) -> str:
        """Return the certificate of the sandbox's CA, in PEM; "" without one.

        :raises HostError: the vault cannot be read.
        """

    async def trust(self, record: Record) -> dict[str, object] | None:
        """Return the fields of sys.trust for the sandbox's guest; None if it has no CA to trust.

        :raises HostError: the vault cannot be read.
        """


@dataclass(frozen=True, slots=True)
class HostServices:
    """Everything on this host that is shared by its VMs; see the fields' own classes."""

    settings: Settings
    paths: Paths
    driver: Driver
    disks: DiskMaker
    network: Network
    volumes: Volumes
    uids: UidPool
    cgroups: Cgroups

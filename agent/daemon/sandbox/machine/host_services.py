"""Services of this host for all VMs: VMM driver, disks, network, secrets, volumes, UIDs, cgroups, settings."""

from __future__ import annotations

from dataclasses import dataclass

from agent.common.config.paths import Paths
from agent.common.config.settings import Settings
from agent.daemon.host.cgroup import Cgroups
from agent.daemon.host.uid_pool import UidPool
from agent.daemon.sandbox.machine.record_network import RecordNetwork
from agent.daemon.storage.disks import DiskMaker
from agent.daemon.storage.secrets.secret_store import SecretStore
from agent.daemon.storage.volumes import Volumes
from agent.daemon.vmm.driver import Driver


@dataclass(frozen=True, slots=True)
class HostServices:
    """Everything on this host that is shared by its VMs; see the fields' own classes."""

    settings: Settings
    paths: Paths
    driver: Driver
    disks: DiskMaker
    network: RecordNetwork
    secrets: SecretStore
    volumes: Volumes
    uids: UidPool
    cgroups: Cgroups

"""Settings of the daemon: every section of the settings file but [egress] and [gateway].

Sizes are bytes, times are seconds; in the file and the environment both may have a unit ("512MiB", "30s").
"""

from __future__ import annotations

import grp
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agent.common.errors import ConfigError
from agent.common.quantities import Bytes, Seconds


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Identity and capacity of the node.

    :param cpu_overcommit: factor of the host's CPUs that sandboxes may have in all; `memory_overcommit` likewise.
    :param reserved_memory_bytes: memory that sandboxes cannot use; `reserved_disk_bytes` likewise.
    :param quotas: by tenant, limits on the sum of its sandboxes, as "sandboxes=10, cpus=16, memory=8GiB"; "*" applies
        to each tenant without an entry.
    :param queue_length: creates that may wait for capacity, each up to `queue_timeout_s`; 0: refuse them at once.
    :param max_memory_pressure: refuse creates while PSI memory "full avg10" (/proc/pressure/memory) exceeds this
        percentage; 0 disables the check.
    """

    name: str = field(default_factory=socket.gethostname)
    region: str = "local"
    labels: Mapping[str, str] = field(default_factory=dict)
    max_sandboxes: int = 1000
    cpu_overcommit: float = 8.0
    memory_overcommit: float = 1.0
    reserved_memory_bytes: Bytes = 512 << 20
    reserved_disk_bytes: Bytes = 1 << 30
    quotas: Mapping[str, str] = field(default_factory=dict)
    queue_length: int = 0
    queue_timeout_s: Seconds = 10.0
    max_memory_pressure: float = 25.0


@dataclass(frozen=True, slots=True)
class PathSettings:
    """Directories of the daemon. The path `run_dir` must be short: unix sockets lie below it."""

    run_dir: Path = Path("/run/sandboxd")
    state_dir: Path = Path("/var/lib/sandboxd")
    cache_dir: Path = Path("/var/cache/sandboxd")
    tools_dir: Path = Path("/var/lib/sandboxd/tools")


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """Directory of images, and the image of creates that name none."""

    images_dir: Path = Path("/var/lib/sandboxd/images")
    default_image: str = "minimal"


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Addresses of the API, and its callers. Each caller controls all sandboxes of the node.

    :param unix_socket: path; empty: `<run_dir>/sandboxd.sock`.
    :param unix_allow_uids: users of the unix socket besides root and the daemon's user; `unix_allow_gids` (numbers) and
        `unix_allow_groups` (names) are groups of users.
    :param tcp_address: host:port; empty: no TCP. It needs the files `tls_*` for mutual TLS.
    :param allow_insecure_loopback: serve a loopback `tcp_address` without TLS, for tests: all local users are callers.
    """

    unix_socket: str = ""
    unix_allow_uids: tuple[int, ...] = ()
    unix_allow_gids: tuple[int, ...] = ()
    unix_allow_groups: tuple[str, ...] = ()
    tcp_address: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    allow_insecure_loopback: bool = False

    def group_ids(self) -> frozenset[int]:
        """Return the ids of the groups that may use the unix socket.

        :raises ConfigError: a group of `unix_allow_groups` does not exist.
        """
        numbers = set(self.unix_allow_gids)
        for name in self.unix_allow_groups:
            try:
                numbers.add(grp.getgrnam(name).gr_gid)
            except KeyError:
                raise ConfigError(
                    f"api.unix_allow_groups: there is no group {name}; create it: groupadd --system {name}"
                ) from None
        return frozenset(numbers)


@dataclass(frozen=True, slots=True)
class VmmSettings:
    """The virtual machine monitor (VMM).

    :param driver: auto (Cloud Hypervisor if it boots a guest on this host, else QEMU), qemu or cloud-hypervisor.
    :param binary: path of the VMM; empty: searched for.
    :param accelerator: auto (KVM if it works), kvm or tcg (emulation).
    :param link: transport between host and guest: auto (the better one for the VMM), serial or vsock.
    :param download_url: where `sandboxctl vmm install` downloads Cloud Hypervisor; empty: its releases on GitHub. The
        file must have the SHA-256 digest `download_sha256`.
    :param uid_base: first of 65,536 dedicated UIDs, one per running VMM, unused by others on this host; 0, or if the
        daemon does not run as root: VMMs run as the daemon's user.
    :param console_limit_bytes: size of each sandbox's console log; the beginning is dropped.
    """

    driver: Literal["auto", "qemu", "cloud-hypervisor"] = "auto"
    binary: str = ""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    link: Literal["auto", "serial", "vsock"] = "auto"
    download_url: str = ""
    download_sha256: str = ""
    uid_base: int = 1_900_000_000
    console_limit_bytes: Bytes = 1 << 20
    extra_kernel_args: str = ""


@dataclass(frozen=True, slots=True)
class CgroupSettings:
    """Control groups (cgroup v2) of the sandboxes' VMMs.

    :param parent: group in which each VMM gets its own; empty: no control groups.
    :param cpu_headroom: CPUs of a VMM beyond the vCPUs of its sandbox.
    :param memory_headroom_bytes: memory of a VMM beyond the guest's; 0: a default for the accelerator (an emulator
        needs more, for its translated code).
    """

    parent: str = "/sandboxd"
    cpu_headroom: float = 1.0
    memory_headroom_bytes: Bytes = 0


@dataclass(frozen=True, slots=True)
class TemplateSettings:
    """Templates: snapshots of booted VMs, from which sandboxes are cloned.

    :param enabled: false: every sandbox boots its kernel.
    :param prepare: memory sizes of templates of the default image and vCPU count to build at start, and again after the
        image was rebuilt.
    :param budget_bytes: disk space for all templates; the least recently used ones are removed.
    :param clone_timeout_s: a clone that is not configured in this time is killed, and another clone is started.
    """

    enabled: bool = True
    prepare: tuple[Bytes, ...] = ()
    budget_bytes: Bytes = 20 << 30
    clone_timeout_s: Seconds = 20.0


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """Defaults, limits and timeouts of sandboxes.

    :param delete_timeout_s: deprecated, without effect; accepted so that existing settings files stay valid.
    :param relink_timeout_s: time to restore a lost link to a guest before its sandbox fails.
    :param disk_bytes_per_s: limit on each sandbox and direction, like `disk_operations_per_s`, enforced by its control
        group and by Cloud Hypervisor; 0: no limit.
    :param net_bytes_per_s: limit on the network card, enforced by Cloud Hypervisor alone; 0: no limit.
    :param on_stop: sandboxes at an orderly stop of the daemon: delete, keep (the VMs go on running), or drain: wait
        until they have ended, and delete the rest after `drain_timeout_s`.
    :param lost_retention_s: how long a sandbox that was lost while no daemon ran (a reboot, say) stays listed.
    """

    default_vcpus: int = 1
    max_vcpus: int = 32
    default_memory_bytes: Bytes = 512 << 20
    max_memory_bytes: Bytes = 64 << 30
    default_disk_bytes: Bytes = 4 << 30
    max_disk_bytes: Bytes = 1 << 40
    boot_timeout_s: Seconds = 60.0
    delete_timeout_s: Seconds = 30.0
    relink_timeout_s: Seconds = 15.0
    disk_bytes_per_s: Bytes = 0
    disk_operations_per_s: int = 0
    net_bytes_per_s: Bytes = 0
    on_stop: Literal["delete", "keep", "drain"] = "delete"
    drain_timeout_s: Seconds = 300.0
    lost_retention_s: Seconds = 3600.0


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """Prometheus metrics over HTTP at `address` (host:port); empty: off."""

    address: str = ""


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """OpenTelemetry spans, sent by OTLP over gRPC to `otlp_endpoint` (http://host:port); empty: off."""

    otlp_endpoint: str = ""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Log lines on standard error.

    :param format: auto (console on a terminal, otherwise json), json or console.
    :param audit: log each call of the API as a line "audit" with caller, call, sandbox and status code.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"
    audit: bool = True

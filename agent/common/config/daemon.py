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
    """The node. `*_overcommit` multiply what the host has; `reserved_memory_bytes` is left to the host.

    `quotas` has what the sandboxes of a tenant may have together, as "sandboxes=10, cpus=16, memory=8GiB"; that of "*"
    holds for each tenant without one of its own. A create for which there is no room waits up to `queue_timeout_s` for
    some, with `queue_length` others at most; 0: it is refused at once. None is let in while all processes of the host
    wait for memory for more than `max_memory_pressure` percent of the time; 0: however long.
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
    """Where things are. `run_dir` must be short: unix sockets lie in it."""

    run_dir: Path = Path("/run/sandboxd")
    state_dir: Path = Path("/var/lib/sandboxd")
    cache_dir: Path = Path("/var/cache/sandboxd")
    tools_dir: Path = Path("/var/lib/sandboxd/tools")


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """Images and the one that a create without an image gets."""

    images_dir: Path = Path("/var/lib/sandboxd/images")
    default_image: str = "minimal"


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Where the API listens. Empty `unix_socket`: `<run_dir>/sandboxd.sock`; empty `tcp_address`: no TCP.

    Root and `unix_allow_*` (users and groups by number, `unix_allow_groups` by name) may use the socket: they may do
    with all sandboxes whatever the API can.
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
        """Returns the groups that may use the socket. :raises ConfigError: there is none of a name."""
        numbers = set(self.unix_allow_gids)
        for name in self.unix_allow_groups:
            try:
                numbers.add(grp.getgrnam(name).gr_gid)
            except KeyError:
                raise ConfigError(
                    f"api.unix_allow_groups: there is no group {name}; groupadd --system {name}"
                ) from None
        return frozenset(numbers)


@dataclass(frozen=True, slots=True)
class VmmSettings:
    """The VMM.

    `driver` is auto (Cloud Hypervisor if it boots a guest here, else QEMU), qemu or cloud-hypervisor; `accelerator`
    auto, kvm or tcg; `link` auto (what the VMM does best), serial or vsock. `sandboxctl vmm install` takes the release
    from `download_url` (empty: where its makers publish it), if it has the SHA-256 digest `download_sha256`.

    `uid_base` is the first of 65,536 users, nobody else's on this host, of whom each VMM is one, with a view of its own
    files alone; 0: VMMs run as the agent's own user, which they do anyway if that is not root.
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
    """The control group (cgroup v2) of each sandbox's VMM, in the group `parent`; empty: none is made.

    The VMM may use the CPUs of its sandbox and `cpu_headroom` more; and memory as its guest, and more by
    `memory_headroom_bytes`; 0: what suits the accelerator, since an emulator keeps the code that it has translated.
    """

    parent: str = "/sandboxd"
    cpu_headroom: float = 1.0
    memory_headroom_bytes: Bytes = 0


@dataclass(frozen=True, slots=True)
class TemplateSettings:
    """Templates: `prepare` are memory sizes that are made ready for the default image and number of CPUs.

    That is done at start, and again when the image was rebuilt.

    Without them (`enabled = false`) every sandbox boots from its kernel on. A clone that has not answered, or not taken
    its configuration, within `clone_timeout_s` is ended and another one is tried.
    """

    enabled: bool = True
    prepare: tuple[Bytes, ...] = ()
    budget_bytes: Bytes = 20 << 30
    clone_timeout_s: Seconds = 20.0


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """Defaults and limits of sandboxes; `on_stop` says what an orderly stop does with them: delete, keep, or drain.

    To drain is to wait until they have ended, and to delete those that are left after `drain_timeout_s`. A sandbox that
    was lost while no agent ran, with the host's end say, is told of for `lost_retention_s`.
    `disk_*_per_s` and `net_bytes_per_s` are rates that the VMM enforces on each sandbox; 0: none.
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
    """Prometheus over HTTP at `address` (host:port); empty: off."""

    address: str = ""


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """OpenTelemetry spans by OTLP over gRPC to `otlp_endpoint` (http://host:port); empty: off."""

    otlp_endpoint: str = ""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """`level` debug, info, warning or error; `format` auto (json unless a terminal), json or console.

    With `audit`, each call of the API is a line "audit": who, what, which sandbox, outcome.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"
    audit: bool = True

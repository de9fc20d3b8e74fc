"""Settings of the gateway: section [gateway] of the settings file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.common.quantities import Bytes, Seconds


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The Deno-compatible edge.

    `address` is where WebSockets and REST are served; anything but loopback needs `tls_cert` and `tls_key`. `nodes` are
    the daemons behind it, "unix:/path" or "host:port"; without any, the one of these settings. `node_tls_*` are the
    certificates for daemons on TCP. `image` is what sandboxes are made of, with `vcpus` CPUs each.

    Exposed ports are served at `ingress_address` as `https://<name>.<domain>`, with `ingress_cert` and `ingress_key`
    (a wildcard certificate of the domain) or, without them, certificates of the local CA in `state_dir`. `ingress_port`
    is the port that clients are told, if it is not the address's own. SSH is served at `ssh_address`; clients are told
    `ssh_hostname`. Empty addresses turn a service off. A message of a client may have `max_message_bytes`,
    and what it sends and nobody takes may wait on the disk up to `spool_bytes`. A client that has been silent for
    `idle_timeout_s` is gone.
    """

    address: str = "127.0.0.1:8600"
    tls_cert: str = ""
    tls_key: str = ""
    nodes: tuple[str, ...] = ()
    node_tls_ca: str = ""
    node_tls_cert: str = ""
    node_tls_key: str = ""
    state_dir: Path = Path("/var/lib/sandboxd-gateway")
    image: str = "default"
    vcpus: int = 2
    domain: str = "localhost"
    ingress_address: str = "127.0.0.1:8643"
    ingress_port: int = 0
    ingress_cert: str = ""
    ingress_key: str = ""
    ssh_address: str = "127.0.0.1:8622"
    ssh_hostname: str = "localhost"
    metrics_address: str = ""
    max_message_bytes: Bytes = 512 << 20
    spool_bytes: Bytes = 4 << 30
    idle_timeout_s: Seconds = 120.0

    @property
    def tokens_file(self) -> Path:
        """Who may use the gateway; written by `sandboxctl token`."""
        return self.state_dir / "tokens.json"

"""Settings of the gateway: section [gateway] of the settings file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.common.quantities import Bytes, Seconds


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Gateway for the Deno sandbox SDKs. An empty address turns its service off.

    :param address: host:port of WebSockets and REST; other addresses than loopback need `tls_cert` and `tls_key`.
    :param nodes: daemons to use, each "unix:/path" or "host:port"; empty: the daemon of the same settings file.
    :param node_tls_ca: CA of daemons on TCP; `node_tls_cert` and `node_tls_key` are the gateway's client certificate.
    :param image: of new sandboxes, which have `vcpus` CPUs each.
    :param domain: exposed ports are served as `https://<name>.<domain>` at `ingress_address`.
    :param ingress_cert: wildcard certificate of the domain, with `ingress_key`; empty: the local CA in `state_dir`.
    :param ingress_port: port in the URLs for clients; 0: that of `ingress_address`.
    :param ssh_hostname: host name for clients of the SSH server at `ssh_address`.
    :param max_message_bytes: largest message of a client.
    :param spool_bytes: disk space for data of one client that the sandbox has not read yet.
    :param idle_timeout_s: a client that sends nothing for this time is disconnected.
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
        """File of access tokens; written by `sandboxctl token`."""
        return self.state_dir / "tokens.json"

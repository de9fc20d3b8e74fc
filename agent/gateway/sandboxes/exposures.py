"""Registry of exposures: host names that lead to ports of sandboxes, and SSH user names.

A name is a credential of 129 random bits. The registry is stored in a file, because a sandbox and its names outlive a
restart of the gateway.
"""

from __future__ import annotations

import secrets
import string
from pathlib import Path

import msgspec

from agent.common.atomic_file import write_atomically
from agent.common.telemetry import log
from agent.gateway.errors import CallError, HttpError

_ALPHABET = string.ascii_lowercase + string.digits
_LENGTH = 25  # 129 bits
_MAX_PER_SANDBOX = 64


class Exposure(msgspec.Struct, kw_only=True):
    """Target of one name. With neither port nor process the name is reserved and leads nowhere yet.

    :param node: address of the sandbox's node.
    :param kind: "http" or "ssh".
    :param process_id: forward to the port on which this process listens, instead of `port`.
    """

    sandbox_id: str
    node: str
    kind: str = "http"
    port: int = 0
    process_id: int = 0


class Exposures:
    """All exposures by name.

    :param path: file of the registry.
    :param domain: parent domain of the host names, such as "sandboxes.example.com".
    """

    def __init__(self, path: Path, domain: str) -> None:
        self._path = path
        self._domain = domain
        self._by_name: dict[str, Exposure] = {}

    def load(self) -> None:
        """Read the file. A damaged file is renamed to *.damaged: clients can expose their ports again."""
        try:
            self._by_name = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Exposure])
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            log.error("cannot read the file of exposures; starting without any", path=str(self._path), error=str(error))
            self._path.replace(self._path.with_suffix(".damaged"))

    def _save(self) -> None:
        write_atomically(self._path, msgspec.json.encode(self._by_name), mode=0o600, durable=False)

    def reserve(self, sandbox_id: str, node: str, kind: str = "http") -> str:
        """Return a new name for a sandbox.

        :raises HttpError: 429, the sandbox has the maximum number of names.
        """
        count = sum(exposure.sandbox_id == sandbox_id for exposure in self._by_name.values())
        if count >= _MAX_PER_SANDBOX:
            raise HttpError(429, "TOO_MANY_EXPOSURES", f"a sandbox has at most {_MAX_PER_SANDBOX} exposed names")
        name = "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
        self._by_name[name] = Exposure(sandbox_id=sandbox_id, node=node, kind=kind)
        self._save()
        return name

    def host_name(self, name: str) -> str:
        """Return the host name of an exposure's name."""
        return f"{name}.{self._domain}"

    def bind(self, host: str, sandbox_id: str, *, port: int = 0, process_id: int = 0) -> None:
        """Set the target of a reserved host name.

        :raises CallError: the host name is not reserved for this sandbox.
        """
        exposure = self._by_name.get(host.partition(".")[0])
        if exposure is None or exposure.sandbox_id != sandbox_id or exposure.kind != "http":
            raise CallError("NotFound", f"{host[:100]!r} is not a domain of this sandbox; request a domain first")
        exposure.port, exposure.process_id = port, process_id
        self._save()

    def find_host(self, host: str) -> Exposure | None:
        """Return the exposure of a host name, or None if the name is not ours."""
        name, _, domain = host.lower().rstrip(".").partition(".")
        return self.find(name, "http") if domain == self._domain else None

    def find(self, name: str, kind: str) -> Exposure | None:
        """Return the exposure of a name, or None."""
        found = self._by_name.get(name)
        return found if found is not None and found.kind == kind else None

    def sandboxes_on(self, node: str) -> set[str]:
        """Return the ids of the sandboxes on a node (by its address) that have exposures."""
        return {exposure.sandbox_id for exposure in self._by_name.values() if exposure.node == node}

    def remove_sandbox(self, sandbox_id: str) -> None:
        """Remove all names of a sandbox. Idempotent."""
        kept = {name: exposure for name, exposure in self._by_name.items() if exposure.sandbox_id != sandbox_id}
        if len(kept) != len(self._by_name):
            self._by_name = kept
            self._save()

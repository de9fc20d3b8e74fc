"""What of sandboxes is reachable from outside: ports under host names, and SSH under user names. Both are secrets: 128
random bits. Kept in a file, so that they live as long as their sandboxes, and not as long as the gateway.
"""

from __future__ import annotations

import secrets
import string
from pathlib import Path

import msgspec

from agent.common.atomic_file import write_atomically
from agent.common.telemetry import log
from agent.gateway.errors import Failure, Refusal

_ALPHABET = string.ascii_lowercase + string.digits
_LENGTH = 25  # 129 bits
_MAX_PER_SANDBOX = 64


class Exposure(msgspec.Struct, kw_only=True):
    """One name. Without a port and a process it is reserved, and leads nowhere.

    :param node: address of the sandbox's node. :param process_id: whatever this process listens on is meant.
    """

    sandbox_id: str
    node: str
    kind: str = "http"
    port: int = 0
    process_id: int = 0


class Exposures:
    """All of them, by name."""

    def __init__(self, path: Path, domain: str) -> None:
        self.port = 443  # that clients are told
        self._path = path
        self._domain = domain
        self._by_name: dict[str, Exposure] = {}

    def load(self) -> None:
        """Takes over what an earlier gateway had. A damaged file is set aside: it has nothing that cannot be redone."""
        try:
            self._by_name = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Exposure])
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            log.error("exposures are lost", path=str(self._path), error=str(error))
            self._path.replace(self._path.with_suffix(".damaged"))

    def _save(self) -> None:
        write_atomically(self._path, msgspec.json.encode(self._by_name), mode=0o600, durable=False)

    def reserve(self, sandbox_id: str, node: str, kind: str = "http") -> str:
        """Returns a fresh name for a sandbox. :raises Refusal: it has too many."""
        held = sum(exposure.sandbox_id == sandbox_id for exposure in self._by_name.values())
        if held >= _MAX_PER_SANDBOX:
            raise Refusal(429, "TOO_MANY_EXPOSURES", f"a sandbox has at most {_MAX_PER_SANDBOX} exposed names")
        name = "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
        self._by_name[name] = Exposure(sandbox_id=sandbox_id, node=node, kind=kind)
        self._save()
        return name

    def domain_of(self, name: str) -> str:
        """Returns what an SDK puts behind "https://"."""
        return f"{name}.{self._domain}" + ("" if self.port == 443 else f":{self.port}")

    def bind(self, domain: str, sandbox_id: str, *, port: int = 0, process_id: int = 0) -> None:
        """Says where a reserved name leads. :raises Failure: it is not reserved for this sandbox."""
        exposure = self._by_name.get(domain.partition(".")[0])
        if exposure is None or exposure.sandbox_id != sandbox_id or exposure.kind != "http":
            raise Failure("NotFound", f"{domain[:100]!r} was not given to this sandbox; ask for a domain first")
        exposure.port, exposure.process_id = port, process_id
        self._save()

    def find_host(self, host: str) -> Exposure | None:
        """Returns where a host name leads; None for names that are not ours."""
        name, _, domain = host.lower().rstrip(".").partition(".")
        return self.find(name, "http") if domain == self._domain else None

    def find(self, name: str, kind: str) -> Exposure | None:
        """Returns the exposure of a name."""
        found = self._by_name.get(name)
        return found if found is not None and found.kind == kind else None

    def sandboxes_on(self, node: str) -> set[str]:
        """Returns the ids of sandboxes of a node that have exposures."""
        return {exposure.sandbox_id for exposure in self._by_name.values() if exposure.node == node}

    def drop(self, sandbox_id: str) -> None:
        """Forgets all names of a sandbox that is gone. Idempotent."""
        kept = {name: exposure for name, exposure in self._by_name.items() if exposure.sandbox_id != sandbox_id}
        if len(kept) != len(self._by_name):
            self._by_name = kept
            self._save()

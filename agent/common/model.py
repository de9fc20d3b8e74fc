"""The words that all of the agent shares: identifiers, specifications, states. Frozen values, no behaviour but their
own.
"""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import dataclass, field
from enum import StrEnum

ID_PREFIX = "sbx-"
_ID_ALPHABET = string.ascii_lowercase + string.digits
_ID_PATTERN = re.compile(rf"{ID_PREFIX}[a-z0-9]{{16}}")

GUEST_MAC = "02:73:62:78:00:01"
GUEST_IPV4 = "10.0.99.2/30"
GATEWAY_IPV4 = "10.0.99.1/30"
GUEST_IPV6 = "fd73:6278::2/64"
GATEWAY_IPV6 = "fd73:6278::1/64"
VSOCK_PORT = 1024
DEFAULT_USER = "sandbox"  # of every image: whom processes run as


def new_sandbox_id() -> str:
    """Returns a fresh identifier: usable as host name, namespace name and directory name; 82 random bits."""
    return ID_PREFIX + "".join(secrets.choice(_ID_ALPHABET) for _ in range(16))


def is_sandbox_id(text: str) -> bool:
    """Whether `text` has the form of a sandbox identifier."""
    return _ID_PATTERN.fullmatch(text) is not None


class State(StrEnum):
    """Where a sandbox is in its life."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"  # its CPUs stand still
    SUSPENDED = "suspended"  # it is on the disk alone
    FAILED = "failed"
    LOST = "lost"
    DELETING = "deleting"
    DELETED = "deleted"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.CREATING: frozenset({State.RUNNING, State.FAILED, State.DELETING}),
    State.RUNNING: frozenset({State.PAUSED, State.SUSPENDED, State.FAILED, State.LOST, State.DELETING}),
    State.PAUSED: frozenset({State.RUNNING, State.SUSPENDED, State.FAILED, State.LOST, State.DELETING}),
    State.SUSPENDED: frozenset({State.RUNNING, State.FAILED, State.LOST, State.DELETING}),
    State.FAILED: frozenset({State.DELETING}),
    State.LOST: frozenset({State.DELETING}),
    State.DELETING: frozenset({State.DELETED}),
    State.DELETED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long a sandbox lives: until `duration_s` after its creation, or as long as a lease is kept alive.

    Both None: until it is deleted. A lease lapses `lease_s` after the last KeepAlive message. Besides, it ends once
    nobody has used it for `idle_s`.
    """

    duration_s: float | None = None
    lease_s: float | None = None
    idle_s: float | None = None


@dataclass(frozen=True, slots=True)
class SecretSpec:
    """A secret without its value, which only the vault and the egress process have.

    :param name: of the environment variable that holds the placeholder.
    :param hosts: rules (`agent.common.policy.rules`) of the hosts that get the value.
    :param placeholder: what the guest sees in its place; the same for as long as the sandbox lives.
    """

    name: str
    hosts: tuple[str, ...]
    placeholder: str
    in_body: bool = False
    redact: bool = True


@dataclass(frozen=True, slots=True)
class NetSpec:
    """What a sandbox may reach: `allow` has rules (`agent.common.policy.rules`), None is the internet, () nothing."""

    allow: tuple[str, ...] | None = None
    tenant: str = ""
    inspect: bool = False


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What a caller asked for, validated; sizes in bytes.

    :param root: id of the volume or snapshot that is the writable disk; "": a fresh one.
    :param volumes: (path, id of a volume) of those that are mounted.
    """

    image: str
    vcpu_count: int
    memory_bytes: int
    disk_bytes: int
    env: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    lifetime: Lifetime = Lifetime()
    request_id: str = ""
    net: NetSpec = NetSpec()
    secrets: tuple[SecretSpec, ...] = ()
    root: str = ""
    volumes: tuple[tuple[str, str], ...] = ()

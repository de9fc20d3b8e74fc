"""Values that all programs share: identifiers, specifications and states of sandboxes."""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import dataclass, field
from enum import StrEnum

from agent.common.policy.rules import Rule

ID_PREFIX = "sbx-"
_ID_ALPHABET = string.ascii_lowercase + string.digits
_ID_PATTERN = re.compile(rf"{ID_PREFIX}[a-z0-9]{{16}}")

TAP_NAME = "tap0"  # of the host's end of the guest's network card, in the sandbox's namespace
GUEST_MAC = "02:73:62:78:00:01"
GUEST_IPV4 = "10.0.99.2/30"
GATEWAY_IPV4 = "10.0.99.1/30"
GUEST_IPV6 = "fd73:6278::2/64"
GATEWAY_IPV6 = "fd73:6278::1/64"
DEFAULT_USER = "sandbox"  # in every image; the user of processes for which none is given


def new_sandbox_id() -> str:
    """Return a new sandbox identifier with 82 random bits, usable as a host, namespace and directory name."""
    return ID_PREFIX + "".join(secrets.choice(_ID_ALPHABET) for _ in range(16))


def is_sandbox_id(text: str) -> bool:
    """Return whether `text` has the form of a sandbox identifier."""
    return _ID_PATTERN.fullmatch(text) is not None


class State(StrEnum):
    """State of a sandbox; `TRANSITIONS` has the allowed changes."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"  # the vCPUs are stopped, the memory is kept
    SUSPENDED = "suspended"  # memory and devices are saved on disk, no VMM runs
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
    """When a sandbox is deleted without a request, in seconds; None: never for this cause.

    :param duration_s: time after the creation.
    :param lease_s: time after the last KeepAlive message. Excludes `duration_s`.
    :param idle_s: time without a call that uses the sandbox.
    """

    duration_s: float | None = None
    lease_s: float | None = None
    idle_s: float | None = None


@dataclass(frozen=True, slots=True)
class SecretSpec:
    """A secret without its value: only the stored secrets and the egress process have that.

    :param name: of the environment variable with the placeholder.
    :param hosts: rules for the hosts to which the value is sent.
    :param placeholder: text that the guest has in place of the value; constant for the sandbox's lifetime.
    :param in_body: replace the placeholder in request bodies, too, and not only in headers.
    :param redact: replace the value by the placeholder in responses.
    """

    name: str
    hosts: tuple[Rule, ...]
    placeholder: str
    in_body: bool = False
    redact: bool = True


@dataclass(frozen=True, slots=True)
class NetSpec:
    """Network access of a sandbox.

    :param allow: rules for allowed destinations; None: the internet; (): nothing.
    :param tenant: whose limits (settings `egress.tenants`) apply.
    :param inspect: open TLS connections with the sandbox's own CA to see the requests inside.
    """

    allow: tuple[Rule, ...] | None = None
    tenant: str = ""
    inspect: bool = False


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """Validated parameters of a create; sizes in bytes.

    :param root: id of the volume or snapshot used as the writable disk; "": a new disk.
    :param volumes: (mount path, volume id) of each mounted volume.
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

"""Record of a sandbox: the facts that survive a restart of the agent."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from agent.common import stored_json
from agent.common.errors import InvalidSpec, InvalidState
from agent.common.model import TRANSITIONS, NetSpec, SandboxSpec, SecretSpec, State
from agent.common.policy.rules import Rule, parse_rule
from agent.daemon.storage.volumes import is_snapshot

# Former names of fields: copies of records that 0.1.0 wrote have them.
_RENAMED = {"standing": "maybe_paused"}


@dataclass(slots=True)
class Record:
    """One sandbox. The names of the fields are those of the stored JSON. Times of day are seconds since 1970.

    :param spec: specification as created; `labels`, `net` and `secrets` are the present values.
    :param expire_uptime: expiry by `agent.common.clock.uptime_s`, for a duration or a lease; `expire_time` follows it.
        None: `expire_time` is a time of day, or the sandbox never expires.
    :param error: why the sandbox is FAILED or LOST.
    :param phases: steps of the create with their seconds.
    :param token: data that the VMM driver needs to adopt the VM.
    :param template: digest of the template that the VM was cloned from; "": its kernel booted.
    :param shape: fields of `agent.daemon.sandbox.machine.vm_shape.Shape`.
    :param parent: id of the sandbox that this one was forked from; "": none.
    :param slot: index in the pool of addresses; None: the sandbox has no route to the uplink.
    :param uid: user of the VMM; None: the agent's own user.
    :param rules: digest of the kernel's rules in force; "": unknown.
    :param denials: number of refused connections and dropped packets, by reason.
    :param fingerprint: keyed digest of the secret values of the create, to recognize a repeated request.
    :param maybe_paused: the CPUs may be stopped although the state is RUNNING; the next agent resumes them.
    """

    id: str
    spec: SandboxSpec
    state: State
    create_time: float
    labels: dict[str, str] = field(default_factory=dict)
    image_digest: str = ""
    expire_time: float | None = None
    expire_uptime: float | None = None
    error: str = ""
    vmm: str = ""
    phases: list[tuple[str, float]] = field(default_factory=list)
    token: dict[str, str] = field(default_factory=dict)
    template: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    parent: str = ""
    slot: int | None = None
    uid: int | None = None
    rules: str = ""
    net: NetSpec = field(default_factory=NetSpec)
    secrets: tuple[SecretSpec, ...] = ()
    denials: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    maybe_paused: bool = False

    def move(self, state: State) -> None:
        """Change the state.

        :raises InvalidState: `TRANSITIONS` has no such transition.
        """
        if state not in TRANSITIONS[self.state]:
            raise InvalidState(f"sandbox {self.id} is {self.state}; it cannot become {state}")
        self.state = state

    @property
    def volume_ids(self) -> tuple[str, ...]:
        """Ids of the volumes that only this sandbox may use: the mounted ones, and a volume as its root."""
        mounted = tuple(volume for _, volume in self.spec.volumes)
        root = self.spec.root
        return (*mounted, root) if root and not is_snapshot(root) else mounted

    def copy(self) -> Record:
        """Return a copy that later changes of the record do not affect."""
        return dataclasses.replace(
            self, labels=dict(self.labels), phases=list(self.phases), token=dict(self.token), denials=dict(self.denials)
        )

    def to_json(self) -> str:
        """Return the stored form of the record."""
        return stored_json.encode(self, _to_text)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Return the record that `to_json` wrote, of this version or an earlier one.

        :raises ValueError: not JSON, or a field is missing or of another type.
        """
        return stored_json.decode(text, cls, _from_text, renamed=_RENAMED)


def _to_text(value: Any) -> str:
    if isinstance(value, Rule):
        return str(value)
    raise NotImplementedError(f"a record cannot hold {type(value)}")


def _from_text(kind: type, value: Any) -> object:
    if kind is not Rule or not isinstance(value, str):
        raise ValueError(f"{value!r} is not a {kind.__name__}")
    try:
        return parse_rule(value)
    except InvalidSpec as error:
        raise ValueError(error.message) from error

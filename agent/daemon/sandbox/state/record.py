"""What the node remembers of a sandbox: the facts that survive a restart of the agent."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from agent.common import stored_json
from agent.common.errors import InvalidState
from agent.common.model import TRANSITIONS, NetSpec, SandboxSpec, SecretSpec, State


@dataclass(slots=True)
class Record:
    """One sandbox. Times are seconds since 1970; `token` is what the VMM driver needs to adopt the VM.

    `expire_uptime` is when it ends by the clock of `agent.daemon.sandbox.lifecycle.expiry.uptime`, if it is to live for
    so long rather than until a time of day: `expire_time` then follows it.
    `uid` is whom its VMM runs as; None: the agent's own user. `slot` is its place in the pool of addresses, None if it
    has no way to the uplink; `rules` is the digest of the kernel's rules that are in force. `net` and `secrets` are as
    they are now, while `spec` has what the create asked for. `denials` counts what it was not let do, by reason.
    `fingerprint` stands for the values of the secrets that came with the create. `standing` is true while its CPUs may
    stand still although it is RUNNING. `shape` has the fields of the VM's
    `agent.daemon.sandbox.machine.vm_shape.Shape`. `parent` is the sandbox that a fork is a copy of.
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
    standing: bool = False

    def move(self, state: State) -> None:
        """Changes the state. :raises InvalidState: there is no such transition."""
        if state not in TRANSITIONS[self.state]:
            raise InvalidState(f"sandbox {self.id} is {self.state}; it cannot become {state}")
        self.state = state

    def copy(self) -> Record:
        """Returns a snapshot that later changes do not touch."""
        return dataclasses.replace(
            self, labels=dict(self.labels), phases=list(self.phases), token=dict(self.token), denials=dict(self.denials)
        )

    def to_json(self) -> str:
        """Return the record as it is kept."""
        return stored_json.encode(self)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Return the record that `to_json` wrote.

        :raises ValueError: not JSON, or a field is missing or of another type.
        """
        return stored_json.decode(text, cls)

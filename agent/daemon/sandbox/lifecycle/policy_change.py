"""Changes what a running sandbox may reach, as one step: all of it, or what was before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from agent.common.errors import AgentError, NotFound
from agent.common.model import NetSpec, SecretSpec
from agent.daemon.guestlink.channel import Channel
from agent.daemon.sandbox.machine.resources import Host
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.validation import check_net, check_secrets

_TRUST_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What to change. `network` None leaves the policy; a secret that is there already keeps its placeholder."""

    network: NetSpec | None = None
    set_secrets: Mapping[str, tuple[SecretSpec, str]] = field(default_factory=dict)
    remove_secrets: Iterable[str] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to change."""
        return self.network is not None or bool(self.set_secrets) or bool(list(self.remove_secrets))


def changed(record: Record, change: PolicyChange) -> Record:
    """Returns the record as it would be. :raises NotFound: a secret to remove. :raises InvalidSpec: it does not fit."""
    secrets = {secret.name: secret for secret in record.secrets}
    for name in change.remove_secrets:
        if secrets.pop(name, None) is None:
            raise NotFound(f"sandbox {record.id} has no secret {name[:80]!r}", reason="SECRET_NOT_FOUND")
    for name, (secret, _) in change.set_secrets.items():
        old = secrets.get(name)
        secrets[name] = secret if old is None else replace(secret, placeholder=old.placeholder)
    net = record.net if change.network is None else change.network
    check_net(net)
    check_secrets(tuple(secrets.values()), record.spec.env)
    return replace(record, net=net, secrets=tuple(secrets.values()))


async def apply(host: Host, record: Record, change: PolicyChange, channel: Channel) -> None:
    """Puts a change into force: connections that it no longer allows have ended when this returns.

    :raises AgentError: it failed, and the policy is as it was; the guest may know the name of a secret too many.
    """
    new = changed(record, change)
    before = (record.net, record.secrets)
    trusted = await host.network.trust(record)
    values = {name: value for name, (_, value) in change.set_secrets.items()}
    old_values = await host.network.hold(new, values)
    try:
        record.net, record.secrets = new.net, new.secrets
        await host.network.update(record)
        gone = [secret.name for secret in before[1] if secret.name not in {kept.name for kept in new.secrets}]
        order = await host.network.trust(record)
        if order != trusted:  # a new value alone is none of the guest's affair
            await channel.call("sys.trust", timeout_s=_TRUST_TIMEOUT_S, **{**(order or {}), "remove_env": gone})
    except AgentError:
        record.net, record.secrets = before
        await host.network.hold(record, old_values)
        with contextlib.suppress(AgentError):  # the first error says what is wrong
            await host.network.update(record)
        raise

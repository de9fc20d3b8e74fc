"""Changes what a running sandbox may reach, as one step: all of it, or what was before."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from agent.common.aio import run_to_completion
from agent.common.errors import AgentError, NotFound
from agent.common.model import NetSpec, SecretSpec
from agent.common.telemetry import log
from agent.daemon.guestlink.channel import Channel
from agent.daemon.sandbox.machine.host_services import HostServices
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
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


@contextlib.asynccontextmanager
async def in_force(
    host: HostServices, store: Store, record: Record, change: PolicyChange, channel: Channel
) -> AsyncIterator[None]:
    """Put a change into force, run the body, which stores the record, and undo all of it if any part fails.

    Connections that the change no longer allows have ended when the body begins. Whatever is raised, a cancellation
    included, record, secrets, network and database have the old policy afterwards. Values of removed secrets are
    forgotten last: an agent that dies before the record is stored leaves one that the next agent can put into force.

    :raises AgentError: it failed; the guest may know the name of a secret too many.
    """
    new = changed(record, change)
    before = record.copy()
    names = {secret.name for secret in new.secrets}
    removed = tuple(secret for secret in before.secrets if secret.name not in names)
    trusted = await host.network.trust(record)
    both = replace(new, secrets=(*new.secrets, *removed))
    values = {name: value for name, (_, value) in change.set_secrets.items()}
    holding = asyncio.ensure_future(host.network.hold(both, values))
    told = False
    try:
        await run_to_completion(holding)
        record.net, record.secrets = new.net, new.secrets
        await host.network.update(record)
        order = await host.network.trust(record)
        if order != trusted:  # a new value alone is none of the guest's affair
            told = True
            await _tell(channel, order, [secret.name for secret in removed])
        yield
    except BaseException as error:
        if holding.done() and not holding.cancelled() and holding.exception() is None:
            added = sorted(names - {secret.name for secret in before.secrets})
            # The guest of a sandbox that is being deleted is not waited for.
            tell = told and not isinstance(error, asyncio.CancelledError)
            undo_guest = (lambda: _tell(channel, trusted, added)) if tell else None
            await run_to_completion(_undo(host, store, record, before, holding.result(), undo_guest))
        raise
    if removed:
        await _forget_removed(host, record)


async def _tell(channel: Channel, order: Mapping[str, object] | None, gone: Iterable[str]) -> None:
    """Tell the guest the placeholders of its secrets, and the names of those that are gone."""
    await channel.call("sys.trust", timeout_s=_TRUST_TIMEOUT_S, **{**(order or {}), "remove_env": list(gone)})


async def _undo(
    host: HostServices, store: Store, record: Record, before: Record, old_values: Mapping[str, str],
    undo_guest: Callable[[], Awaitable[None]] | None,
) -> None:  # fmt: skip
    """Put the old policy into force everywhere; a step that fails is logged and does not keep the others from it."""
    record.net, record.secrets = before.net, before.secrets
    steps: dict[str, Callable[[], Awaitable[object]]] = {
        "secrets": lambda: host.network.hold(record, old_values),
        "network": lambda: host.network.update(record),
        # Something else may have stored the record meanwhile, with the new policy.
        "database": lambda: store.put(record),
    }
    if undo_guest is not None:
        steps["guest"] = undo_guest
    for name, step in steps.items():
        try:
            await step()
        except Exception as error:  # noqa: BLE001  the caller gets the error that made it undo
            log.error("cannot undo a change of policy", sandbox_id=record.id, part=name, error=str(error))


async def _forget_removed(host: HostServices, record: Record) -> None:
    """Forget the values of removed secrets. The change is stored by now, so a failure does not undo it."""
    try:
        await run_to_completion(host.network.hold(record, {}))
    except AgentError as error:  # the next change or the delete forgets them
        log.error("values of removed secrets are still stored", sandbox_id=record.id, error=error.message)

"""Change the network policy and the secrets of a running sandbox atomically: all of it, or nothing."""

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
    """Changes to apply.

    :param network: the new policy; None: unchanged.
    :param set_secrets: secrets to add or replace, with their values, by name; a replaced one keeps its placeholder.
    """

    network: NetSpec | None = None
    set_secrets: Mapping[str, tuple[SecretSpec, str]] = field(default_factory=dict)
    remove_secrets: Iterable[str] = ()

    def __bool__(self) -> bool:
        """Return whether there is anything to change."""
        return self.network is not None or bool(self.set_secrets) or bool(list(self.remove_secrets))


def changed(record: Record, change: PolicyChange) -> Record:
    """Return a copy of the record with the change applied.

    :raises NotFound: there is no such secret to remove.
    :raises InvalidSpec: a policy or a secret is not valid.
    """
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
    """Put a change into force, run the body, which stores the record, and undo everything if any part fails.

    Connections that the change forbids have ended when the body begins. After any exception, a cancellation included,
    record, secrets, network and database have the old policy. Values of removed secrets are deleted last: a record that
    an agent left unchanged when it died still has all of its values.

    :raises NotFound: there is no such secret to remove.
    :raises InvalidSpec: a policy or a secret is not valid.
    :raises AgentError: a step failed; the guest may know the name of a secret too many.
    """
    new = changed(record, change)
    before = record.copy()
    names = {secret.name for secret in new.secrets}
    removed = tuple(secret for secret in before.secrets if secret.name not in names)
    trusted = await host.secrets.trust_fields(record.id, record.secrets)
    both = replace(new, secrets=(*new.secrets, *removed))
    values = {name: value for name, (_, value) in change.set_secrets.items()}
    holding = asyncio.ensure_future(_store_secrets(host, both, values))
    told = False
    try:
        await run_to_completion(holding)
        record.net, record.secrets = new.net, new.secrets
        await host.network.update(record)
        order = await host.secrets.trust_fields(record.id, record.secrets)
        if order != trusted:  # the guest knows placeholders, not values
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


async def _store_secrets(host: HostServices, record: Record, values: Mapping[str, str]) -> dict[str, str]:
    return await host.secrets.store_secrets(record.id, record.secrets, values, inspect=record.net.inspect)


async def _tell(channel: Channel, order: Mapping[str, object] | None, gone: Iterable[str]) -> None:
    """Tell the guest the placeholders of its secrets, and the names of removed ones."""
    await channel.call("sys.trust", timeout_s=_TRUST_TIMEOUT_S, **{**(order or {}), "remove_env": list(gone)})


async def _undo(
    host: HostServices, store: Store, record: Record, before: Record, old_values: Mapping[str, str],
    undo_guest: Callable[[], Awaitable[None]] | None,
) -> None:  # fmt: skip
    """Put the old policy into force everywhere. A failed step is logged; the others run all the same."""
    record.net, record.secrets = before.net, before.secrets
    steps: dict[str, Callable[[], Awaitable[object]]] = {
        "secrets": lambda: _store_secrets(host, record, old_values),
        "network": lambda: host.network.update(record),
        # Another operation may have stored the record meanwhile, with the new policy.
        "database": lambda: store.put(record),
    }
    if undo_guest is not None:
        steps["guest"] = undo_guest
    for name, step in steps.items():
        try:
            await step()
        except Exception as error:  # noqa: BLE001  the caller gets the first error
            log.error("cannot undo a change of policy", sandbox_id=record.id, part=name, error=str(error))


async def _forget_removed(host: HostServices, record: Record) -> None:
    """Delete the stored values of removed secrets. The change is stored by now, so a failure does not undo it."""
    try:
        await run_to_completion(_store_secrets(host, record, {}))
    except AgentError as error:  # the next change or the delete removes them
        log.error("values of removed secrets are still stored", sandbox_id=record.id, error=error.message)

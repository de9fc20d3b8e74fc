"""Sandboxes over fakes whose changes are stored by the real store, and a disk that can be full."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from agent.common.errors import HostError
from agent.common.model import NetSpec, SecretSpec
from agent.common.policy.rules import parse_rule
from agent.daemon.sandbox.lifecycle.policy_change import PolicyChange
from agent.daemon.sandbox.state.record import Record
from agent.daemon.sandbox.state.store import Store
from tests.support.daemon_fakes import OPERATOR, Bench, spec

ID = "sbx-0000000000000000"
CLOSED = NetSpec(allow=())
OPEN = NetSpec(allow=(parse_rule("b.example"),))
OLD = SecretSpec("OLD", (parse_rule("a.example"),), "mark-old")
NEW = SecretSpec("NEW", (parse_rule("a.example"),), "mark-new")
CHANGE = PolicyChange(OPEN, {"NEW": (NEW, "new value")}, ("OLD",))


class Disk:
    """Refuses every write of the store while `full`."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self._write = store._write
        monkeypatch.setattr(store, "_write", self.write)

    def write(self, statement: str, *values: str) -> None:
        if self.full:
            raise HostError("the disk is full", reason="STATE_UNAVAILABLE")
        self._write(statement, *values)


async def update(node: Bench, sandbox_id: str, policy: PolicyChange | None = None, **fields: Any) -> Record:
    values: dict[str, Any] = {
        "expire_time": None, "clear_expire_time": False, "set_labels": {}, "remove_labels": (),
        "policy": policy or PolicyChange(),
    }  # fmt: skip
    return await node.sandboxes.update(sandbox_id, **{**values, **fields})


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.005)


def stored(node: Bench, sandbox_id: str) -> Record:
    """The record in the database."""
    with sqlite3.connect(node.host.paths.database) as db:
        (text,) = db.execute("SELECT record FROM sandboxes WHERE id = ?", (sandbox_id,)).fetchone()
    db.close()
    return Record.from_json(text)


async def closed(node: Bench, **fields: Any) -> Record:
    return await node.sandboxes.create(spec(net=CLOSED, secrets=(OLD,), **fields), {"OLD": "old value"})


def policies(node: Bench, sandbox_id: str) -> dict[str, object]:
    """The policy in each place that holds it; the network's is the one that it was given last."""
    now, kept, network = node.sandboxes.get(sandbox_id), stored(node, sandbox_id), node.network.updates[-1][1:]
    return {
        "memory": (now.net, now.secrets), "database": (kept.net, kept.secrets),
        "network": network, "vault": node.secrets.values[sandbox_id],
    }  # fmt: skip


def everywhere(net: NetSpec, secret: SecretSpec, value: str) -> dict[str, object]:
    policy, effective = (net, (secret,)), OPERATOR.effective(net)
    return {
        "memory": policy, "database": policy, "network": (effective, (secret,)), "vault": {secret.name: value},
    }  # fmt: skip


BEFORE, AFTER = everywhere(CLOSED, OLD, "old value"), everywhere(OPEN, NEW, "new value")

"""Values and CA of secrets from a request to the vault, the egress process and the guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.common.errors import HostError
from agent.common.model import SecretSpec
from agent.common.policy.rules import parse_rule
from agent.daemon.storage.secrets.secret_store import SecretStore
from agent.daemon.storage.secrets.vault import Vault

ID = "sbx-1"
ONE = SecretSpec("ONE", (parse_rule("a.example"),), "mark-1", in_body=True)
TWO = SecretSpec("TWO", (parse_rule("b.example:8443"),), "mark-2", redact=False)


@pytest.fixture
def store(tmp_path: Path) -> SecretStore:
    made = SecretStore(Vault(tmp_path))
    made.open()
    return made


async def test_values_are_kept_replaced_and_deleted(store: SecretStore) -> None:
    assert await store.store_secrets(ID, (ONE,), {"ONE": "1"}, inspect=False) == {}
    certificate = await store.ca_certificate(ID)
    assert certificate.startswith("-----BEGIN CERTIFICATE-----")
    assert await store.store_secrets(ID, (ONE, TWO), {"TWO": "2", "OTHER": "3"}, inspect=False) == {"ONE": "1"}
    found = await store.egress_secrets(ID, (ONE, TWO))
    assert [(one.name, one.value, one.hosts, one.in_body, one.redact) for one in found.secrets] == [
        ("ONE", "1", ONE.hosts, True, True), ("TWO", "2", TWO.hosts, False, False),
    ]  # fmt: skip
    assert found.ca is not None
    assert found.ca.certificate_pem == certificate  # made once: the guest trusts it
    trust = {"certificate": certificate, "env": {"ONE": "mark-1", "TWO": "mark-2"}}
    assert await store.trust_fields(ID, (ONE, TWO)) == trust
    assert await store.store_secrets(ID, (TWO,), {}, inspect=False) == {"ONE": "1", "TWO": "2"}
    with pytest.raises(HostError, match="ONE is lost"):
        await store.egress_secrets(ID, (ONE, TWO))
    await store.release(ID)
    assert await store.ca_certificate(ID) == ""


async def test_a_secret_without_a_value_changes_nothing(store: SecretStore) -> None:
    await store.store_secrets(ID, (ONE,), {"ONE": "1"}, inspect=False)
    with pytest.raises(HostError, match="TWO is lost"):
        await store.store_secrets(ID, (TWO,), {}, inspect=False)
    assert [one.value for one in (await store.egress_secrets(ID, (ONE,))).secrets] == ["1"]


async def test_a_ca_only_where_connections_are_opened(store: SecretStore) -> None:
    await store.store_secrets(ID, (), {}, inspect=False)
    assert await store.trust_fields(ID, ()) is None
    await store.store_secrets(ID, (), {}, inspect=True)
    trust = await store.trust_fields(ID, ())
    assert trust is not None
    assert trust["env"] == {}


async def test_a_fork_has_its_parents_values_and_ca(store: SecretStore) -> None:
    await store.store_secrets(ID, (ONE,), {"ONE": "1"}, inspect=False)
    await store.inherit("sbx-2", ID)
    await store.release(ID)
    assert [one.value for one in (await store.egress_secrets("sbx-2", (ONE,))).secrets] == ["1"]
    assert await store.ca_certificate("sbx-2")

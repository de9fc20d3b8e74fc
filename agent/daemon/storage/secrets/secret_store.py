"""Secrets of sandboxes: values and CA in the vault, given to the egress process; placeholders given to the guest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from agent.common.ca import LocalCa
from agent.common.errors import HostError
from agent.common.model import SecretSpec
from agent.common.policy.secret import CaPair, EgressSecrets, Secret
from agent.daemon.storage.secrets.vault import StoredSecrets, Vault


class SecretStore:
    """Stores values of secrets, and creates the CA of each sandbox whose TLS connections the egress process opens."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def open(self) -> None:
        """Read the vault's key, or create it. Blocks.

        :raises HostError: the key cannot be read or created.
        """
        self._vault.open()

    async def store_secrets(
        self, sandbox_id: str, specs: Iterable[SecretSpec], values: Mapping[str, str], *, inspect: bool
    ) -> dict[str, str]:
        """Store the values of these secrets, delete all other values, and create a CA if one is needed.

        :param values: by name; a secret that is left out keeps its stored value.
        :param inspect: whether a CA is needed although there is no secret.
        :return: the values stored before.
        :raises HostError: a secret has no value, or the vault cannot be read or written.
        """
        specs = tuple(specs)
        stored = await self._vault.get(sandbox_id)
        wanted = {}
        for spec in specs:
            value = values.get(spec.name, stored.values.get(spec.name))
            if value is None:
                raise HostError(f"the value of secret {spec.name} is lost; set it anew", reason="STATE_DAMAGED")
            wanted[spec.name] = value
        ca = stored.ca
        if ca is None and (specs or inspect):
            created = await asyncio.to_thread(LocalCa.generate, sandbox_id)
            ca = CaPair(created.certificate_pem, created.key_pem)
        if wanted != dict(stored.values) or ca is not stored.ca:
            await self._vault.put(sandbox_id, StoredSecrets(wanted, ca))
        return dict(stored.values)

    async def inherit(self, sandbox_id: str, parent_id: str) -> None:
        """Copy the stored values and CA of a sandbox to its fork.

        :raises HostError: the vault cannot be read or written.
        """
        await self._vault.put(sandbox_id, await self._vault.get(parent_id))

    async def release(self, sandbox_id: str) -> None:
        """Delete the stored values and CA of a sandbox. Idempotent.

        :raises HostError: the vault cannot be written.
        """
        await self._vault.delete(sandbox_id)

    def fingerprint(self, values: Mapping[str, str]) -> str:
        """Return a digest of values by name, keyed with the node's key; without the key it tells nothing of them."""
        return self._vault.fingerprint(values)

    async def ca_certificate(self, sandbox_id: str) -> str:
        """Return the certificate of a sandbox's CA, in PEM; "" without a CA.

        :raises HostError: the vault cannot be read.
        """
        ca = (await self._vault.get(sandbox_id)).ca
        return "" if ca is None else ca.certificate_pem

    async def trust_fields(self, sandbox_id: str, specs: Iterable[SecretSpec]) -> dict[str, object] | None:
        """Return the fields of the guest's call sys.trust: CA certificate and placeholders; None without a CA.

        :raises HostError: the vault cannot be read.
        """
        ca = (await self._vault.get(sandbox_id)).ca
        if ca is None:
            return None
        return {"certificate": ca.certificate_pem, "env": {spec.name: spec.placeholder for spec in specs}}

    async def egress_secrets(self, sandbox_id: str, specs: tuple[SecretSpec, ...]) -> EgressSecrets:
        """Return the secrets of a sandbox with their values, and its CA, for the egress process.

        :raises HostError: the vault cannot be read, or a value is missing.
        """
        stored = await self._vault.get(sandbox_id)
        missing = [spec.name for spec in specs if spec.name not in stored.values]
        if missing:
            raise HostError(f"the value of secret {missing[0]} is lost; set it anew", reason="STATE_DAMAGED")
        secrets = tuple(
            Secret(
                name=spec.name, placeholder=spec.placeholder, value=stored.values[spec.name], hosts=spec.hosts,
                in_body=spec.in_body, redact=spec.redact,
            )
            for spec in specs
        )  # fmt: skip
        return EgressSecrets(secrets, stored.ca)

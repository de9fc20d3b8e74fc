"""Vault: secret values at rest, one file per sandbox, encrypted with a key of the node (AES-256-GCM, NIST SP 800-38D).

The key is a file beside them that only root can read: it protects copies of the other files (backups, disk images), but
not against root on this host.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from agent.common import stored_json
from agent.common.atomic_file import write_atomically
from agent.common.errors import HostError
from agent.common.policy.secret import CaPair

_KEY_BYTES, _NONCE_BYTES = 32, 12


@dataclass(frozen=True, slots=True)
class StoredSecrets:
    """Secret values of one sandbox by name, and its CA."""

    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca: CaPair | None = None


class Vault:
    """Encrypted files below one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = b""

    def open(self) -> None:
        """Read the node's key, or create it. Blocks.

        :raises HostError: the key cannot be read or created, or is damaged.
        """
        path = self._directory / "node.key"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists():
                write_atomically(path, os.urandom(_KEY_BYTES), mode=0o600, durable=True)
            self._key = path.read_bytes()
        except OSError as error:
            raise HostError(f"cannot read or create {path}: {error.strerror}", reason="STATE_UNAVAILABLE") from error
        if len(self._key) != _KEY_BYTES:
            raise HostError(
                f"{path} is damaged; without it the values of secrets cannot be read: restore it, or remove it once no "
                "sandbox with secrets is left",
                reason="STATE_DAMAGED",
            )

    def fingerprint(self, values: Mapping[str, str]) -> str:
        """Return an HMAC of values by name, keyed with the node's key."""
        text = json.dumps(dict(values), sort_keys=True).encode()
        return hmac.digest(self._key, text, "sha256").hex()

    async def get(self, sandbox_id: str) -> StoredSecrets:
        """Return the stored secrets of a sandbox; empty ones if nothing is stored.

        :raises HostError: the file cannot be read or decrypted.
        """
        return await asyncio.to_thread(self._get, sandbox_id)

    async def put(self, sandbox_id: str, secrets: StoredSecrets) -> None:
        """Replace the stored secrets of a sandbox; empty ones delete the file. Durable.

        :raises HostError: the file cannot be written.
        """
        await asyncio.to_thread(self._put, sandbox_id, secrets)

    async def delete(self, sandbox_id: str) -> None:
        """Delete the stored secrets of a sandbox. Idempotent.

        :raises HostError: the file cannot be deleted.
        """
        await self.put(sandbox_id, StoredSecrets())

    def _path(self, sandbox_id: str) -> Path:
        return self._directory / f"{sandbox_id}.sealed"

    def _get(self, sandbox_id: str) -> StoredSecrets:
        path = self._path(sandbox_id)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return StoredSecrets()
        except OSError as error:
            raise HostError(f"cannot read {path}: {error.strerror}", reason="STATE_UNAVAILABLE") from error
        try:
            text = AESGCM(self._key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], sandbox_id.encode())
            return stored_json.decode(text, StoredSecrets)
        except (InvalidTag, ValueError):
            raise HostError(
                f"{path} cannot be decrypted; delete sandbox {sandbox_id}, or set its secrets anew",
                reason="STATE_DAMAGED",
            ) from None

    def _put(self, sandbox_id: str, secrets: StoredSecrets) -> None:
        path = self._path(sandbox_id)
        try:
            if not secrets.values and secrets.ca is None:
                path.unlink(missing_ok=True)
                return
            text = stored_json.encode(secrets).encode()
            nonce = os.urandom(_NONCE_BYTES)
            data = nonce + AESGCM(self._key).encrypt(nonce, text, sandbox_id.encode())
            write_atomically(path, data, mode=0o600, durable=True)
        except OSError as error:
            raise HostError(f"cannot write {path}: {error.strerror}", reason="STATE_UNAVAILABLE") from error

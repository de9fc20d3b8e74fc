"""Access tokens of the gateway, stored in a file as digests. The text of a token is shown only when it is created."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from pathlib import Path

import msgspec

from agent.common.atomic_file import write_atomically
from agent.common.errors import AgentError, NotFound

PREFIX = "ddo_"  # the Deno SDKs require it unless an organization is given
_SECRET_BYTES = 32
_MODE = 0o640


class TokenFileError(AgentError):
    """The token file is damaged or cannot be read or written."""

    default_reason = "TOKENS_UNUSABLE"


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One token with the limits of its bearer; 0 and an empty list mean no limit.

    :param sha256: hexadecimal digest of the token's text. The text has 256 random bits, so no salt is needed.
    :param org: organization whose sandboxes, volumes and snapshots the bearer can use.
    """

    id: str
    sha256: str
    org: str
    create_time: float
    note: str = ""
    regions: list[str] = []
    max_sandboxes: int = 0
    max_memory_bytes: int = 0
    max_lifetime_s: int = 0


class _Contents(msgspec.Struct):
    tokens: list[Token] = []


def digest_of(text: str) -> str:
    """Return the digest that is stored for a token's text."""
    return hashlib.sha256(text.encode()).hexdigest()


class TokenFile:
    """A file of tokens, which is read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._tokens: list[Token] = []

    def tokens(self) -> list[Token]:
        """Return all tokens; [] if the file does not exist.

        :raises TokenFileError: the file is damaged or cannot be read.
        """
        try:
            facts = self._path.stat()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise TokenFileError(f"cannot read {self._path}: {error.strerror}") from error
        seen = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
        if seen != self._seen:
            try:
                self._tokens = msgspec.json.decode(self._path.read_bytes(), type=_Contents).tokens
            except (OSError, msgspec.MsgspecError) as error:
                raise TokenFileError(
                    f"{self._path} is not a valid token file: {error}; restore it, or remove it and create new tokens"
                ) from error
            self._seen = seen
        return self._tokens

    def check(self, text: str) -> Token | None:
        """Return the token with this text, or None. The time taken does not depend on the result.

        :raises TokenFileError: the file is damaged or cannot be read.
        """
        wanted = digest_of(text)
        found = None
        for token in self.tokens():
            if hmac.compare_digest(token.sha256, wanted):
                found = token
        return found

    def create(self, org: str, **limits: object) -> tuple[Token, str]:
        """Add a token; return it and its text, which is not stored.

        :raises TokenFileError: the file is damaged or cannot be written.
        """
        text = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        values = {
            "id": f"tok-{secrets.token_hex(4)}",
            "sha256": digest_of(text),
            "org": org,
            "create_time": time.time(),
        }
        token = msgspec.convert({**values, **limits}, Token)
        self._write([*self.tokens(), token])
        return token, text

    def revoke(self, token_id: str) -> None:
        """Remove a token.

        :raises NotFound: the file has no token with this id.
        :raises TokenFileError: the file is damaged or cannot be written.
        """
        kept = [token for token in self.tokens() if token.id != token_id]
        if len(kept) == len(self.tokens()):
            raise NotFound(f"no token {token_id}; `sandboxctl token ls` lists the tokens", reason="TOKEN_NOT_FOUND")
        self._write(kept)

    def _write(self, tokens: list[Token]) -> None:
        """Replace the file atomically, keeping its owner (a new file gets its directory's owner)."""
        try:
            self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            known = self._path if self._path.exists() else self._path.parent
            facts = known.stat()
            data = msgspec.json.format(msgspec.json.encode(_Contents(tokens)), indent=1) + b"\n"
            write_atomically(self._path, data, mode=_MODE, durable=True, owner=(facts.st_uid, facts.st_gid))
        except OSError as error:
            raise TokenFileError(f"cannot write {self._path}: {error.strerror}") from error

"""Who may use the gateway: tokens in a file, by their digests. The text of a token is shown once, when it is made."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from pathlib import Path

import msgspec

from agent.common.atomic_file import write_atomically
from agent.common.errors import AgentError, NotFound

PREFIX = "ddo_"  # the SDKs ask for it, unless an organization is given, too
_SECRET_BYTES = 32
_MODE = 0o640


class TokenFileError(AgentError):
    """The file of tokens cannot be used."""

    default_reason = "TOKENS_UNUSABLE"


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One token, and what its bearer may do. 0 and an empty list: no limit of this kind.

    :param sha256: digest of the token's text, hexadecimal. The text has 256 random bits, so no salt is needed.
    :param org: whose sandboxes, volumes and snapshots it is about.
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
    """Returns what is kept of a token's text."""
    return hashlib.sha256(text.encode()).hexdigest()


class TokenFile:
    """The tokens of one file, read again whenever it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._tokens: list[Token] = []

    def tokens(self) -> list[Token]:
        """Returns all tokens; none if there is no file. :raises TokenFileError: it is damaged, or not readable."""
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
                    f"{self._path} is not a file of tokens: {error}; restore it, or remove it and make new ones"
                ) from error
            self._seen = seen
        return self._tokens

    def check(self, text: str) -> Token | None:
        """Returns the token with this text; takes as long whether there is one or not."""
        wanted = digest_of(text)
        found = None
        for token in self.tokens():
            if hmac.compare_digest(token.sha256, wanted):
                found = token
        return found

    def create(self, org: str, **limits: object) -> tuple[Token, str]:
        """Adds a token and returns it with its text, which is kept nowhere. :raises TokenFileError:"""
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
        """Removes a token. :raises NotFound: there is none with this id. :raises TokenFileError:"""
        kept = [token for token in self.tokens() if token.id != token_id]
        if len(kept) == len(self.tokens()):
            raise NotFound(
                f"no token {token_id}; `sandboxctl token ls` shows which there are", reason="TOKEN_NOT_FOUND"
            )
        self._write(kept)

    def _write(self, tokens: list[Token]) -> None:
        """Replaces the file in one step; it stays readable for whom it was, or for its directory's owner."""
        try:
            self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            known = self._path if self._path.exists() else self._path.parent
            facts = known.stat()
            data = msgspec.json.format(msgspec.json.encode(_Contents(tokens)), indent=1) + b"\n"
            write_atomically(self._path, data, mode=_MODE, durable=True, owner=(facts.st_uid, facts.st_gid))
        except OSError as error:
            raise TokenFileError(f"cannot write {self._path}: {error.strerror}") from error

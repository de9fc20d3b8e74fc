"""Injecting values of secrets into requests, and redacting them in responses. Pure: over headers and bytes.

Values are injected into header values, Basic credentials (decoded and encoded again), the query, and bodies if the
secret allows it. Redaction is best effort: docs/egress.md lists its limits.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from agent.common.policy.secret import Secret
from agent.egress.http.stream_replacer import StreamReplacer

Headers = list[tuple[bytes, bytes]]
MIN_REDACTED_BYTES = 8  # a shorter value occurs by chance
_CREDENTIALS = frozenset({b"authorization", b"proxy-authorization"})
_FORM, _JSON = b"application/x-www-form-urlencoded", b"json"


class SecretInjection:
    """Injection into one request, and redaction of its response.

    :param secrets: secrets whose values may be sent to the request's host.
    """

    def __init__(self, secrets: Sequence[Secret]) -> None:
        self._secrets = secrets
        self._plain = {secret.placeholder.encode(): secret.value.encode() for secret in secrets}
        self._reflected: dict[bytes, bytes] = {}

    # -- requests ------------------------------------------------------------------------------------------------------

    def inject(self, target: bytes, headers: Headers, *, has_body: bool) -> tuple[bytes, Headers]:
        """Return a request's target and headers, without pseudo-headers, with placeholders replaced by values.

        Of the target, only the query gets values, percent-encoded: paths are logged more often. If a value may be in
        the request, `body` included, the server is asked not to compress the response, so that it can be redacted.
        """
        if not self._secrets:
            return target, headers
        replacer = StreamReplacer(self._plain)
        changed = [(name, self._header(name.lower(), value, replacer)) for name, value in headers]
        filled = self._target(target)
        injected = changed != headers or filled != target or (has_body and any(each.in_body for each in self._secrets))
        if injected and any(secret.redact for secret in self._secrets):
            changed = [(name, b"identity" if name.lower() == b"accept-encoding" else value) for name, value in changed]
        return filled, changed if injected else headers

    def _header(self, name: bytes, value: bytes, replacer: StreamReplacer) -> bytes:
        if name in _CREDENTIALS and (credentials := basic_credentials(value)) is not None:
            scheme = value[: len(value) - len(value[6:].lstrip())]
            filled = replacer.whole(credentials)
            if filled == credentials:
                return value
            sent = base64.b64encode(filled)
            self._reflected[sent] = _masked(base64.b64encode(credentials), len(sent))
            return scheme + sent
        return replacer.whole(value)

    def _target(self, target: bytes) -> bytes:
        path, mark, query = target.partition(b"?")
        if not mark:
            return target
        quoted = {needle: quote(value, safe="").encode() for needle, value in self._plain.items()}
        return path + mark + StreamReplacer(quoted).whole(query)

    def body(self, content_type: bytes) -> StreamReplacer | None:
        """Return the replacer for a request body, with values encoded for its type; None if no secret allows bodies."""
        chosen = [secret for secret in self._secrets if secret.in_body]
        if not chosen:
            return None
        return StreamReplacer(
            {secret.placeholder.encode(): _encoded_for(secret.value, content_type) for secret in chosen}
        )

    # -- responses -----------------------------------------------------------------------------------------------------

    def redactor(self) -> StreamReplacer | None:
        """Return the replacer that redacts values in a response; it keeps lengths. None without anything to redact."""
        pairs: dict[bytes, bytes] = {}
        for secret in self._secrets:
            if secret.redact and len(secret.value) >= MIN_REDACTED_BYTES:
                for form in _encodings(secret.value):
                    pairs[form] = _masked(secret.placeholder.encode(), len(form))
        if not pairs:
            return None
        return StreamReplacer({**pairs, **self._reflected})


def basic_credentials(value: bytes) -> bytes | None:
    """Return the decoded credentials of "Basic ..." (RFC 7617); None for another scheme or invalid base64."""
    if value[:6].lower() != b"basic ":
        return None
    try:
        return base64.b64decode(value[6:].strip(), validate=True)
    except binascii.Error:
        return None


def secrets_mentioned(secrets: Iterable[Secret], target: bytes, headers: Headers) -> list[Secret]:
    """Return the secrets whose placeholders occur in a request's target, header values or credentials."""
    texts = [target]
    for name, value in headers:
        texts.append(value)
        if name.lower() in _CREDENTIALS:
            texts.append(basic_credentials(value) or b"")
    everything = b"\n".join(texts)
    return [secret for secret in secrets if secret.placeholder.encode() in everything]


def _encoded_for(value: str, content_type: bytes) -> bytes:
    kind = content_type.partition(b";")[0].strip().lower()
    if kind == _FORM:
        return quote(value, safe="").encode()
    if kind.endswith(_JSON):
        return json.dumps(value)[1:-1].encode()
    return value.encode()


def _encodings(value: str) -> set[bytes]:
    """Return the encodings in which servers reflect a text: plain, JSON, URL, HTML, base64."""
    html = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    texts = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], quote(value, safe=""), html}
    return {text.encode() for text in texts} | {base64.b64encode(value.encode())}


def _masked(placeholder: bytes, size: int) -> bytes:
    return placeholder[:size].ljust(size, b"*")


def find(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Return the first value of a header, or b""."""
    return next((value for key, value in headers if key.lower() == name), b"")


def redact_headers(headers: Headers, redactor: StreamReplacer | None) -> Headers:
    """Return a response's headers with values redacted."""
    return headers if redactor is None else [(name, redactor.whole(value)) for name, value in headers]

"""Puts values of secrets into requests, and takes them out of responses. Pure: over headers and bytes.

In: header values, Basic credentials (decoded and encoded again), the query; bodies where the secret says so. Out: what
the host that got a value says, as best as can be (docs/egress.md says what this is not).
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
MIN_REDACTED_BYTES = 8  # a shorter value is found where it was never put in
_CREDENTIALS = frozenset({b"authorization", b"proxy-authorization"})
_FORM, _JSON = b"application/x-www-form-urlencoded", b"json"


class SecretInjection:
    """What is put into the requests of one connection, and what is taken out of their responses.

    :param secrets: those whose values may go to this host.
    """

    def __init__(self, secrets: Sequence[Secret]) -> None:
        self._secrets = secrets
        self._plain = {secret.placeholder.encode(): secret.value.encode() for secret in secrets}
        self._reflected: dict[bytes, bytes] = {}
        self.used = False  # by some request on this connection

    # -- requests ------------------------------------------------------------------------------------------------------

    def headers(self, headers: Headers) -> Headers:
        """Returns the headers with values; where one went in, the answer must come in a form that can be read."""
        replacer = StreamReplacer(self._plain)
        changed = [(name, self._header(name.lower(), value, replacer)) for name, value in headers]
        if not replacer.count:
            return headers
        self.used = True
        return changed

    def readable_answer(self, headers: Headers) -> Headers:
        """Returns the headers so that the host does not compress what could have a value in it."""
        if not self.used or not any(secret.redact for secret in self._secrets):
            return headers
        return [(name, b"identity" if name.lower() == b"accept-encoding" else value) for name, value in headers]

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

    def target(self, target: bytes) -> bytes:
        """Returns the request target with values in its query, percent-encoded."""
        path, mark, query = target.partition(b"?")
        if not mark:
            return target
        quoted = {needle: quote(value, safe="").encode() for needle, value in self._plain.items()}
        replacer = StreamReplacer(quoted)
        query = replacer.whole(query)
        self.used = self.used or replacer.count > 0
        return path + mark + query

    def body(self, content_type: bytes) -> StreamReplacer | None:
        """Returns what fills a request body, in the form that its type asks for; None if nothing may be put in."""
        chosen = [secret for secret in self._secrets if secret.in_body]
        if not chosen:
            return None
        return StreamReplacer(
            {secret.placeholder.encode(): _encoded_for(secret.value, content_type) for secret in chosen}
        )

    # -- responses -----------------------------------------------------------------------------------------------------

    def redactor(self) -> StreamReplacer | None:
        """Returns what takes values out of a response; every value by as many bytes, so that no length is wrong."""
        pairs: dict[bytes, bytes] = {}
        for secret in self._secrets:
            if secret.redact and len(secret.value) >= MIN_REDACTED_BYTES:
                for form in _encodings(secret.value):
                    pairs[form] = _masked(secret.placeholder.encode(), len(form))
        if not pairs:
            return None
        return StreamReplacer({**pairs, **self._reflected})


def basic_credentials(value: bytes) -> bytes | None:
    """Returns the decoded credentials of "Basic ..." (RFC 7617); None if it is something else."""
    if value[:6].lower() != b"basic ":
        return None
    try:
        return base64.b64decode(value[6:].strip(), validate=True)
    except binascii.Error:
        return None


def secrets_mentioned(secrets: Iterable[Secret], target: bytes, headers: Headers) -> list[Secret]:
    """Returns those secrets whose placeholders are in a request's target, header values or credentials."""
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
    """Returns the ways in which servers write a text back: as it is, in JSON, in a URL, in HTML, in base64."""
    html = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    texts = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], quote(value, safe=""), html}
    return {text.encode() for text in texts} | {base64.b64encode(value.encode())}


def _masked(placeholder: bytes, size: int) -> bytes:
    return placeholder[:size].ljust(size, b"*")


def find(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Returns the first value of a header; b"" if there is none."""
    return next((value for key, value in headers if key.lower() == name), b"")


def redact_headers(headers: Headers, redactor: StreamReplacer | None) -> Headers:
    """Returns a response's headers without values."""
    return headers if redactor is None else [(name, redactor.whole(value)) for name, value in headers]

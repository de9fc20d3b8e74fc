"""Reading and filtering heads of HTTP/1.1 messages. Pure. RFC 9110, 9112."""

from __future__ import annotations

import re
from typing import cast
from urllib.parse import urlsplit

import h11

from agent.common.policy.reasons import Reason
from agent.egress.http import secret_injection
from agent.egress.http.secret_injection import Headers
from agent.egress.sandbox_state import Denied

_AUTHORITY = re.compile(rb"\A[^/?#]*")
_UPGRADES = frozenset({b"websocket"})
# Removed unless the upgrade is supported, which makes it an ordinary request (RFC 9110, 7.8).
_UPGRADE_HEADERS = frozenset({b"upgrade", b"http2-settings"})


def has_body(request: h11.Request) -> bool:
    """Return whether a request has a body (RFC 9112, 6)."""
    size = secret_injection.find(request.headers, b"content-length")
    return size.strip(b"0") != b"" or secret_injection.find(request.headers, b"transfer-encoding") != b""


def body_length(request: h11.Request, response: h11.Response) -> int | None:
    """Return the length of a response's body if Content-Length states it, else None (RFC 9112, 6.3)."""
    size = secret_injection.find(response.headers, b"content-length")
    chunked = secret_injection.find(response.headers, b"transfer-encoding")
    without = request.method == b"HEAD" or response.status_code in (204, 304)
    return int(size) if size and not chunked and not without else None


def says_close(head: h11.Request | h11.Response) -> bool:
    """Return whether the connection ends after this message (RFC 9112, 9.3)."""
    words = b",".join(value for name, value in head.headers if name == b"connection").lower()
    return head.http_version < b"1.1" or b"close" in [word.strip() for word in words.split(b",")]


def forwarded(request: h11.Request) -> Headers:
    """Return the headers to forward.

    :raises Denied: the length of the body is ambiguous.
    """
    headers = cast("Headers", list(request.headers.raw_items()))
    names = [name.lower() for name, _ in headers]
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
        raise Denied(Reason.MALFORMED, "a body with two lengths")
    upgrade = secret_injection.find(headers, b"upgrade").strip().lower()
    if b"upgrade" not in names or upgrade in _UPGRADES:
        return headers
    kept = [(name, value) for name, value in headers if name.lower() not in _UPGRADE_HEADERS]
    return [(name, _without_upgrade(value)) if name.lower() == b"connection" else (name, value) for name, value in kept]


def _without_upgrade(value: bytes) -> bytes:
    words = [word.strip() for word in value.split(b",")]
    return b", ".join(word for word in words if word.lower() not in _UPGRADE_HEADERS) or b"keep-alive"


def authority_of(request: h11.Request, headers: Headers) -> str:
    """Return the authority of a request: "host" or "host:port".

    :raises Denied: it has none, or two that differ; or it is a CONNECT request.
    """
    host = secret_injection.find(headers, b"host").decode("latin-1").strip()
    target = request.target.decode("latin-1")
    if request.method == b"CONNECT":
        raise Denied(Reason.PROTOCOL_NOT_ALLOWED, target)
    if not target.startswith("/") and target != "*":
        try:
            named = urlsplit(target)
        except ValueError:
            raise Denied(Reason.MALFORMED, host) from None
        if named.scheme.lower() not in ("http", "https") or not named.netloc:
            raise Denied(Reason.MALFORMED, host)
        if named.netloc.lower() != host.lower():
            raise Denied(Reason.HOST_MISMATCH, named.netloc)
    if not host:
        raise Denied(Reason.NO_SERVER_NAME)
    return host


def origin_form(target: bytes) -> bytes:
    """Return the target without the authority that `authority_of` has checked (RFC 9112, 3.2.1).

    An absolute URL loses its fragment, too: a request target has none (RFC 9112, 3.2.2), and the server could parse it
    as part of the path.
    """
    if target.startswith(b"/") or target == b"*":
        return target
    after_scheme = target.partition(b"://")[2]
    # `urlsplit` ends the authority at the same characters (RFC 3986, 3.2), so exactly the checked part is removed.
    path_and_query = _AUTHORITY.sub(b"", after_scheme, count=1).partition(b"#")[0]
    return path_and_query if path_and_query.startswith(b"/") else b"/" + path_and_query

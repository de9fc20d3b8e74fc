"""What the heads of HTTP/1.1 messages say, and what of them goes on. Pure. RFC 9110, 9112."""

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
# What an upgrade that we do not pass on would need; the request is then an ordinary one (RFC 9110, 7.8).
_UPGRADE_HEADERS = frozenset({b"upgrade", b"http2-settings"})


def body_length(request: h11.Request, response: h11.Response) -> int | None:
    """Returns how long a response's body is, if it says so and has one (RFC 9112, 6.3)."""
    size = secret_injection.find(response.headers, b"content-length")
    chunked = secret_injection.find(response.headers, b"transfer-encoding")
    without = request.method == b"HEAD" or response.status_code in (204, 304)
    return int(size) if size and not chunked and not without else None


def says_close(head: h11.Request | h11.Response) -> bool:
    """Whether the connection ends with this message (RFC 9112, 9.3)."""
    words = b",".join(value for name, value in head.headers if name == b"connection").lower()
    return head.http_version < b"1.1" or b"close" in [word.strip() for word in words.split(b",")]


def forwarded(request: h11.Request) -> Headers:
    """Returns the headers that go on. :raises Denied: they can be read in two ways."""
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
    """Returns "host" or "host:port" that the request is for. :raises Denied: none, or two that differ."""
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

    An absolute URL loses its fragment, too: a request target has none (RFC 9112, 3.2.2), and the server could read it
    as a part of the path.
    """
    if target.startswith(b"/") or target == b"*":
        return target
    after_scheme = target.partition(b"://")[2]
    # `urlsplit` ends the authority at the same characters (RFC 3986, 3.2): what was checked is what is cut off.
    path_and_query = _AUTHORITY.sub(b"", after_scheme, count=1).partition(b"#")[0]
    return path_and_query if path_and_query.startswith(b"/") else b"/" + path_and_query

"""HTTP client of the method fetch: redirects, request and response headers, content decoding."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from agent.gateway.errors import CallError
from agent.gateway.methods.params import network_params

_MAX_REDIRECTS = 20
_CONNECT_S = 30.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
NO_BODY = frozenset({101, 204, 205, 304})
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
_CREDENTIALS = frozenset({"authorization", "cookie", "proxy-authorization"})
_BODY_HEADERS = frozenset(
    {"content-length", "content-type", "content-encoding", "content-language", "content-location"}
)
# RFC 1952, and for deflate RFC 1950 or the bare RFC 1951 that some servers send.
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 47}

CLIENT_ERRORS = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, httpcore.PoolTimeout)

Headers = list[tuple[str, str]]


def parse_target(url: str) -> tuple[str, str, str, int]:
    """Return scheme, authority, host and port of a URL.

    :raises CallError: it is not an absolute URL with http or https.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise CallError("TypeError", f"invalid URL {url[:200]!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise CallError("TypeError", f"cannot fetch {url[:200]!r}: give an absolute URL with http or https")
    return parts.scheme, parts.netloc.rpartition("@")[2], host, port or (443 if parts.scheme == "https" else 80)


async def send(
    pool: httpcore.AsyncConnectionPool, stack: contextlib.AsyncExitStack, params: network_params.Fetch,
    body: AsyncIterator[bytes] | None, *, plain: bool,
) -> httpcore.Response:  # fmt: skip
    """Send a request and return the response, after redirects unless they are to be returned.

    :param stack: closes the responses.
    :param body: pieces of the request's body; it cannot be sent again after a redirect.
    :param plain: use HTTP without TLS for any scheme, on the pool's fixed address.
    :raises CallError: the request failed, or a redirect cannot be followed.
    """
    url, method = params.url, params.method
    headers = [(name, value) for name, value in params.headers if name.lower() not in _HOP_BY_HOP]
    for _ in range(_MAX_REDIRECTS + 1):
        response = await _request(pool, stack, method, url, headers, body, plain=plain)
        location = dict(_decoded(response.headers)).get("location")
        if response.status not in _REDIRECTS or location is None or params.redirect == "manual":
            return response
        if params.redirect == "error":
            raise CallError("TypeError", f"{url} redirects, which the request forbids")
        await response.aclose()
        target = urljoin(url, location)
        if response.status == 303 or (response.status in (301, 302) and method == "POST"):
            method, body = ("HEAD" if method == "HEAD" else "GET"), None
            headers = [(name, value) for name, value in headers if name.lower() not in _BODY_HEADERS]
        elif body is not None:
            raise CallError(
                "TypeError", f"{url} redirects with status {response.status}, and a stream cannot be sent again"
            )
        if parse_target(target)[:2] != parse_target(url)[:2]:
            headers = [(name, value) for name, value in headers if name.lower() not in _CREDENTIALS]
        url = target
    raise CallError("TypeError", f"{params.url} redirects more than {_MAX_REDIRECTS} times")


async def _request(
    pool: httpcore.AsyncConnectionPool, stack: contextlib.AsyncExitStack, method: str, url: str, headers: Headers,
    body: AsyncIterator[bytes] | None, *, plain: bool,
) -> httpcore.Response:  # fmt: skip
    scheme, authority, host, port = parse_target(url)
    parts = urlsplit(url)
    names = {name.lower() for name, _ in headers}
    sent = [("host", authority)] if "host" not in names else []
    sent += headers
    if "accept" not in names:
        sent.append(("accept", "*/*"))
    if body is not None and "content-length" not in names:
        sent.append(("transfer-encoding", "chunked"))
    try:
        address = httpcore.URL(
            scheme=b"http" if plain else scheme.encode(), host=host.encode("idna" if not host.isascii() else "ascii"),
            port=port, target=(parts.path or "/").encode() + (f"?{parts.query}".encode() if parts.query else b""),
        )  # fmt: skip
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent]
        request = httpcore.Request(
            method, address, headers=raw, content=body, extensions={"timeout": {"connect": _CONNECT_S}}
        )
        response = await pool.handle_async_request(request)
    except UnicodeError as error:
        raise CallError(
            "TypeError", f"the request to {url[:200]!r} has characters that HTTP does not allow: {error}"
        ) from None
    except (*CLIENT_ERRORS, httpcore.UnsupportedProtocol) as error:
        raise CallError(
            "TypeError", f"error sending request for url ({url[:500]}): {error or type(error).__name__}"
        ) from None
    stack.push_async_callback(response.aclose)
    return response


def _decoded(headers: Any) -> Headers:
    return [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]


def response_head(response: httpcore.Response) -> dict[str, object]:
    """Return status and headers in the SDKs' form, without headers of the connection and of a decoded encoding."""
    reason = response.extensions.get("reason_phrase", b"")
    headers = [(name, value) for name, value in _decoded(response.headers) if name not in _HOP_BY_HOP]
    if _encoding(response):
        headers = [(name, value) for name, value in headers if name not in ("content-encoding", "content-length")]
    return {"status": response.status, "statusText": reason.decode("latin-1"), "headers": headers}


def _encoding(response: httpcore.Response) -> str:
    """Return the content encoding of a response if it is decoded here, else ""."""
    value = dict(_decoded(response.headers)).get("content-encoding", "").strip().lower()
    return value if value in _WINDOW_BITS else ""


async def body_pieces(response: httpcore.Response) -> AsyncIterator[bytes]:
    """Yield the decoded body of a response."""
    encoding = _encoding(response)
    decoder = zlib.decompressobj(_WINDOW_BITS[encoding]) if encoding else None
    async for data in response.aiter_stream():
        if decoder is None:
            yield data
            continue
        while data:
            yield decoder.decompress(data, 1 << 20)  # bounds the memory that a small input can expand to
            data = decoder.unconsumed_tail  # noqa: PLW2901  the input that did not fit

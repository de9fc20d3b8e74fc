"""The method fetch: an HTTP request from inside the sandbox's network, with streamed bodies and redirects."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from agent.gateway.errors import Failure, process_gone
from agent.gateway.jsonrpc import schema
from agent.gateway.jsonrpc.connection import Connection, method
from agent.gateway.jsonrpc.streams import Outbound
from agent.gateway.methods.deno import listener
from agent.gateway.methods.file_io import source_pieces
from agent.gateway.nodes import guest_http

_MAX_REDIRECTS = 20
_CONNECT_S = 30.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NO_BODY = frozenset({101, 204, 205, 304})
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
_OF_ONE_ORIGIN = frozenset({"authorization", "cookie", "proxy-authorization"})
_OF_A_BODY = frozenset({"content-length", "content-type", "content-encoding", "content-language", "content-location"})
# RFC 1952 and RFC 1950, or what some servers send as deflate: RFC 1951 alone.
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 47}

Headers = list[tuple[str, str]]


def _target(url: str) -> tuple[str, str, str, int]:
    """Returns (scheme, authority, host, port). :raises Failure: not an absolute http(s) URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise Failure("TypeError", f"invalid URL {url[:200]!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise Failure("TypeError", f"cannot fetch {url[:200]!r}: give an absolute URL with http or https")
    return parts.scheme, parts.netloc.rpartition("@")[2], host, port or (443 if parts.scheme == "https" else 80)


@method("fetch", schema.Fetch)
async def fetch(connection: Connection, params: schema.Fetch) -> object:
    """Makes a request and returns the response's head; its body is a stream."""
    _target(params.url)
    attachment = connection.attachment
    fixed = None
    if params.pid is not None:
        found = await listener(attachment, params.pid)
        if found is None:
            raise process_gone(params.pid)
        fixed = (_reachable(found.host), found.port)
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(await guest_http.pool(attachment.api, attachment.id, fixed))
        body = None
        if params.body_stream_id is not None:
            body = source_pieces(await stack.enter_async_context(connection.inbound(params.body_stream_id)))
        response = await _follow(pool, stack, params, body, plain=fixed is not None)
        head = _head(response)
        if response.status in _NO_BODY or params.method == "HEAD":
            return {**head, "bodyStreamId": None}
        stream = connection.outbound()
        connection.spawn(_deliver(connection, response, stream, stack.pop_all()))
        return {**head, "bodyStreamId": stream.id}


def _reachable(host: str) -> str:
    """Returns where to connect to a socket that is bound to an address, or to all of them."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  looked up, not bound


async def _follow(
    pool: httpcore.AsyncConnectionPool, stack: contextlib.AsyncExitStack, params: schema.Fetch,
    body: AsyncIterator[bytes] | None, *, plain: bool,
) -> httpcore.Response:  # fmt: skip
    """Returns the response, that at the end of all redirects if they are followed. :raises Failure:"""
    url, verb = params.url, params.method
    headers = [(name, value) for name, value in params.headers if name.lower() not in _HOP_BY_HOP]
    for _ in range(_MAX_REDIRECTS + 1):
        response = await _request(pool, stack, verb, url, headers, body, plain=plain)
        where = dict(_decoded(response.headers)).get("location")
        if response.status not in _REDIRECTS or where is None or params.redirect == "manual":
            return response
        if params.redirect == "error":
            raise Failure("TypeError", f"{url} redirects, which the request forbids")
        await response.aclose()
        target = urljoin(url, where)
        if response.status == 303 or (response.status in (301, 302) and verb == "POST"):
            verb, body = ("HEAD" if verb == "HEAD" else "GET"), None
            headers = [(name, value) for name, value in headers if name.lower() not in _OF_A_BODY]
        elif body is not None:
            raise Failure(
                "TypeError", f"{url} redirects with status {response.status}, and a stream cannot be sent again"
            )
        if _target(target)[:2] != _target(url)[:2]:
            headers = [(name, value) for name, value in headers if name.lower() not in _OF_ONE_ORIGIN]
        url = target
    raise Failure("TypeError", f"{params.url} redirects more than {_MAX_REDIRECTS} times")


async def _request(
    pool: httpcore.AsyncConnectionPool, stack: contextlib.AsyncExitStack, verb: str, url: str, headers: Headers,
    body: AsyncIterator[bytes] | None, *, plain: bool,
) -> httpcore.Response:  # fmt: skip
    scheme, authority, host, port = _target(url)
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
            verb, address, headers=raw, content=body, extensions={"timeout": {"connect": _CONNECT_S}}
        )
        response = await pool.handle_async_request(request)
    except UnicodeError as error:
        raise Failure(
            "TypeError", f"the request to {url[:200]!r} has letters that HTTP cannot carry: {error}"
        ) from None
    except (*_CLIENT_ERRORS, httpcore.UnsupportedProtocol) as error:
        raise Failure(
            "TypeError", f"error sending request for url ({url[:500]}): {error or type(error).__name__}"
        ) from None
    stack.push_async_callback(response.aclose)
    return response


_CLIENT_ERRORS = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, httpcore.PoolTimeout)


def _decoded(headers: Any) -> Headers:
    return [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]


def _head(response: httpcore.Response) -> dict[str, object]:
    reason = response.extensions.get("reason_phrase", b"")
    headers = [(name, value) for name, value in _decoded(response.headers) if name not in _HOP_BY_HOP]
    if _encoding(response):
        headers = [(name, value) for name, value in headers if name not in ("content-encoding", "content-length")]
    return {"status": response.status, "statusText": reason.decode("latin-1"), "headers": headers}


def _encoding(response: httpcore.Response) -> str:
    """Returns the encoding that is undone here, "" if there is none."""
    value = dict(_decoded(response.headers)).get("content-encoding", "").strip().lower()
    return value if value in _WINDOW_BITS else ""


async def _body(response: httpcore.Response) -> AsyncIterator[bytes]:
    encoding = _encoding(response)
    decoder = zlib.decompressobj(_WINDOW_BITS[encoding]) if encoding else None
    async for data in response.aiter_stream():
        if decoder is None:
            yield data
            continue
        while data:
            yield decoder.decompress(data, 1 << 20)  # a little at a time, however much it becomes
            data = decoder.unconsumed_tail  # noqa: PLW2901  what is left of it


async def _deliver(
    connection: Connection, response: httpcore.Response, stream: Outbound, stack: contextlib.AsyncExitStack
) -> None:
    async with stack:
        try:
            async for data in _body(response):
                if not stream.open:
                    break
                await stream.write(data)
            await stream.end()
        except (*_CLIENT_ERRORS, zlib.error) as error:
            await stream.fail(Failure("TypeError", f"error reading a body from connection: {error}"))
        except Failure as failure:  # of the request's own body
            await stream.fail(failure)
        finally:
            connection.forget(stream)

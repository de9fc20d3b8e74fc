"""Protocol detection from the first bytes of a connection. Pure; the bytes are hostile.

TLS: RFC 8446, 4.1.2 and RFC 6066, 3. HTTP/1: RFC 9112, 3. HTTP/2 without TLS: RFC 9113, 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

MAX_HELLO_BYTES = 64 << 10
_MAX_LINE_BYTES = 8 << 10
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# RFC 9110, 9.3; RFC 5789; RFC 4918, 9 and its kin; what HTTP/2 begins with.
_METHODS = frozenset(
    b"GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH PROPFIND PROPPATCH MKCOL COPY MOVE LOCK UNLOCK REPORT "
    b"SEARCH MKCALENDAR ACL BIND QUERY PURGE PRI".split()
)
_MAX_BLANKS = 64
_HANDSHAKE, _CLIENT_HELLO = 22, 1
_SERVER_NAME, _ALPN = 0, 16
_MAX_RECORD_BYTES = 1 << 14


class WireProtocol(Enum):
    """Protocol of a connection."""

    TLS = auto()
    HTTP1 = auto()
    HTTP2 = auto()
    OPAQUE = auto()  # anything else


class Incomplete(Exception):
    """More bytes are needed."""


class Malformed(Exception):
    """The bytes begin like TLS, but are not a valid ClientHello."""


class TooLarge(Exception):
    """More bytes are needed than the limit allows."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """Fields of a TLS ClientHello: server name as sent ("" without one) and offered protocols (ALPN)."""

    server_name: str
    alpn: tuple[str, ...] = ()


def classify(data: bytes) -> WireProtocol:
    """Return the protocol that these first bytes belong to.

    A first line with "HTTP/" in it counts as HTTP, however malformed: a server may parse it as such.

    :raises Incomplete: more bytes are needed to tell.
    :raises TooLarge: the first line is over 8 KiB.
    """
    if not data:
        raise Incomplete
    if data[0] == _HANDSHAKE:
        return WireProtocol.TLS
    if _HTTP2_PREFACE.startswith(data[: len(_HTTP2_PREFACE)]):
        if len(data) < len(_HTTP2_PREFACE):
            raise Incomplete
        return WireProtocol.HTTP2
    text = data.lstrip(b"\r\n")
    line, newline, _ = text.partition(b"\n")
    if b"HTTP/" in line[:_MAX_LINE_BYTES].upper():
        return WireProtocol.HTTP1
    if newline or not _could_be_http(line):
        return WireProtocol.OPAQUE
    if len(data) >= _MAX_LINE_BYTES:
        raise TooLarge
    raise Incomplete


def _could_be_http(line: bytes) -> bool:
    """Return whether an incomplete line may become "METHOD target HTTP/1.1" with a known method.

    If not, waiting for more would deadlock with a client of another protocol that waits for an answer.
    """
    words = line.upper().split(None, 1)
    if not words:
        return len(line) < _MAX_BLANKS
    whole = len(words) > 1 or line[-1:].isspace()
    return words[0] in _METHODS if whole else any(method.startswith(words[0]) for method in _METHODS)


def parse_hello(data: bytes) -> ClientHello:
    """Parse the ClientHello at the beginning of `data`, in one or several TLS records.

    :raises Incomplete: it is incomplete.
    :raises Malformed: it is not a valid ClientHello.
    :raises TooLarge: it is over 64 KiB.
    """
    body = _handshake(data)
    if body[0] != _CLIENT_HELLO:
        raise Malformed
    hello = _Reader(body[4:])
    hello.take(2 + 32)
    hello.block(1)  # session id
    hello.block(2)  # cipher suites
    hello.block(1)  # compression methods
    name = ""
    alpn: tuple[str, ...] = ()
    if hello.left():
        extensions = _Reader(hello.block(2))
        seen: set[int] = set()
        while extensions.left():
            kind = extensions.number(2)
            value = _Reader(extensions.block(2))
            if kind in seen:
                raise Malformed  # ambiguous: parsers may use the first or the last
            seen.add(kind)
            if kind == _SERVER_NAME:
                name = _server_name(value)
            elif kind == _ALPN:
                alpn = _protocols(value)
    return ClientHello(name, alpn)


def _handshake(data: bytes) -> bytes:
    """Return the first handshake message, reassembled from its records."""
    message = b""
    at = 0
    while True:
        if len(data) < at + 5:
            raise _incomplete(data)
        size = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at] != _HANDSHAKE or data[at + 1] != 3 or not 0 < size <= _MAX_RECORD_BYTES:
            raise Malformed
        message += data[at + 5 : at + 5 + size]
        if len(message) >= 4:
            wanted = 4 + int.from_bytes(message[1:4], "big")
            if wanted > MAX_HELLO_BYTES:
                raise TooLarge
            if len(message) >= wanted:
                return message[:wanted]
        at += 5 + size
        if at > len(data):
            raise _incomplete(data)


def _incomplete(data: bytes) -> Exception:
    return TooLarge() if len(data) > MAX_HELLO_BYTES else Incomplete()


def _server_name(value: _Reader) -> str:
    names = _Reader(value.block(2))
    found = ""
    while names.left():
        kind = names.number(1)
        name = names.block(2)
        if kind == 0:
            if found or not name:
                raise Malformed
            found = name.decode("ascii", errors="replace")
    return found


def _protocols(value: _Reader) -> tuple[str, ...]:
    names = _Reader(value.block(2))
    found = []
    while names.left():
        found.append(names.block(1).decode("ascii", errors="replace"))
    return tuple(found)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if self.left() < count:
            raise Malformed
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, size: int) -> bytes:
        return self.take(self.number(size))

"""What first bytes are taken for; hostile ones above all."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.egress.tcp import sniff
from agent.egress.tcp.sniff import WireProtocol


def hello(name: str | None = "web.example", alpn: tuple[str, ...] = ()) -> bytes:
    """A real ClientHello."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x16\x03\x01", WireProtocol.TLS),
        (b"GET / HTTP/1.1\r\n", WireProtocol.HTTP1),
        (b"get  /\thttp/1.1\r\n", WireProtocol.HTTP1),
        (b"\r\n\r\nGET / HTTP/1.1\r\n", WireProtocol.HTTP1),
        (b"ODD /" + b"a" * 4000 + b" HTTP/1.0\r\n", WireProtocol.HTTP1),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0", WireProtocol.HTTP2),
        (b"SSH-2.0-x\r\n", WireProtocol.OPAQUE),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", WireProtocol.OPAQUE),  # postgres asks for TLS
        (b"PING", WireProtocol.OPAQUE),
        (b"x", WireProtocol.OPAQUE),
        (b"EHLO me\r\n", WireProtocol.OPAQUE),
        (b"GET /\r\n", WireProtocol.OPAQUE),
        (b"\x80\x2e\x01\x00\x02", WireProtocol.OPAQUE),  # an SSL 2 hello
    ],
)
def test_kinds(data: bytes, kind: WireProtocol) -> None:
    assert sniff.classify(data) is kind


@pytest.mark.parametrize("data", [b"", b"P", b"PRI * HTTP/2.0\r\n", b"GET ", b"get /abc", b"\r\n", b"POST /x HTT"])
def test_too_little_to_tell(data: bytes) -> None:
    with pytest.raises(sniff.Incomplete):
        sniff.classify(data)


def test_a_line_without_end_is_too_large() -> None:
    with pytest.raises(sniff.TooLarge):
        sniff.classify(b"GET /" + b"a" * 9000)


def test_a_real_hello_says_name_and_protocols() -> None:
    assert sniff.parse_hello(hello(alpn=("h2", "http/1.1"))) == sniff.ClientHello("web.example", ("h2", "http/1.1"))
    assert sniff.parse_hello(hello(None)) == sniff.ClientHello("")


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_a_hello_in_many_records_is_one(size: int) -> None:
    body = hello()[5:]
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    records = b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)
    for end in range(0, len(records), max(len(records) // 50, 1)):
        with pytest.raises(sniff.Incomplete):
            sniff.parse_hello(records[:end])
    assert sniff.parse_hello(records).server_name == "web.example"


def extension(kind: int, value: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value


def made(extensions: bytes) -> bytes:
    body = (
        b"\x03\x03"
        + bytes(32)
        + b"\0"
        + b"\0\x02\x13\x01"
        + b"\x01\0"
        + len(extensions).to_bytes(2, "big")
        + extensions
    )
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


def names(*values: bytes) -> bytes:
    entries = b"".join(b"\0" + len(value).to_bytes(2, "big") + value for value in values)
    return len(entries).to_bytes(2, "big") + entries


def test_what_could_be_read_in_two_ways_is_malformed() -> None:
    assert sniff.parse_hello(made(extension(0, names(b"a.example")))).server_name == "a.example"
    for extensions in (
        extension(0, names(b"a.example")) + extension(0, names(b"b.example")),
        extension(0, names(b"a.example", b"b.example")),
        extension(0, names(b"")),
        extension(0, b"\0\x20"),
    ):
        with pytest.raises(sniff.Malformed):
            sniff.parse_hello(made(extensions))


def test_a_hello_that_claims_to_be_huge() -> None:
    with pytest.raises(sniff.TooLarge):
        sniff.parse_hello(b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(100))


@given(st.binary(max_size=300), st.booleans())
def test_nothing_else_than_an_answer_comes_of_any_bytes(data: bytes, as_tls: bool) -> None:
    given_bytes = b"\x16\x03\x01" + data if as_tls else data
    try:
        kind = sniff.classify(given_bytes)
        if kind is WireProtocol.TLS:
            sniff.parse_hello(given_bytes)
    except (sniff.Incomplete, sniff.Malformed, sniff.TooLarge):
        pass

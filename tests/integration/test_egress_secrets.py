"""Secrets: the guest has placeholders, approved hosts get values, and values are nowhere else. In real VMs."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.client import MIB
from tests.support.daemon import Daemon, connected, refused
from tests.support.egress import Box, policy
from tests.support.internet import zone
from tests.support.internet.internet import Internet
from tests.support.internet.zone import WEB

pytestmark = pytest.mark.vm

VALUE = "s3cret/value+that=is&long-" + os.urandom(12).hex()
ALLOW = ("web.example", "api.example", "raw.example", "second-api.example")
TO_WEB = [(6, WEB, 443), (6, zone.WEB6, 443)]


def secret(value: str = VALUE, *hosts: str, **fields: Any) -> pb.Secret:
    return pb.Secret(value=value, hosts=hosts or ("web.example",), **fields)


@pytest.fixture
async def keeper(box: Box) -> Box:
    """The sandbox with one secret, KEY, for web.example."""
    await box.update(policy(ALLOW), {"KEY": secret()}, remove=(set((await box.get()).secrets) - {"KEY"}))
    return box


async def placeholder(box: Box, name: str = "KEY") -> str:
    return str((await box.get()).secrets[name].placeholder)


async def seen(box: Box, mark: int) -> list[dict[str, Any]]:
    return box.internet.since(mark, "http")


async def test_the_environment_has_a_placeholder(keeper: Box) -> None:
    said = await keeper.client.run(keeper.id, "sh", "-c", "echo $KEY; env")
    assert said.stdout.decode().splitlines()[0] == await placeholder(keeper)
    assert VALUE.encode() not in said.stdout
    assert VALUE not in str(await keeper.get())


async def test_the_value_goes_into_headers_credentials_and_query(keeper: Box) -> None:
    mark, key = keeper.internet.mark(), await placeholder(keeper)
    async with keeper.denied(reaches=TO_WEB):
        said = await keeper.probe(
            """
            import base64
            basic = 'Basic ' + base64.b64encode(f'user:{key}'.encode()).decode()
            headers = {'Authorization': f'Bearer {key}', 'X-Twice': f'{key} and {key}'}
            return [
                fetch(f'https://web.example/headers?a=1&key={key}', headers),
                fetch('https://web.example/headers', {'Authorization': basic}),
            ]
            """,
            key=key,
        )
    first, second = await seen(keeper, mark)
    assert dict(first["headers"])["authorization"] == f"Bearer {VALUE}"
    assert dict(first["headers"])["x-twice"] == f"{VALUE} and {VALUE}"
    assert first["query"] == f"a=1&key={quote(VALUE, safe='')}"
    assert dict(second["headers"])["authorization"] == "Basic " + base64.b64encode(f"user:{VALUE}".encode()).decode()
    # And what the host says back of it is taken out.
    text = json.dumps(said)
    assert [answer[0] for answer in said] == [200, 200]
    for hidden in (VALUE, quote(VALUE, safe=""), dict(second["headers"])["authorization"][6:]):
        assert hidden not in text
    assert key[:20] in text


async def test_the_value_goes_nowhere_else(keeper: Box) -> None:
    mark, key = keeper.internet.mark(), await placeholder(keeper)
    async with keeper.denied(
        "secret_withheld", "host_mismatch", reaches=[*TO_WEB, (6, WEB, 80), (6, zone.API, 443), (6, zone.API, 80)]
    ):
        await keeper.probe(
            """
            import base64
            mark = {'X-Key': key}
            fetch('https://api.example/headers', mark)                        # allowed, and not the secret's
            fetch('http://api.example/headers', mark)
            fetch(f'http://web.example/headers?k={key}', mark)                # the secret's, and not encrypted
            https(web, 'api.example', sni='web.example', headers=[f'X-Key: {key}'])     # another host inside
            fetch(f'https://web.example/{key}/path')
            fetch('https://web.example/echo', data=key.encode())
            fetch('https://web.example/headers', {'X-Key': base64.b64encode(key.encode()).decode()})
            """,
            key=key, web=WEB,
        )  # fmt: skip
    lines = await seen(keeper, mark)
    assert len(lines) == 6
    assert VALUE not in json.dumps(lines)
    assert any(key in line["path"] for line in lines)


async def test_a_body_gets_the_value_where_the_secret_says_so(keeper: Box) -> None:
    await keeper.update(secrets={"BODY": secret(VALUE + '"q', "raw.example:9443", in_body=True, allow_reflection=True)})
    key = await placeholder(keeper, "BODY")
    said = await keeper.probe(
        """
        resolve('raw.example')
        def post(body, kind, *more):
            head = [f'Content-Type: {kind}', *more]
            if 'Transfer-Encoding: chunked' in more:
                whole = request('raw.example:9443', '/continue', head, 'POST') + body
            else:
                whole = request('raw.example:9443', '/continue', head, 'POST', body)
            return tls('45.0.0.23', 9443, 'raw.example', [whole[:-7], whole[-7:]])
        return [
            post(f'key={key}'.encode(), 'application/x-www-form-urlencoded', 'Expect: 100-continue'),
            post(json.dumps({'key': key}).encode(), 'application/json', 'Expect: 100-continue'),
        ]
        """,
        key=key,
    )
    # A body of a length that changes is read whole, and goes on without waiting to be asked for.
    assert all("417" in text for text in said), said
    said = await keeper.probe(
        """
        def echo(body, kind):
            return fetch('https://web.example/echo', {'Content-Type': kind}, body)
        return [echo(f'a {key} z'.encode(), 'text/plain'), echo(json.dumps([key]).encode(), 'application/json'),
                echo(b'x' * (1 << 20) + key.encode() + b'y' * 100, 'application/octet-stream')]
        """,
        key=await _in_body_for_web(keeper),
    )
    value = VALUE + '"q'
    assert said[0][1] == f"a {value} z"
    assert json.loads(said[1][1]) == [value]
    assert said[2][1] == "x" * (1 << 20) + value + "y" * 100


async def _in_body_for_web(box: Box) -> str:
    await box.update(
        secrets={"BODY": secret(VALUE + '"q', "web.example", in_body=True, allow_reflection=True)}, remove=["KEY"]
    )
    return await placeholder(box, "BODY")


async def test_a_new_value_needs_nothing_of_the_guest(keeper: Box) -> None:
    key = await placeholder(keeper)
    await keeper.update(secrets={"KEY": secret("another-value-0123456789")})
    assert await placeholder(keeper) == key
    mark = keeper.internet.mark()
    await keeper.probe("return fetch('https://web.example/headers', {'X-Key': key})", key=key)
    assert dict((await seen(keeper, mark))[0]["headers"])["x-key"] == "another-value-0123456789"


async def test_a_secret_comes_and_goes(keeper: Box) -> None:
    await keeper.update(secrets={"OTHER": secret("other-value-0123456789", "api.example", keep_shape=True)})
    other = await placeholder(keeper, "OTHER")
    assert (len(other), [letter.isdigit() for letter in other]) == (
        22,
        [letter.isdigit() for letter in "other-value-0123456789"],
    )
    assert (await keeper.client.run(keeper.id, "sh", "-c", "printf %s $OTHER")).stdout.decode() == other
    mark = keeper.internet.mark()
    await keeper.probe("return fetch('https://api.example/headers', {'X-Key': key})", key=other)
    await keeper.update(remove=["OTHER"])
    assert (await keeper.client.run(keeper.id, "sh", "-c", "printf %s $OTHER")).stdout == b""
    await keeper.probe("return fetch('https://api.example/headers', {'X-Key': key})", key=other)
    assert [dict(line["headers"])["x-key"] for line in await seen(keeper, mark)] == ["other-value-0123456789", other]


async def test_a_server_that_is_not_verified_gets_nothing(box: Box) -> None:
    await box.update(policy(["badcert.example"]), {"KEY": secret(VALUE, "badcert.example")})
    mark = box.internet.mark()
    async with box.denied("upstream_unverified", reaches=[(6, "45.0.0.25", 443)]):
        said = await box.probe("return fetch('https://badcert.example/', {'X-Key': key})", key=await placeholder(box))
    assert said[0] == 502
    assert "certificate" in said[1]
    assert await seen(box, mark) == []


async def test_streams_upgrades_and_interim_answers_pass(keeper: Box) -> None:
    await keeper.update(secrets={"RAW": secret("raw-value-0123456789", "raw.example:9443")})
    said = await keeper.probe(
        """
        import hashlib
        resolve('raw.example'), resolve('web.example')
        raw = lambda path, *headers, **rest: https('45.0.0.23', 'raw.example:9443', path, port=9443, sni='raw.example',
                                                   headers=headers, **rest)
        found = {path: raw('/' + path) for path in ('trailers', 'hints', 'until-close', 'nonsense', 'refuse')}
        found['continue'] = raw('/continue', 'Expect: 100-continue', method='POST', body=b'hello')
        context = ssl.create_default_context()
        with connect(web, 443) as sock, context.wrap_socket(sock, server_hostname='web.example') as up:
            up.sendall(request('web.example', '/ws', [f'X-Key: {key}', 'Upgrade: websocket', 'Connection: Upgrade',
                'Sec-WebSocket-Version: 13', 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=='], close=False))
            found['upgrade'] = up.recv(1000)
            frame = b'\\x81\\x85' + bytes(4) + b'hello'
            up.sendall(frame)
            found['frame'] = up.recv(100)
        arrived = []
        with urllib.request.urlopen('https://web.example/sse?n=3&pause=0.4') as answer:
            start = time.monotonic()
            while line := answer.readline():
                if line.strip():
                    arrived.append(time.monotonic() - start)
        found['sse'] = arrived
        body = os.urandom(1 << 20) * 8
        answer = json.loads(fetch('https://web.example/count', {'Content-Type': 'application/octet-stream'}, body)[1])
        found['upload'] = answer == {'size': len(body), 'sha256': hashlib.sha256(body).hexdigest()}
        found['download'] = len(fetch('https://web.example/stream?n=8388608&length')[1])
        return found
        """,
        web=WEB, key=await placeholder(keeper),
    )  # fmt: skip
    assert "0\r\nX-Sum: 42\r\n" in said["trailers"]
    assert "103 Early Hints" in said["hints"]
    assert said["hints"].endswith("ok")
    assert "until the end" in said["until-close"]
    assert "502" in said["nonsense"]
    assert "413" in said["refuse"]
    assert "100 Continue" in said["continue"]
    assert said["continue"].endswith("hello")
    assert "101" in said["upgrade"]
    assert said["frame"].endswith("hello")
    assert said["sse"][2] - said["sse"][0] > 0.5  # one by one, not all at the end
    assert said["upload"]
    assert said["download"] == 8 << 20


async def test_values_are_nowhere_on_the_host_nor_in_the_guest(net_daemon: Daemon, internet: Internet) -> None:
    """Memory of a paused guest, its disk, every file, log and argument: the value is only where it has to be."""
    marker = "needle-" + os.urandom(16).hex()
    directory = net_daemon.directory
    async with (
        connected(net_daemon) as client,
        client.sandbox(network=policy(["web.example"]), secrets={"KEY": secret(marker)}) as sandbox,
    ):
        box = Box(client, sandbox.id, internet)
        await box.prepare()
        key = await placeholder(box)
        answer = await box.probe("return fetch('https://web.example/headers?k=' + key, {'X-Key': key})", key=key)
        assert answer[0] == 200
        await client.run(sandbox.id, "sh", "-c", f"echo {key} > /root/key; sync", user="root")
        vmm = _vmm(sandbox.id)
        os.kill(vmm, signal.SIGSTOP)
        try:
            memory = await asyncio.to_thread(_memory, vmm)
        finally:
            os.kill(vmm, signal.SIGCONT)
        assert key.encode() in memory  # the search finds what is there
        assert marker.encode() not in memory
        del memory
        files = await asyncio.to_thread(_files_with, directory, [key.encode(), marker.encode()])
        assert files[0]
        assert files[1] == []
        assert [pid for pid in _processes() if marker in _words(pid)] == []
        assert (directory / "state" / "secrets" / f"{sandbox.id}.sealed").exists()
    assert not (directory / "state" / "secrets" / f"{sandbox.id}.sealed").exists()


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def _words(pid: int) -> str:
    try:
        return "".join(Path(f"/proc/{pid}/{name}").read_bytes().decode("latin-1") for name in ("cmdline", "environ"))
    except OSError:
        return ""


def _vmm(sandbox_id: str) -> int:
    (pid,) = [pid for pid in _processes() if sandbox_id in _words(pid) and "qemu" in _words(pid)[:200]]
    return pid


def _memory(pid: int) -> bytes:
    """Returns all that a process has written to in its memory: the guest's RAM is part of it."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            words = line.split()
            start, end = (int(text, 16) for text in words[0].split("-"))
            if "r" not in words[1] or (len(words) > 5 and words[5].startswith("[v")):
                continue
            try:
                memory.seek(start)
                found.append(memory.read(end - start))
            except (OSError, OverflowError):
                continue
    return b"".join(found)


def _files_with(directory: Path, needles: list[bytes]) -> list[list[Path]]:
    """Returns the files that have each needle: disks, RAM files of templates, databases, logs, sealed values."""
    found: list[list[Path]] = [[] for _ in needles]
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_blocks:
            data = path.read_bytes()
            for number, needle in enumerate(needles):
                if needle in data:
                    found[number].append(path)
    return found


async def test_bad_secrets_are_refused_with_what_to_do(box: Box) -> None:
    import grpc

    async def tried(**fields: Any) -> None:
        await box.client.sandboxes.UpdateSandbox(pb.UpdateSandboxRequest(id=box.id, **fields))

    for name, message in (
        ("1KEY", secret()), ("KEY", pb.Secret(value="x" * 20)), ("KEY", secret(VALUE, "1.2.3.4")),
        ("KEY", secret("two\nlines")), ("KEY", secret("")), ("KEY", secret("short-one", keep_shape=True)),
        ("KEY", secret(VALUE, "https://web.example/")),
    ):  # fmt: skip
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC"):
            await tried(set_secrets={name: message})
    with refused(grpc.StatusCode.NOT_FOUND, "SECRET_NOT_FOUND"):
        await tried(remove_secrets=["NOBODYS"])


async def test_a_create_with_secrets_is_idempotent(net_daemon: Daemon, internet: Internet) -> None:
    import grpc

    async with connected(net_daemon) as client:
        request = pb.CreateSandboxRequest(
            memory_bytes=256 * MIB, request_id="secrets-1", network=policy(["web.example"]), secrets={"KEY": secret()}
        )
        one, two = await asyncio.gather(*(client.sandboxes.CreateSandbox(request) for _ in range(2)))
        try:
            assert one.id == two.id
            assert one.secrets["KEY"].placeholder == two.secrets["KEY"].placeholder
            request.secrets["KEY"].value = "another-one-0123456789"
            with refused(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"):
                await client.sandboxes.CreateSandbox(request)
        finally:
            await client.sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=one.id))

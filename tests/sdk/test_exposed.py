"""What is reachable from outside: HTTPS of both versions, SSH with the usual clients."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncssh
import httpx
import pytest
import trustme

from tests.support import gateway as gateways
from tests.support.daemon import Daemon, until
from tests.support.gateway import Gateway
from tests.support.rawclient import RawClient, Socket

SERVER = """
import hashlib, http.server, time
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path == "/stream":
            self.send_response(200); self.send_header("transfer-encoding", "chunked"); self.end_headers()
            for i in range(3):
                self.wfile.write(b"5\\r\\npart%d\\r\\n" % i); self.wfile.flush(); time.sleep(0.1)
            self.wfile.write(b"0\\r\\n\\r\\n"); return
        size = int(self.path[1:]) if self.path[1:].isdigit() else 0
        body = bytes(size) if size else repr((self.path, self.headers.get("host"), self.headers.get("cookie"))).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        data = b""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size); self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = f"{len(data)} {hashlib.sha256(data).hexdigest()}".encode()
        self.send_response(201); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), H).serve_forever()
"""


@pytest.fixture
async def box(client: RawClient) -> AsyncIterator[Socket]:
    async with client.sandbox() as made:
        yield made


async def domain_of(client: RawClient, box: Socket, **target: int) -> str:
    status, body = await client.rest("POST", f"/api/v3/sandbox/{box.sandbox_id}/expose/http", {})
    assert status == 200
    await box.call("exposeHttp", domain=body["domain"], **target)
    domain: str = body["domain"]
    return domain


class Browser:
    """An HTTP client that takes an exposed name for this machine's own address."""

    def __init__(self, gateway: Gateway, domain: str, *, http2: bool) -> None:
        context = ssl.create_default_context(cafile=str(gateway.ca_file))
        self._client = httpx.AsyncClient(verify=context, http2=http2, http1=not http2, timeout=30)
        self._gateway = gateway
        self._domain = domain

    async def __aenter__(self) -> Browser:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def request(self, method: str, path: str, **fields: Any) -> httpx.Response:
        headers = {"host": self._domain, **fields.pop("headers", {})}
        return await self._client.request(
            method, f"https://127.0.0.1:{self._gateway.ingress}{path}", headers=headers,
            extensions={"sni_hostname": self._domain.partition(":")[0]}, **fields,
        )  # fmt: skip


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
async def test_https(http2: bool, gateway: Gateway, client: RawClient, box: Socket) -> None:
    await box.call("writeTextFile", path="server.py", content=SERVER)
    server = await box.call("spawn", command="python3", args=["server.py"], stdout="null", stderr="null")
    assert await box.call("denoHttpWait", pid=server["pid"]) is True
    domain = await domain_of(client, box, port=8000)
    async with Browser(gateway, domain, http2=http2) as browser:
        first = await browser.request("GET", "/path", headers={"cookie": "a=1; b=2"})
        assert first.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert first.text == repr(("/path", domain, "a=1; b=2"))
        assert (await browser.request("GET", "/stream")).text == "part0part1part2"
        assert len((await browser.request("GET", "/3000000")).content) == 3_000_000
        posted = await browser.request("POST", "/", content=bytes(2_000_000))
        assert (posted.status_code, posted.text.split()[0]) == (201, "2000000")

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b"x" * 10_000

        assert (await browser.request("POST", "/", content=chunks())).text.startswith("500000 ")
        many = await asyncio.gather(*(browser.request("GET", f"/{100_000 + n}") for n in range(10)))
        assert [len(answer.content) for answer in many] == [100_000 + n for n in range(10)]
    nothing = await domain_of(client, box, port=9)
    async with Browser(gateway, nothing, http2=http2) as browser:
        answer = await browser.request("GET", "/")
        assert answer.status_code == 502
        assert "nothing answers" in answer.text


HTTPS_CLIENT = """
import { Sandbox } from "@deno/sandbox";
const sandbox = await Sandbox.create({ memory: "768MiB", port: 8000 });
console.log(await sandbox.sh`echo over TLS`.text(), sandbox.url);
await sandbox.kill();
"""


async def test_certificates_from_files(sdk_daemon: Daemon, directory: Path, node_modules: Path) -> None:
    """The gateway's own TLS, and a wildcard certificate for what is exposed."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(directory / "ca.pem"))
    for name, hosts in (("api", ["127.0.0.1", "localhost"]), ("apps", ["*.apps.example"])):
        issued = ca.issue_cert(*hosts)
        issued.private_key_and_cert_chain_pem.write_to_path(str(directory / f"{name}.pem"))
    settings = {
        "tls_cert": str(directory / "api.pem"), "tls_key": str(directory / "api.pem"), "domain": "apps.example",
        "ingress_cert": str(directory / "apps.pem"), "ingress_key": str(directory / "apps.pem"), "ingress_port": "443",
    }  # fmt: skip
    with gateways.running(sdk_daemon, directory / "gateway", **settings) as served:
        url = f"https://127.0.0.1:{served.api}"
        env = served.client_env() | {
            "DENO_SANDBOX_ENDPOINT": url, "DENO_DEPLOY_ENDPOINT": url, "NODE_EXTRA_CA_CERTS": str(directory / "ca.pem"),
        }  # fmt: skip
        script = node_modules / "https-client.tmp.mjs"
        script.write_text(HTTPS_CLIENT)
        try:
            run = await asyncio.to_thread(
                subprocess.run, [Path(sys.executable).parent / "node", script], env=env, capture_output=True, text=True,
                timeout=60, check=False,
            )  # fmt: skip
        finally:
            script.unlink()
        assert run.returncode == 0, run.stderr
        told, shown = run.stdout.split("\n")[:2]
        assert told == "over TLS"
        assert shown.strip().startswith("https://")
        assert shown.strip().endswith(".apps.example")
        context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
            client = RawClient(session, served)
            client.url = url
            async with client.sandbox() as box:
                domain = await domain_of(client, box, port=9)
                served.ca_file.write_bytes((directory / "ca.pem").read_bytes())
                async with Browser(served, domain, http2=True) as browser:
                    assert (await browser.request("GET", "/")).status_code == 502


async def test_names_end_with_their_sandbox(gateway: Gateway, client: RawClient) -> None:
    async with client.sandbox() as box:
        domain = await domain_of(client, box, port=9)
        async with Browser(gateway, domain, http2=False) as browser:
            assert (await browser.request("GET", "/")).status_code == 502

    async def refused() -> bool:
        async with Browser(gateway, domain, http2=False) as browser:
            try:
                await browser.request("GET", "/")
            except httpx.TransportError:
                return True
            return False

    await until(refused)


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
async def test_a_name_that_leads_nowhere_yet(http2: bool, gateway: Gateway, client: RawClient, box: Socket) -> None:
    _, body = await client.rest("POST", f"/api/v3/sandbox/{box.sandbox_id}/expose/http", {})
    async with Browser(gateway, body["domain"], http2=http2) as browser:
        answer = await browser.request("GET", "/")
        assert (answer.status_code, "nothing is exposed" in answer.text) == (502, True)


async def test_garbage_at_the_ingress_harms_nobody(gateway: Gateway, client: RawClient, box: Socket) -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(200), os.urandom(500), b""):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.ingress)
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(15):
            await reader.read()
        writer.close()
    domain = await domain_of(client, box, port=9)
    context = ssl.create_default_context(cafile=str(gateway.ca_file))
    context.set_alpn_protocols(["h2"])
    for data in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(80_000), os.urandom(300)):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", gateway.ingress, ssl=context, server_hostname=domain.partition(":")[0]
        )
        writer.write(data)
        async with asyncio.timeout(15):
            assert await reader.read() != b"never"
        writer.close()
    async with Browser(gateway, domain, http2=True) as browser:
        assert (await browser.request("GET", "/")).status_code == 502
    assert "Traceback" not in gateway.log, gateway.log[-3000:]


# -- SSH ---------------------------------------------------------------------------------------------------------------


async def ssh_user(client: RawClient, box: Socket) -> str:
    status, body = await client.rest("POST", f"/api/v3/sandbox/{box.sandbox_id}/expose/ssh", {})
    assert status == 200
    user: str = body["username"]
    return user


def _ssh(program: str, gateway: Gateway, *words: str, **fields: Any) -> subprocess.CompletedProcess[bytes]:
    options = [
        "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
        "-o", "BatchMode=yes", "-P" if program in ("scp", "sftp") else "-p", str(gateway.ssh),
    ]  # fmt: skip
    return subprocess.run([program, *options, *words], capture_output=True, timeout=60, check=False, **fields)


async def test_ssh_scp_sftp(gateway: Gateway, client: RawClient, box: Socket, tmp_path: Path) -> None:
    user = await ssh_user(client, box)
    at = f"{user}@127.0.0.1"

    async def run(program: str, *words: str, **fields: Any) -> subprocess.CompletedProcess[bytes]:
        return await asyncio.to_thread(_ssh, program, gateway, *words, **fields)

    result = await run("ssh", at, "echo out; echo err >&2; id -un; exit 7")
    assert (result.stdout, result.stderr, result.returncode) == (b"out\nsandbox\n", b"err\n", 7)
    fed = await run("ssh", at, "wc -c", input=bytes(300_000))
    assert fed.stdout.strip() == b"300000"
    assert (await run("ssh", at, "kill -TERM $$")).returncode != 0
    source = tmp_path / "source"
    source.write_bytes(os.urandom(200_000))
    for extra in ([], ["-O"]):  # by sftp, and by the old protocol
        assert (await run("scp", *extra, str(source), f"{at}:copied")).returncode == 0
        assert (await run("scp", *extra, f"{at}:copied", str(tmp_path / "back"))).returncode == 0
        assert (tmp_path / "back").read_bytes() == source.read_bytes()
    batch = tmp_path / "batch"
    batch.write_text("mkdir made\ncd made\nput " + str(source) + " there\nls -l\n")
    listed = await run("sftp", "-b", str(batch), at)
    assert listed.returncode == 0, listed.stderr
    assert b"there" in listed.stdout
    assert (await box.call("stat", path="made/there"))["size"] == 200_000
    assert (await run("ssh", "nobody@127.0.0.1", "true")).returncode == 255


async def test_a_shell_on_a_terminal_and_forwarding(gateway: Gateway, client: RawClient, box: Socket) -> None:
    user = await ssh_user(client, box)
    async with asyncssh.connect("127.0.0.1", gateway.ssh, username=user, known_hosts=None) as connection:
        async with connection.create_process(term_type="xterm", term_size=(93, 31)) as shell:
            shell.stdin.write("stty size; tty | tr a-z A-Z\n")
            seen = ""
            async with asyncio.timeout(20):
                while "31 93" not in seen or "/DEV/PTS" not in seen:
                    seen += await shell.stdout.read(1000)
            shell.change_terminal_size(111, 44)
            shell.stdin.write("sleep 0.3; stty size\n")
            async with asyncio.timeout(20):
                while "44 111" not in seen:
                    seen += await shell.stdout.read(1000)
            shell.stdin.write("exit 5\n")
            assert (await shell.wait()).exit_status == 5
        await box.call("writeTextFile", path="server.py", content=SERVER)
        server = await box.call("spawn", command="python3", args=["server.py"], stdout="null", stderr="null")
        assert await box.call("denoHttpWait", pid=server["pid"]) is True
        reader, writer = await connection.open_connection("localhost", 8000)
        writer.write(b"GET /x HTTP/1.0\r\n\r\n")
        assert b"200 OK" in await reader.read()
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.open_connection("10.0.99.1", 53)
        # The sandbox's end is the connection's.
        assert (await client.rest("DELETE", f"/api/v3/sandbox/{box.sandbox_id}"))[0] == 204
        async with asyncio.timeout(20):
            await connection.wait_closed()
    with pytest.raises(asyncssh.PermissionDenied):
        await asyncssh.connect("127.0.0.1", gateway.ssh, username=user, known_hosts=None)

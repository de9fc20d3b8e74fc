"""The download of Cloud Hypervisor from a local HTTPS server: all of it, or nothing."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from agent.common.errors import InvalidSpec, VmmError
from agent.daemon.vmm.cloud_hypervisor import install as installing
from agent.daemon.vmm.cloud_hypervisor.install import URL, install

pytestmark = pytest.mark.timeout(60)
PROGRAM = b"#!/bin/sh\necho cloud-hypervisor v53.0\n" + bytes(range(256)) * 2000
DIGEST = hashlib.sha256(PROGRAM).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Each path is a way to answer."""

    release = threading.Event()
    started = threading.Event()
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Handler.asked.append(self.path)
        if self.path in ("/redirect", "/downgrade"):
            scheme = "https" if self.path == "/redirect" else "http"
            self.send_response(302)
            self.send_header("Location", f"{scheme}://localhost:{self.connection.getsockname()[1]}/good")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        if self.path != "/unsized":
            self.send_header("Content-Length", str(len(PROGRAM)))
        self.end_headers()
        if self.path == "/truncated":
            self.wfile.write(PROGRAM[: len(PROGRAM) // 2])
        elif self.path == "/slow":
            self.wfile.write(PROGRAM[:1000])
            Handler.started.set()
            Handler.release.wait(20)
        elif self.path == "/other":
            self.wfile.write(PROGRAM[::-1])
        else:
            self.wfile.write(PROGRAM)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Listening(http.server.ThreadingHTTPServer):
    """Shakes hands in the connection's thread, and is silent about clients that go."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("localhost", 0), Handler)
        self._context = context

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        return self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class Server:
    def __init__(self, port: int, certificate: Path) -> None:
        self.base = f"https://localhost:{port}"
        self.certificate = certificate
        self.context = ssl.create_default_context(cafile=str(certificate))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    listening = Listening(ours)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Server(listening.server_address[1], directory / "cert.pem")
    listening.shutdown()
    thread.join()
    listening.server_close()


def entries(directory: Path) -> list[bytes]:
    return [entry.read_bytes() for entry in directory.iterdir()]


async def get(server: Server, path: str, tools: Path, digest: str = DIGEST) -> Path:
    return await install(tools, digest, server.base + path, context=server.context)


@pytest.mark.parametrize("path", ["/good", "/redirect", "/unsized"])
async def test_a_good_one(server: Server, tmp_path: Path, path: str) -> None:
    tools = tmp_path / "deep" / "tools"
    program = await get(server, path, tools, DIGEST.upper())
    assert program == tools / "cloud-hypervisor"
    assert program.read_bytes() == PROGRAM
    assert program.stat().st_mode & 0o777 == 0o755
    assert entries(tools) == [PROGRAM]


async def test_what_is_there_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    await get(server, "/good", tmp_path)
    before = len(Handler.asked)
    await get(server, "/good", tmp_path)
    assert len(Handler.asked) == before
    (tmp_path / "cloud-hypervisor").write_text("damaged")
    assert (await get(server, "/good", tmp_path)).read_bytes() == PROGRAM


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/other", "DIGEST_MISMATCH"), ("/truncated", "DOWNLOAD_FAILED"), ("/none", "DOWNLOAD_FAILED")],
)
async def test_a_bad_one_leaves_what_was_there(server: Server, tmp_path: Path, path: str, reason: str) -> None:
    with pytest.raises(VmmError) as caught:
        await get(server, path, tmp_path)
    assert caught.value.reason == reason
    assert entries(tmp_path) == []
    (tmp_path / "cloud-hypervisor").write_text("old")
    with pytest.raises(VmmError):
        await get(server, path, tmp_path)
    assert entries(tmp_path) == [b"old"]


async def test_an_endless_one(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "_MAX_BYTES", 1000)
    with pytest.raises(VmmError, match="given up"):
        await get(server, "/unsized", tmp_path)
    assert entries(tmp_path) == []


async def test_a_cancelled_one(server: Server, tmp_path: Path) -> None:
    Handler.started.clear()
    Handler.release.clear()
    task = asyncio.create_task(get(server, "/slow", tmp_path))
    await asyncio.to_thread(Handler.started.wait, 10)
    task.cancel()
    asyncio.get_running_loop().call_later(0.1, Handler.release.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert entries(tmp_path) == []


async def test_a_server_that_is_not_trusted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(VmmError, match=r"(?i)certificate") as caught:
        await install(tmp_path, DIGEST, server.base + "/good")
    assert caught.value.reason == "DOWNLOAD_FAILED"
    assert entries(tmp_path) == []


async def test_nothing_but_https(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="HTTPS"):
        await get(server, "/downgrade", tmp_path)
    for url in ("http://localhost/x", "file:///etc/passwd", "ftp://localhost/x"):
        with pytest.raises(InvalidSpec, match="HTTPS"):
            await install(tmp_path, DIGEST, url)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("digest", ["", "abc", "x" * 64, DIGEST[:-1], DIGEST + "0", DIGEST + "\n"])
async def test_no_digest_no_download(tmp_path: Path, digest: str) -> None:
    with pytest.raises(InvalidSpec, match="SHA-256"):
        await install(tmp_path, digest)


def test_the_release_is_pinned() -> None:
    assert URL.startswith("https://")
    assert "/v53.0/" in URL


@pytest.mark.parametrize("source", ["option", "settings"])
def test_the_command(server: Server, tmp_path: Path, source: str) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOXD_")}
    own |= {
        "SSL_CERT_FILE": str(server.certificate),
        "SANDBOXD_PATHS__TOOLS_DIR": str(tmp_path),
        "SANDBOXD_VMM__DOWNLOAD_URL": f"{server.base}/good",
    }
    words = [sys.executable, "-m", "agent.cli.app", "--json", "vmm", "install"]
    without = subprocess.run(words, env=own, capture_output=True, text=True, timeout=60, check=False)
    assert without.returncode != 0
    assert "vmm.download_sha256" in without.stderr
    if source == "option":
        words += ["--sha256", DIGEST]
    else:
        own["SANDBOXD_VMM__DOWNLOAD_SHA256"] = DIGEST
    done = subprocess.run(words, env=own, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout) == {"path": str(tmp_path / "cloud-hypervisor"), "sha256": DIGEST}, done.stderr
    assert (tmp_path / "cloud-hypervisor").read_bytes() == PROGRAM

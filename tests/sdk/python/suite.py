"""The Python SDK, synchronous and asynchronous, unmodified: run in a process of its own by tests/sdk/test_python.py,
since the SDK leaves sockets to the garbage collector.
"""

from __future__ import annotations

import asyncio
import io
import os
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from deno_sandbox import AsyncDenoDeploy, DenoDeploy
from deno_sandbox.errors import (
    AuthenticationError,
    HTTPStatusError,
    ProcessAlreadyExited,
    RpcValidationError,
    UnknownRpcMethod,
)

FIELDS: dict[str, Any] = {"memory_mb": 768}


@pytest.fixture(scope="module")
def sdk() -> DenoDeploy:
    return DenoDeploy()


@pytest.fixture(scope="module")
def box(sdk: DenoDeploy) -> Iterator[Any]:
    with sdk.sandbox.create(**FIELDS, env={"FROM_CREATE": "1"}, labels={"suite": "python"}) as made:
        yield made


@pytest.fixture
async def abox() -> AsyncIterator[Any]:
    async with AsyncDenoDeploy().sandbox.create(**FIELDS) as made:
        yield made


def output(process: Any) -> bytes:
    data: bytes = process.stdout.read()
    process.wait()
    return data


# -- files -------------------------------------------------------------------------------------------------------------


def test_files(box: Any) -> None:
    fs = box.fs
    fs.write_text_file("t.txt", "grüße 世界")
    assert fs.read_text_file("t.txt") == "grüße 世界"
    fs.write_file("b.bin", bytes(range(256)) * 100)
    assert fs.read_file("b.bin") == bytes(range(256)) * 100
    fs.write_file("s.bin", io.BytesIO(b"from a file object"))
    assert fs.read_file("s.bin") == b"from a file object"
    fs.write_file("e", b"")
    assert fs.read_file("e") == b""
    fs.write_text_file("t.txt", "+", append=True)
    assert fs.read_text_file("t.txt").endswith("界+")
    with pytest.raises(Exception, match="EEXIST"):
        fs.write_text_file("t.txt", "x", create_new=True)
    fs.write_text_file("m.txt", "x", mode=0o600)
    assert fs.stat("m.txt")["mode"] & 0o777 == 0o600
    with pytest.raises(Exception, match="ENOENT"):
        fs.read_text_file("absent")
    fs.write_file("large", bytes(2 << 20))
    with pytest.raises(Exception, match="EFBIG"):  # over what this SDK's socket takes
        fs.read_file("large")


def test_directories_and_facts(box: Any) -> None:
    fs = box.fs
    fs.mkdir("d/e", recursive=True)
    fs.write_text_file("d/f.txt", "12345")
    assert {entry["name"]: entry["is_directory"] for entry in fs.read_dir("d")} == {"e": True, "f.txt": False}
    info = fs.stat("d/f.txt")
    assert (info["size"], info["is_file"], info["is_symlink"], info["uid"]) == (5, True, False, 1000)
    fs.symlink("f.txt", "d/link")
    assert fs.lstat("d/link")["is_symlink"]
    assert fs.read_link("d/link") == "f.txt"
    assert fs.real_path("d/link") == "/home/sandbox/d/f.txt"
    fs.link("d/f.txt", "d/hard")
    assert fs.stat("d/hard")["nlink"] == 2
    fs.copy_file("d/f.txt", "d/copy")
    fs.rename("d/copy", "d/moved")
    fs.chmod("d/moved", 0o640)
    fs.chown("d/moved", None, 1000)
    fs.truncate("d/moved", 2)
    assert (fs.stat("d/moved")["size"], fs.stat("d/moved")["mode"] & 0o777) == (2, 0o640)
    fs.truncate("d/moved")
    assert fs.stat("d/moved")["size"] == 0
    fs.utime("d/moved", "2020-01-02T03:04:05Z", "2021-01-02T03:04:05Z")
    assert fs.stat("d/moved")["mtime"] == "2021-01-02T03:04:05.000Z"
    assert fs.umask(0o077) == 0o022
    assert fs.umask(0o022) == 0o077
    fs.remove("d", recursive=True)
    with pytest.raises(Exception, match="ENOENT"):
        fs.stat("d")
    assert fs.make_temp_dir(prefix="p").startswith("/tmp/p")
    assert fs.make_temp_file(dir="/home/sandbox", suffix=".s").endswith(".s")


def test_open_files(box: Any) -> None:
    file = box.fs.create("h")
    assert file.write(b"hello world") == 11
    assert file.seek(6, 0) == 6
    assert file.read(5) == b"world"
    file.truncate(5)
    assert file.stat()["size"] == 5
    file.sync()
    file.sync_data()
    file.utime(1000, 2000)
    assert file.stat()["mtime"] == "1970-01-01T00:33:20.000Z"
    file.lock(True)
    file.unlock()
    file.close()
    with box.fs.open("h", read=True, write=True, append=True) as again:
        again.write(b"!")
    assert box.fs.read_text_file("h") == "hello!"
    with pytest.raises(Exception, match="EEXIST"):
        box.fs.open("h", write=True, create_new=True)


def test_walk_and_glob_are_lists(box: Any) -> None:
    box.fs.mkdir("/app/data/sub", recursive=True)
    box.fs.write_text_file("/app/data/a.json", "{}")
    box.fs.write_text_file("/app/data/sub/b.json", "{}")
    paths = [entry["path"] for entry in box.fs.walk("/app")]
    assert sorted(paths) == ["/app", "/app/data", "/app/data/a.json", "/app/data/sub", "/app/data/sub/b.json"]
    assert [entry["name"] for entry in box.fs.walk("/app", max_depth=1, include_dirs=True)] == ["app", "data"]
    found = box.fs.expand_glob("**/*.json", root="/app")
    assert sorted(entry["path"] for entry in found) == ["/app/data/a.json", "/app/data/sub/b.json"]


def test_upload(box: Any, tmp_path: Path) -> None:
    (tmp_path / "proj/inner").mkdir(parents=True)
    (tmp_path / "proj/one.txt").write_text("1")
    (tmp_path / "proj/inner/two.bin").write_bytes(bytes(200_000))
    (tmp_path / "proj/link").symlink_to("one.txt")
    box.fs.upload(str(tmp_path / "proj"), "uploaded")
    assert box.fs.read_text_file("uploaded/one.txt") == "1"
    assert len(box.fs.read_file("uploaded/inner/two.bin")) == 200_000
    assert box.fs.read_link("uploaded/link") == "one.txt"
    with pytest.raises(UnknownRpcMethod):  # a method of this SDK alone, which the service has not either
        box.fs.download(str(tmp_path / "back"), "uploaded")


# -- processes ---------------------------------------------------------------------------------------------------------


def test_processes(box: Any) -> None:
    child = box.spawn("sh", args=["-c", "echo out; echo err >&2; exit 3"], stdout="piped", stderr="piped")
    assert (child.stdout.read(), child.stderr.read()) == (b"out\n", b"err\n")
    assert child.wait() == {"success": False, "code": 3, "signal": None}
    fed = box.spawn("cat", stdout="piped", stdin_data=[b"ty", b"ped"])
    assert output(fed) == b"typed"
    placed = box.spawn("sh", args=["-c", "echo $PWD $foo $FROM_CREATE"], cwd="/tmp", env={"foo": "x"}, stdout="piped")
    assert output(placed) == b"/tmp x 1\n"
    cleared = box.spawn("env", clear_env=True, env={"only": "1"}, stdout="piped")
    assert output(cleared) == b"only=1\n"
    quiet = box.spawn("echo", args=["x"], stdout="null", stderr="null")
    assert quiet.wait()["success"]
    with pytest.raises(Exception, match="NotFound"):
        box.spawn("no-such-program")


def test_output_of_short_processes_is_never_lost(box: Any) -> None:
    for number in range(20):
        assert output(box.spawn("echo", args=[str(number)], stdout="piped")) == f"{number}\n".encode()


async def test_signals(abox: Any) -> None:
    child = await abox.spawn("sleep", args=["100"], stdout="null", stderr="null")
    assert child.pid > 1
    waiting = asyncio.create_task(abox._rpc.call("processWait", {"pid": child.pid}))
    await child.kill()
    assert (await waiting)["code"] == 143
    with pytest.raises(ProcessAlreadyExited):
        await abox._rpc.call("processKill", {"pid": child.pid})


def test_environment(box: Any) -> None:
    assert box.env.get("FROM_CREATE") == "1"
    box.env.set("KEY", "välue")
    assert box.env.get("KEY") == "välue"
    assert output(box.spawn("printenv", args=["KEY"], stdout="piped")).decode() == "välue\n"
    box.env.delete("KEY")
    assert box.env.get("KEY") is None
    assert "välue" not in box.env.as_dict().values()


# -- Deno --------------------------------------------------------------------------------------------------------------


def test_deno(box: Any) -> None:
    assert box.deno.eval("const a: number = 20; a + 22") == 42
    repl = box.deno.repl()
    assert repl.eval("1 + 1") == 2
    assert repl.eval("const x = [1, 2, 3]; x.map((n: number) => n * 2)") == [2, 4, 6]
    repl.eval("const add = (a, b) => a + b")
    assert repl.call("add", [1, 2]) == 3
    with pytest.raises(Exception, match="RangeError"):
        repl.eval("throw new RangeError('no')")
    repl.close()
    run = box.deno.run(code="console.log(Deno.args[0])", script_args=["arg"], stdout="piped")
    assert output(run) == b"arg\n"
    box.fs.write_text_file("/app/server.ts", 'Deno.serve({ port: 8000 }, () => new Response("Hello from sandbox!"));')
    server = box.deno.run(entrypoint="/app/server.ts", stdout="null", stderr="null")
    assert server.wait_http_ready() is True
    assert server.fetch("http://anything/").status_code == 200
    for url in (box.expose_http(port=8000), box.expose_http(pid=server.pid)):
        assert get(url).text == "Hello from sandbox!"


def get(url: str) -> httpx.Response:
    """Fetches an exposed address, whose name no resolver need know."""
    target = httpx.URL(url)
    context = ssl.create_default_context(cafile=os.environ["NODE_EXTRA_CA_CERTS"])
    with httpx.Client(verify=context) as client:
        return client.get(
            target.copy_with(host="127.0.0.1"), headers={"host": target.netloc.decode()},
            extensions={"sni_hostname": target.host},
        )  # fmt: skip


# -- life and network --------------------------------------------------------------------------------------------------


def test_list_extend_connect(box: Any, sdk: DenoDeploy) -> None:
    listed = sdk.sandbox.list(labels={"suite": "python"}).items
    assert [item["id"] for item in listed] == [box.id]
    assert (listed[0]["status"], listed[0]["stopped_at"]) == ("running", None)
    assert sdk.sandbox.list(labels={"suite": "none"}).items == []
    with sdk.sandbox.connect(box.id) as other:
        assert output(other.spawn("echo", args=["same"], stdout="piped")) == b"same\n"
    assert output(box.spawn("echo", args=["still"], stdout="piped")) == b"still\n"


async def test_a_timed_sandbox_outlives_its_client() -> None:
    sdk = AsyncDenoDeploy()
    async with sdk.sandbox.create(**FIELDS, timeout="5m", region="loc") as made:
        await made.fs.write_text_file("kept", "yes")
    async with sdk.sandbox.connect(made.id) as again:
        assert await again.fs.read_text_file("kept") == "yes"
        end = await again.extend_timeout(600)
        assert 500 < end.timestamp() - time.time() < 610
        await again.kill()


def test_network_and_secrets(sdk: DenoDeploy) -> None:
    value = f"real-{uuid.uuid4()}"
    with sdk.sandbox.create(
        **FIELDS, allow_net=["web.example", "api.example"], secrets={"KEY": {"hosts": ["api.example"], "value": value}},
        ssh=True, port=8000,
    ) as made:  # fmt: skip
        assert made.fetch("https://web.example/headers").status_code == 200
        assert made.fetch("https://web.example/redirect?to=/headers", redirect="manual").status_code == 302
        with pytest.raises(Exception, match="error sending request"):
            made.fetch("https://evil.example/")
        seen = output(made.spawn("printenv", args=["KEY"], stdout="piped")).decode().strip()
        assert seen
        assert seen != value
        answer = made.fetch("https://api.example/digest", headers={"x-key": seen})
        assert answer.status_code == 200
        made.kill()


def test_ssh_credentials(box: Any) -> None:
    given = box.expose_ssh()
    assert given["hostname"] == "localhost"
    assert isinstance(given["port"], int)
    assert len(given["username"]) == 25


def test_volumes_and_snapshots(sdk: DenoDeploy) -> None:
    volume = sdk.volumes.create(slug="py-data", region="loc", capacity="300MB")
    assert (volume["slug"], volume["is_bootable"], volume["base_snapshot"]) == ("py-data", False, None)
    with sdk.sandbox.create(**FIELDS, volumes={"/data": volume["id"]}) as made:
        made.fs.write_text_file("/data/persistent.txt", "This data persists!")
        made.kill()
    snapshot: dict[str, Any] = dict(sdk.volumes.snapshot(volume["id"], slug="py-snapshot"))
    assert snapshot["volume"]["slug"] == "py-data"
    again: Any = sdk.snapshots.get("py-snapshot")
    assert again["id"] == snapshot["id"]
    second = sdk.volumes.create(slug="py-second", region="loc", capacity=400_000_000, from_snapshot="py-snapshot")
    first_page = sdk.volumes.list(limit=1)
    slugs = [item["slug"] for item in first_page.items]
    while (page := first_page.get_next_page()) is not None:
        first_page = page
        slugs += [item["slug"] for item in page.items]
    assert {"py-data", "py-second"} <= set(slugs)
    assert [item["slug"] for item in sdk.volumes.list(search="second").items] == ["py-second"]
    assert [item["slug"] for item in sdk.snapshots.list(search="py").items] == ["py-snapshot"]
    for identifier in (second["id"], "py-data"):
        sdk.volumes.delete(identifier)
    sdk.snapshots.delete("py-snapshot")
    assert sdk.volumes.get("py-data") is None
    assert sdk.snapshots.get("py-snapshot") is None


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals(sdk: DenoDeploy) -> None:
    with pytest.raises(AuthenticationError), DenoDeploy(options={"token": "ddo_wrong"}).sandbox.create(**FIELDS):
        pass
    for fields in ({"region": "nowhere"}, {"timeout": "forever"}, {"memory_mb": -5}):
        with pytest.raises(Exception, match="400"), sdk.sandbox.create(**{**FIELDS, **fields}):
            pass
    with pytest.raises(HTTPStatusError) as caught:
        sdk.apps.list()
    assert (caught.value.status_code, caught.value.code) == (404, "NOT_SUPPORTED")


async def test_validation_errors_have_their_form(abox: Any) -> None:
    with pytest.raises(RpcValidationError):
        await abox._rpc.call("readFile", {"path": 5})
    with pytest.raises(RpcValidationError):
        await abox._rpc.call("readFile", {})
    with pytest.raises(UnknownRpcMethod):
        await abox._rpc.call("nothing", {})

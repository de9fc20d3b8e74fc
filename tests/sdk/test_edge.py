"""What an SDK would never do: wrong headers and tokens, foreign sandboxes, garbage, floods, sudden ends."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

import aiohttp
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.gateway.methods.table import METHODS
from tests.support.daemon import until
from tests.support.gateway import ORG, Gateway
from tests.support.rawclient import RawClient, Socket, all_messages, config_header, listed, raw


async def nothing_left(gateway: Gateway) -> None:
    async def empty() -> bool:
        return not await listed(gateway)

    await until(empty, 20)


async def idle(gateway: Gateway) -> None:
    """Returns once the gateway holds nothing for anyone."""

    async def rests() -> bool:
        now = await asyncio.to_thread(gateway.figures)
        return now["sandboxd_gateway_connections"] == 0 and now["sandboxd_gateway_calls_open"] == 0

    await until(rests, 20)


def cut_off(box: Socket) -> None:
    """Ends the client as a crash would."""
    box.ws._response.connection.transport.abort()  # type: ignore[union-attr]


# -- who may -----------------------------------------------------------------------------------------------------------

HEADERS: dict[str, dict[str, str]] = {
    "missing": {},
    "not base64": {"x-deno-sandbox-config": "!!!"},
    "not JSON": {"x-deno-sandbox-config": base64.b64encode(b"{").decode()},
    "a list": {"x-deno-sandbox-config": base64.b64encode(b"[]").decode()},
    "wrong types": config_header(labels={"a": 1}),
    "negative memory": config_header(memory_mb=-1),
    "absurd memory": config_header(memory_mb=1 << 23),
    "in the past": config_header(stop_at_ms=1000),
    "no duration": config_header(timeout="5 parsecs"),
    "no such region": config_header(region="nowhere"),
    "bad rule": config_header(allow_net=["http://x/"]),
    "secret without hosts": config_header(secrets={"K": {"hosts": [], "value": "v"}}),
    "bad mount": config_header(volumes=[{"volume": "x", "path": "relative"}]),
    "too long": {"x-deno-sandbox-config": base64.b64encode(b"x" * 60_000).decode()},
    "deep": {"x-deno-sandbox-config": base64.b64encode(b"[" * 20_000).decode()},
}


@pytest.mark.parametrize("what", HEADERS)
async def test_wrong_configs_are_refused_with_json(what: str, gateway: Gateway) -> None:
    async with aiohttp.ClientSession() as session:
        headers = {
            "Authorization": f"Bearer {gateway.token}", "Connection": "Upgrade", "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(), **HEADERS[what],
        }  # fmt: skip
        async with session.get(f"{gateway.url}/api/v3/sandboxes/create", headers=headers) as answer:
            body = await answer.json()
            assert answer.status in (400, 404, 429), body
            assert body["code"]
            assert body["message"]
    assert await listed(gateway) == []


async def test_tokens_open_what_they_say(gateway: Gateway) -> None:
    async with raw(gateway, "ddo_wrong") as stranger:
        assert await stranger.rest("GET", "/api/v2/sandboxes") == (
            401, {"code": "INVALID_TOKEN", "message": "the token is missing, wrong, or was revoked"},
        )  # fmt: skip
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with stranger.sandbox():
                pass
        assert caught.value.status == 401
    async with raw(gateway, "") as nobody:
        nobody.headers = {}
        assert (await nobody.rest("GET", "/api/v2/sandboxes"))[0] == 401
    async with raw(gateway) as client:
        assert (await client.rest("GET", "/api/v2/sandboxes", None, **{"X-Deno-Org": "other"}))[0] == 403
        assert (await client.rest("GET", "/api/v2/sandboxes", None, **{"X-Deno-Org": ORG}))[0] == 200
    limited = gateway.new_token(
        "--org", ORG, "--max-sandboxes", "1", "--max-memory", "1GiB", "--max-lifetime", "60s", "--region", "loc"
    )
    async with raw(gateway, limited) as client, client.sandbox(timeout="30s") as first:
        for config in ({}, {"memory_mb": 2048}, {"timeout": "5m"}, {"region": "ams"}):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with client.sandbox(**config):
                    pass
            assert caught.value.status in (400, 403, 429)
        status, body = await client.rest(
            "PATCH", f"/api/v3/sandbox/{first.sandbox_id}", {"stop_at_ms": int(time.time() * 1000) + 600_000}
        )
        assert status == 200
        assert body["stop_at_ms"] < (time.time() + 61) * 1000
        assert (await client.rest("DELETE", f"/api/v3/sandbox/{first.sandbox_id}"))[0] == 204
    await nothing_left(gateway)


async def test_organizations_do_not_see_each_other(gateway: Gateway, client: RawClient) -> None:
    other = gateway.new_token("--org", "strangers")
    async with client.sandbox() as mine, raw(gateway, other) as stranger:
        at = f"/api/v3/sandbox/{mine.sandbox_id}"
        assert (await stranger.rest("GET", "/api/v3/sandboxes")) == (200, [])
        for method, path, body in (
            ("DELETE", at, None), ("PATCH", at, {"stop_at_ms": int(time.time() * 1000) + 60_000}),
            ("POST", f"{at}/expose/http", {}), ("POST", f"{at}/expose/ssh", {}),
            ("DELETE", f"/api/v3/sandboxes/{mine.sandbox_id}", None),
        ):  # fmt: skip
            status, answer = await stranger.rest(method, path, body)
            assert (status, answer["code"]) == (404, "SANDBOX_NOT_FOUND"), path
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with stranger.connected(mine.sandbox_id):
                pass
        assert caught.value.status == 404
        await client.rest("POST", "/api/v2/volumes", {"slug": "mine", "region": "loc", "capacity": "300MB"})
        assert (await stranger.rest("GET", "/api/v2/volumes/mine"))[0] == 404
        assert (await stranger.rest("GET", "/api/v2/volumes")) == (200, [])
        assert (await client.rest("DELETE", "/api/v2/volumes/mine"))[0] == 204
        # Nor can another sandbox's domain be led elsewhere.
        _, given_domain = await client.rest("POST", f"{at}/expose/http", {})
        async with stranger.sandbox() as theirs:
            error = await theirs.fail("exposeHttp", domain=given_domain["domain"], port=80)
            assert error["constructorName"] == "NotFound"
        assert await mine.call("exposeHttp", domain=given_domain["domain"], port=80) is None


async def test_a_revoked_token_opens_nothing(gateway: Gateway) -> None:
    from tests.support.ctl import Ctl

    ctl = Ctl(gateway.env)
    made = json.loads(ctl("token", "create", "--org", "brief", "--json"))
    async with raw(gateway, made["token"]) as client:
        assert (await client.rest("GET", "/api/v2/sandboxes"))[0] == 200
        assert made["token"].encode() not in ctl("token", "ls") + (gateway.directory / "tokens.json").read_bytes()
        ctl("token", "revoke", made["id"])
        assert (await client.rest("GET", "/api/v2/sandboxes"))[0] == 401


# -- hostile frames ----------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    sorted({name for kind, _ in METHODS.values() for name in kind.__struct_encode_fields__} | {"streamId", "reason"})
)
# Methods that would take what is there away from the examples that follow, or wait for ever by design.
CALLS = st.sampled_from(sorted(set(METHODS) - {"remove", "rename", "fetch", "vscode", "spawnDeno", "spawnDenoRepl"}))
REQUESTS = st.fixed_dictionaries(
    {
        "method": CALLS | st.text(max_size=10) | st.just("$sandbox.stream.enqueue"),
        "params": JSON | st.dictionaries(NAMES, JSON, max_size=6),
    },
    optional={"id": st.integers(-5, 1 << 60), "jsonrpc": JSON},
)
FRAMES = st.binary(max_size=60) | st.text(max_size=60) | JSON | REQUESTS


async def test_garbage_ends_nobody_elses_connection(gateway: Gateway, client: RawClient) -> None:
    assert len(METHODS) == 54
    frames: list[Any] = []

    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(FRAMES)
    def collect(frame: Any) -> None:
        frames.append(frame)

    collect()
    async with client.sandbox() as good, client.sandbox() as bad:
        for number, frame in enumerate(frames):
            if isinstance(frame, bytes):
                await bad.ws.send_bytes(frame)
            else:
                await bad.send(frame if isinstance(frame, str) else json.dumps(frame))
            if number % 20 == 0:
                await bad.alive()
        await bad.alive()
        assert await bad.run("echo", "still") == "still\n"
        assert await good.run("echo", "me too") == "me too\n"
    await idle(gateway)
    await nothing_left(gateway)
    assert "internal error" not in gateway.log, gateway.log[-3000:]


async def test_a_frame_that_is_too_large_ends_its_connection_alone(gateway: Gateway, client: RawClient) -> None:
    async with client.sandbox() as box:
        for _ in range(40):
            await box.ws.send_frame(b" " * (1 << 20), aiohttp.WSMsgType.TEXT)
        await _one_frame_of(box.ws, 600 << 20)  # gateway.max_message_bytes is 512 MiB
        with pytest.raises(ConnectionError):
            await all_messages(box)
    await nothing_left(gateway)
    await idle(gateway)


async def _one_frame_of(ws: aiohttp.ClientWebSocketResponse, size: int) -> None:
    """Announces a frame of this size, and sends it until somebody hangs up."""
    transport: Any = ws._response.connection.transport  # type: ignore[union-attr]
    transport.write(b"\x81\xff" + size.to_bytes(8, "big") + bytes(4))
    for _ in range(size >> 20):
        if transport.is_closing():
            return
        transport.write(bytes(1 << 20))
        await asyncio.sleep(0)


# -- sudden ends -------------------------------------------------------------------------------------------------------


async def test_a_client_that_dies_in_the_middle_leaves_nothing(gateway: Gateway, client: RawClient) -> None:
    async with client.sandbox() as box:
        await box.call("spawn", command="yes", stdout="piped", stderr="piped")
        await box.request("processWait", pid=1)
        for _ in range(20):
            await box.receive()
        await box.send({"jsonrpc": "2.0", "method": "$sandbox.stream.start", "params": {"streamId": 7}})
        await box.request("writeFile", path="half", contentStreamId=7)
        data = base64.b64encode(bytes(30_000)).decode()
        await box.send({"jsonrpc": "2.0", "method": "$sandbox.stream.enqueue", "params": {"streamId": 7, "data": data}})
        await box.call("open", path="/etc/passwd")
        cut_off(box)
    await nothing_left(gateway)
    await idle(gateway)


async def test_an_upload_that_breaks_off_leaves_the_sandbox_working(gateway: Gateway, client: RawClient) -> None:
    async with client.sandbox(timeout="2m") as box:
        await box.send({"jsonrpc": "2.0", "method": "$sandbox.stream.start", "params": {"streamId": 0}})
        await box.request("writeFile", path="half", contentStreamId=0)
        data = base64.b64encode(bytes(30_000)).decode()
        await box.send({"jsonrpc": "2.0", "method": "$sandbox.stream.enqueue", "params": {"streamId": 0, "data": data}})

        async def written() -> bool:
            answer = await box.answer(await box.request("stat", path="half"))
            return bool(answer["result"].get("ok", {}).get("size") == 30_000)

        await until(written)
        cut_off(box)
    async with client.connected(box.sandbox_id) as again:
        assert (await again.call("stat", path="half"))["size"] == 30_000
        assert (await client.rest("DELETE", f"/api/v3/sandbox/{box.sandbox_id}"))[0] == 204
        with pytest.raises(ConnectionError, match="1001"):
            await all_messages(again)
    await idle(gateway)


async def test_a_slow_reader_costs_no_memory(gateway: Gateway, client: RawClient) -> None:
    process = psutil.Process(gateway.process.pid)
    async with client.sandbox() as box:
        before = process.memory_info().rss
        started = await box.call("spawn", command="head", args=["-c", str(1 << 30), "/dev/zero"], stdout="piped")
        stream = started["stdoutStreamId"]
        waiting = await box.request("processWait", pid=started["pid"])
        most = seen = 0
        for _ in range(40):
            while len(box.streams.get(stream, b"")) < 1 << 20:
                await box.receive()
            seen += len(box.streams[stream])
            box.streams[stream].clear()
            await asyncio.sleep(0.05)
            most = max(most, process.memory_info().rss - before)
        assert most < 32 << 20
        while stream not in box.ended:
            await box.receive()
            seen += len(box.streams.get(stream, b""))
            box.streams[stream].clear()
            most = max(most, process.memory_info().rss - before) if seen % 97 == 0 else most
        assert seen == 1 << 30
        assert (await box.answer(waiting))["result"]["ok"]["code"] == 0
        assert most < 32 << 20


async def test_input_that_nobody_reads_does_not_block_the_connection(gateway: Gateway, client: RawClient) -> None:
    process = psutil.Process(gateway.process.pid)
    async with client.sandbox() as box:
        await box.send({"jsonrpc": "2.0", "method": "$sandbox.stream.start", "params": {"streamId": 3}})
        started = await box.call("spawn", command="sleep", args=["100"], stdinStreamId=3, stdout="null", stderr="null")
        before = process.memory_info().rss
        data = base64.b64encode(bytes(1 << 20)).decode()
        for _ in range(32):
            await box.send(
                {"jsonrpc": "2.0", "method": "$sandbox.stream.enqueue", "params": {"streamId": 3, "data": data}}
            )
        await box.alive()
        assert process.memory_info().rss - before < 16 << 20
        assert await box.call("processKill", pid=started["pid"], signal="SIGKILL") is None
        assert (await box.call("processWait", pid=started["pid"]))["code"] == 137


async def test_an_answer_beyond_an_sdks_limit_is_an_error(client: RawClient) -> None:
    client.headers["User-Agent"] = "Python/3.11 websockets/17.4"
    async with client.sandbox() as box:
        await box.run("sh", "-c", "head -c 2000000 /dev/zero > big")
        error = await box.fail("readFile", path="big")
        assert (error["constructorName"], error["code"]) == ("RangeError", "EFBIG")


async def test_streams_have_ids_of_their_own_in_all_connections(client: RawClient) -> None:
    async with client.sandbox() as one, client.sandbox() as two:
        ids = []
        for box in (one, two, one, two):
            started = await box.call("spawn", command="true")
            ids += [started["stdoutStreamId"], started["stderrStreamId"]]
        assert len(set(ids)) == 8


async def test_streams_begin_after_the_answer_that_names_them(client: RawClient) -> None:
    async with client.sandbox() as box:
        for _ in range(20):
            request_id = await box.request("walk", path="/etc/apt")
            first = await box.receive()
            assert first.get("id") == request_id, first
            stream = (await box.answer(request_id))["result"]["ok"]["streamId"]
            while stream not in box.ended:
                await box.receive()


async def test_output_waits_for_the_first_wait(client: RawClient) -> None:
    async with client.sandbox() as box:
        started = await box.call("spawn", command="echo", args=["x"], stdout="piped")
        await asyncio.sleep(0.3)
        await box.alive()
        assert started["stdoutStreamId"] not in box.streams
        await box.call("processWait", pid=started["pid"])
        while started["stdoutStreamId"] not in box.ended:
            await box.receive()
        assert bytes(box.streams[started["stdoutStreamId"]]) == b"x\n"


async def test_what_is_not_served_says_so(client: RawClient) -> None:
    for method, path in (
        ("GET", "/api/v2/apps"),
        ("POST", "/api/v2/layers"),
        ("GET", "/api/v2/revisions/x"),
        ("GET", "/"),
    ):
        status, body = await client.rest(method, path)
        assert (status, body["code"]) == (404, "NOT_SUPPORTED"), path
    status, body = await client.rest("PUT", "/api/v2/volumes")
    assert (status, body["code"]) == (405, "METHOD_NOT_ALLOWED")
    for query in ("labels=%7B'a'%3A", "labels=__import__('os')", "labels=1"):
        assert (await client.rest("GET", f"/api/v3/sandboxes?{query}"))[1]["code"] == "INVALID_FILTER"

"""The gateway comes and goes, and so do the nodes behind it."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agent.gateway.sandboxes.ids import from_sdk
from sandboxd.v1 import sandbox_pb2
from tests.support import gateway as gateways
from tests.support.daemon import Daemon, connected, daemon_with, until
from tests.support.gateway import Gateway
from tests.support.rawclient import RawClient, all_messages, listed, raw
from tests.tools.reliability import Reliability


async def test_a_gateway_that_stops_ends_sessions_and_leaves_timed_sandboxes(
    sdk_daemon: Daemon, gateway: Gateway
) -> None:
    directory = sdk_daemon.directory / "second"
    with gateways.running(sdk_daemon, directory) as first:
        async with raw(first) as client, client.sandbox(timeout="2m") as timed, client.sandbox():
            _, exposed = await client.rest("POST", f"/api/v3/sandbox/{timed.sandbox_id}/expose/http", {})
            await timed.call("exposeHttp", domain=exposed["domain"], port=80)
            assert len(await listed(first)) == 2
            await asyncio.to_thread(_stop, first)
            with pytest.raises(ConnectionError):
                await all_messages(timed)
    assert len(await listed(gateway)) == 1
    assert exposed["domain"].partition(".")[0] in (directory / "exposures.json").read_text()
    async with raw(gateway) as client:
        assert (await client.rest("DELETE", f"/api/v3/sandbox/{timed.sandbox_id}"))[0] == 204
    with gateways.running(sdk_daemon, directory):  # it sees that the sandbox is gone, and forgets what it exposed

        async def forgotten() -> bool:
            return exposed["domain"].partition(".")[0] not in (directory / "exposures.json").read_text()

        await until(forgotten)


async def test_a_gateway_that_is_stopped_or_killed(
    sdk_daemon: Daemon, gateway: Gateway, reliability: Reliability
) -> None:
    directory = sdk_daemon.directory / "doomed"
    with gateways.running(sdk_daemon, directory) as doomed:
        async with raw(doomed) as client, client.sandbox(timeout="2m") as timed:
            doomed.process.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(timed.call("readTextFile", path="/etc/hostname"))
            assert from_sdk(timed.sandbox_id) in await listed(gateway)  # another gateway, and the node, go on
            await asyncio.sleep(0.5)
            assert not waiting.done()
            doomed.process.send_signal(signal.SIGCONT)
            assert await asyncio.wait_for(waiting, 20)
            doomed.process.kill()
            doomed.process.wait(30)
            with pytest.raises(ConnectionError):
                await all_messages(timed)
    with gateways.running(sdk_daemon, directory) as again:
        assert from_sdk(timed.sandbox_id) in await listed(again)
        async with raw(again) as client:
            assert (await client.rest("DELETE", f"/api/v3/sandbox/{timed.sandbox_id}"))[0] == 204
    reliability.seen(
        "SIGSTOP and SIGKILL of sandboxd-gateway",
        "calls go on after SIGCONT; sandboxes with a lifetime live on, those of sessions end with their lease",
        "so; the next gateway serves and deletes what the killed one had made",
    )


async def test_sessions_live_by_a_lease(gateway: Gateway, client: RawClient) -> None:
    """Should the gateway die, its sandboxes end by themselves."""
    async with client.sandbox() as box, connected(gateway.daemon) as api:
        found = await api.sandboxes.GetSandbox(sandbox_pb2.GetSandboxRequest(id=from_sdk(box.sandbox_id) or ""))
        assert found.lifetime.lease.seconds == 60
        assert found.expire_time.seconds < time.time() + 61


async def test_two_nodes_behind_one_gateway(sdk_daemon: Daemon, directory: Path) -> None:
    with (
        daemon_with(directory, node__region="ams", templates__enabled="false", **_uplink(sdk_daemon)) as second,
        gateways.running(sdk_daemon, directory / "gateway", nodes=f"{sdk_daemon.address},{second.address}") as both,
        gateways.running(second, directory / "other", idle_timeout_s="3") as alone,
    ):  # fmt: skip
        async with raw(both) as client, raw(alone, alone.token) as other:
            ask = {"timeout": "2m"}
            async with client.sandbox(**ask, region="loc") as here, client.sandbox(**ask, region="ams") as there:
                assert (here.sandbox_id[:8], there.sandbox_id[:8]) == ("sbx_loc_", "sbx_ams_")
                assert await there.run("echo", "far") == "far\n"
            status, found = await client.rest("GET", "/api/v2/sandboxes")
            assert (status, {item["region"] for item in found}) == (200, {"loc", "ams"})
            async with client.connected(there.sandbox_id) as again:
                assert await again.run("echo", "again") == "again\n"
            status, _ = await other.rest("DELETE", f"/api/v3/sandbox/{here.sandbox_id}")
            assert status == 404  # a node that it does not know
            for slug, region in (("near", "loc"), ("far", "ams")):
                body = {"slug": slug, "region": region, "capacity": "300MB"}
                assert (await client.rest("POST", "/api/v2/volumes", body))[0] == 200
            body = {"slug": "near", "region": "ams", "capacity": "300MB"}
            assert (await client.rest("POST", "/api/v2/volumes", body))[1]["code"] == "SLUG_IN_USE"
            assert len((await client.rest("GET", "/api/v2/volumes"))[1]) == 2
            mounts = [{"volume": "near", "path": "/near"}, {"volume": "far", "path": "/far"}]
            with pytest.raises(aiohttp.WSServerHandshakeError):
                async with client.sandbox(**ask, volumes=mounts):
                    pass
            async with other.sandbox() as silent:
                with pytest.raises(ConnectionError):
                    await all_messages(silent)  # it says nothing, as one whose machine is gone
            assert "client is silent" in alone.log
            second.kill()  # a node that is gone is not in the way of the other
            assert len((await client.rest("GET", "/api/v2/volumes/near"))[1]) > 3
            with pytest.raises(aiohttp.WSServerHandshakeError):
                async with client.sandbox(**ask, region="ams"):
                    pass
            for path in (f"/api/v3/sandbox/{here.sandbox_id}", "/api/v2/volumes/near"):
                assert (await client.rest("DELETE", path))[0] == 204
    with daemon_with(directory):  # what the killed one left is ended
        pass


def _uplink(daemon: Daemon) -> dict[str, Any]:
    return {"egress__uplink": daemon.env["SANDBOXD_EGRESS__UPLINK"]}


def _stop(gateway: Gateway) -> None:
    gateway.process.terminate()
    gateway.process.wait(30)

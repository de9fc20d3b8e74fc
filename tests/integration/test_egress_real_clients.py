"""Programs as people use them, in the image that has them: with and without secrets, all certificates trusted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sandboxd.v1 import sandbox_pb2 as pb
from tests.conftest import IMAGES_DIR
from tests.support.client import MIB
from tests.support.daemon import Daemon, connected
from tests.support.egress import Box, policy
from tests.support.internet.internet import Internet

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(420),
    pytest.mark.skipif(not (IMAGES_DIR / "default").exists(), reason="needs the image default: just image default"),
]

VALUE = "the-real-value-0123456789"
FETCH = """
const answer = await fetch('https://web.example/headers', {headers: {'x-key': process.env.KEY}});
console.log(await answer.text());
"""
REQUESTS = """
import os
from pip._vendor import requests
print(requests.get('https://web.example/headers', headers={'x-key': os.environ['KEY']}, timeout=20).text)
"""
URLLIB = """
import os, urllib.request as u
print(u.urlopen(u.Request('https://web.example/headers', headers={'x-key': os.environ['KEY']})).read().decode())
"""
CLIENTS: dict[str, list[str]] = {
    "curl": ["sh", "-c", 'curl -sS --fail -H "x-key: $KEY" https://web.example/headers'],
    "wget": ["sh", "-c", 'wget -q -O - --header "x-key: $KEY" https://web.example/headers'],
    "requests": ["python3", "-c", REQUESTS],
    "urllib": ["python3", "-c", URLLIB],
    "node": ["node", "--input-type=module", "-e", FETCH],
    "deno": ["deno", "eval", FETCH.replace("process.env.KEY", "Deno.env.get('KEY')")],
}


async def test_real_clients_with_and_without_secrets(net_daemon: Daemon, internet: Internet) -> None:
    async with (
        connected(net_daemon) as client,
        client.sandbox(
            image="default", memory_bytes=768 * MIB, network=policy(["web.example", "git.example"]),
            secrets={"KEY": pb.Secret(value=VALUE, hosts=["web.example", "git.example"])},
        ) as sandbox,
    ):  # fmt: skip
        box = Box(client, sandbox.id, internet)
        await box.prepare()
        key = (await box.get()).secrets["KEY"].placeholder
        for name, argv in CLIENTS.items():
            mark = internet.mark()
            said = await client.run(sandbox.id, *argv, user="root")
            assert said.code == 0, (name, said.stdout, said.stderr)
            line = internet.since(mark, "http")[0]
            assert dict(line["headers"])["x-key"] == VALUE, name
            assert VALUE not in said.stdout.decode(), name
            assert json.loads(said.stdout)["path"] == "/headers"
            assert key[:20] in said.stdout.decode(), name
        assert await _cloned(client, sandbox.id) == "a repository\n"
        # The same without a secret: connections are spliced, and the servers' own certificates are seen.
        await box.update(policy(["web.example", "git.example"]), remove=["KEY"])
        for name in ("curl", "node", "deno", "requests"):
            said = await client.run(sandbox.id, *CLIENTS[name], user="root", env={"KEY": "plain"})
            assert said.code == 0, (name, said.stdout, said.stderr)
        assert await _cloned(client, sandbox.id) == "a repository\n"
        denied = await client.run(sandbox.id, "curl", "-sS", "https://evil.example/", user="root")
        assert denied.code != 0


async def _cloned(client: Any, sandbox_id: str) -> str:
    script = "rm -rf /tmp/r && git clone -q https://git.example/repo.git /tmp/r && cat /tmp/r/README"
    said = await client.run(sandbox_id, "sh", "-c", script, user="root")
    assert said.code == 0, said.stderr
    return str(said.stdout.decode())

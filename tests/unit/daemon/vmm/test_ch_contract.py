"""What the driver sends to Cloud Hypervisor, and what it understands, against the OpenAPI document of v53.0.

The document lies beside the repository and is not part of it; it is right but for the gaps below.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.daemon.vmm.cloud_hypervisor import config, http
from agent.daemon.vmm.cloud_hypervisor.http import ApiResponse
from agent.daemon.vmm.cloud_hypervisor.rest import RestClient
from agent.daemon.vmm.driver import DiskSpec, NicSpec, RateLimits
from tests.unit.daemon.vmm.test_ch_config import CLONE, TEMPLATE, spec

DOCUMENT = Path(__file__).parents[5] / "shared" / "cloud-hypervisor" / "openapi-v53.0.yaml"
# Known to the program (vmm/src/config.rs, vm_config.rs), and left out of the document.
GAPS = {"RestoreConfig": {"net_fds"}, "NetConfig": {"fds"}}
REPLIES = {
    "vmm.ping": {"build_version": "v53.0", "version": "53.0.0", "pid": 7, "features": ["io_uring", "kvm"]},
    "vm.info": {"config": {"payload": {"kernel": "/k"}}, "state": "Paused", "memory_actual_size": 1},
    "vm.counters": {"net0": {"rx_bytes": 1, "rx_frames": 2, "tx_bytes": 3, "tx_frames": 4}},
}


class Document:
    """The document, and a validator for as much of JSON Schema as it uses. What it does not know is refused."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.paths: dict[str, Any] = raw["paths"]
        self.schemas: dict[str, Any] = raw["components"]["schemas"]

    def request(self, method: str, name: str) -> dict[str, Any] | None:
        operation = self.paths[f"/{name}"][method.lower()]
        if "requestBody" not in operation:
            return None
        schema: dict[str, Any] = operation["requestBody"]["content"]["application/json"]["schema"]
        return schema

    def reply(self, method: str, name: str) -> dict[str, Any]:
        answer = self.paths[f"/{name}"][method.lower()]["responses"][200]
        schema: dict[str, Any] = answer["content"]["application/json"]["schema"]
        return schema

    def check(self, value: object, schema: dict[str, Any], where: str = "$") -> None:
        name = ""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            schema = self.schemas[name]
        kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
        kind = kinds[schema["type"]]
        assert isinstance(value, kind), f"{where} is no {schema['type']}"
        assert isinstance(value, bool) == (kind is bool), f"{where} is no {schema['type']}"
        if "enum" in schema:
            assert value in schema["enum"], f"{where} is {value!r}"
        if isinstance(value, int) and not isinstance(value, bool):
            assert value >= schema.get("minimum", value), where
            assert value <= schema.get("maximum", value), where
        if isinstance(value, list):
            for number, item in enumerate(value):
                self.check(item, schema["items"], f"{where}[{number}]")
        if isinstance(value, dict):
            self._check_object(value, schema, where, GAPS.get(name, set()))

    def _check_object(self, value: dict[str, Any], schema: dict[str, Any], where: str, gaps: set[str]) -> None:
        known = schema.get("properties", {})
        missing = set(schema.get("required", ())) - value.keys()
        assert not missing, f"{where} lacks {missing}"
        for name, item in value.items():
            if name in gaps:
                assert name not in known, f"{where}.{name} is no gap any more"
                continue
            inner = known.get(name, schema.get("additionalProperties"))
            assert inner is not None, f"{where}.{name} does not exist"
            self.check(item, inner, f"{where}.{name}")


@pytest.fixture(scope="module")
def document() -> Document:
    if not DOCUMENT.exists():
        pytest.skip(f"needs the OpenAPI document of Cloud Hypervisor v53.0 at {DOCUMENT}")
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return Document(yaml.safe_load(DOCUMENT.read_text()))


Sent = list[tuple[str, str, Any]]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Each request that a client makes; the answers are those above."""
    requests: Sent = []

    async def request(
        path: Path, method: str, name: str, body: bytes, fds: Sequence[int] = (), *, timeout_s: float
    ) -> ApiResponse:
        requests.append((method, name, json.loads(body) if body else None))
        reply = REPLIES.get(name)
        return ApiResponse(204, b"") if reply is None else ApiResponse(200, json.dumps(reply).encode())

    monkeypatch.setattr(http, "request", request)
    return requests


async def test_requests(document: Document, sent: Sent) -> None:
    client = RestClient(Path("/none"))
    limits = RateLimits(disk_bytes=1 << 40, disk_operations=1000, net_bytes=1)
    for changes in ({}, TEMPLATE, CLONE, {"disks": ()}, {"limits": limits}):
        for landlock in (False, True):
            await client.create(config.vm_config(spec(**changes), landlock=landlock))
    await client.add_net(config.net(NicSpec("tap0", "02:00:00:00:00:01"), limits), 0)
    await client.restore(Path("/dir"), {})
    await client.restore(Path("/dir"), {"net0": 0})
    await client.snapshot(Path("/dir"))
    await client.resize_disk("disk-a", 1 << 40)
    await client.resize(1, 0)
    for call in (client.boot, client.pause, client.resume, client.power_button, client.ping, client.state):
        await call()
    await client.counters()
    for method, name, body in sent:
        schema = document.request(method, name)
        assert (schema is None) == (body is None), name
        if schema is not None:
            document.check(body, schema, name)
    assert len({name for _, name, _ in sent}) == 13


@pytest.mark.parametrize("name", REPLIES)
def test_replies(document: Document, name: str) -> None:
    document.check(REPLIES[name], document.reply("GET", name), name)


def test_what_is_restored_from(document: Document) -> None:
    for changes in (CLONE, CLONE | {"nic": None}):
        for landlock in (False, True):
            built = config.restore_config(spec(**changes), landlock=landlock)
            document.check(built, {"$ref": "#/components/schemas/VmConfig"})


def test_the_validator_finds_what_is_wrong(document: Document) -> None:
    disk = config.disk(DiskSpec(Path("/d"), "d", False), RateLimits(disk_bytes=1))
    schema = {"$ref": "#/components/schemas/DiskConfig"}
    document.check(disk, schema)
    bucket = {"bandwidth": {"size": 1}}
    for wrong in ({"readonly": 1}, {"image_type": "raw"}, {"path": 7}, {"no_such": 1}, {"rate_limiter_config": bucket}):
        with pytest.raises(AssertionError):
            document.check(disk | wrong, schema)

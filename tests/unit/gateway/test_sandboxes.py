"""Sandbox ids, create requests and exposures."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.common.model import new_sandbox_id
from agent.common.tokens import TokenFile
from agent.gateway.errors import CallError, HttpError
from agent.gateway.sandboxes.create_request import CreateConfig, create_request, parse_config
from agent.gateway.sandboxes.exposures import Exposures
from agent.gateway.sandboxes.ids import from_sdk, region_letters, to_sdk


@given(st.integers(0, 36**16 - 1))
def test_ids_come_back(number: int) -> None:
    digits = ""
    for _ in range(16):
        number, digit = divmod(number, 36)
        digits += "0123456789abcdefghijklmnopqrstuvwxyz"[digit]
    assert from_sdk(to_sdk(f"sbx-{digits}", "local")) == f"sbx-{digits}"


def test_ids_have_the_form_that_the_sdk_asks_for() -> None:
    made = to_sdk(new_sandbox_id(), "eu-west-1")
    assert made.startswith("sbx_euw_")
    assert len(made) == 8 + 20
    assert [region_letters(name) for name in ("ord", "x", "", "Frankfurt")] == ["ord", "xxx", "xxx", "fra"]
    for wrong in ("", "sbx-0123456789abcdef", "sbx_ord_" + "i" * 20, "sbx_ord_" + "z" * 20, made + "0", made.upper()):
        assert from_sdk(wrong) is None


def header(value: Any) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def test_both_shapes_of_configs() -> None:
    javascript = parse_config(header({
        "stop_at_ms": int((time.time() + 60) * 1000), "memory_mb": 1024, "labels": {"job": "x"},
        "root": {"volume": "r"},
        "volumes": [{"volume": "vol-a", "path": "/data/a"}], "allow_net": ["example.com"],
        "secrets": {"K": {"hosts": ["api.x.com"], "value": "v"}}, "unknown": 1,
    }))  # fmt: skip
    assert javascript.mounts() == {"/data/a": "vol-a"}
    assert (javascript.expires_at() or 0) > time.time() + 50
    python = parse_config(header({"timeout": "5m", "volumes": {"/data": "vol-b"}, "env": {"A": "1"}, "labels": None}))
    assert python.mounts() == {"/data": "vol-b"}
    assert (python.expires_at() or 0) > time.time() + 290
    assert parse_config(header({"timeout": "session"})).expires_at() is None
    assert parse_config(header({})).memory_mb == 1280
    latin = base64.b64encode('{"labels": {"a": "é"}}'.encode("latin-1")).decode()  # as btoa() has it
    assert parse_config(latin).labels == {"a": "é"}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=80))
def test_any_header_is_a_config_or_a_refusal(raw: bytes | str) -> None:
    text = raw if isinstance(raw, str) else base64.b64encode(raw).decode()
    with contextlib.suppress(HttpError):
        parse_config(text).expires_at()


def test_requests_of_configs(tmp_path: Path) -> None:
    token, _ = TokenFile(tmp_path / "t").create("acme", max_memory_bytes=1 << 30, max_lifetime_s=60)
    request = create_request(CreateConfig(memory_mb=512, allow_net=[]), token, "default", 2)
    assert (request.tenant, request.image, request.lifetime.lease.seconds) == ("acme", "default", 60)
    assert request.network.HasField("allow")
    assert not create_request(CreateConfig(memory_mb=512), token, "default", 2).network.HasField("allow")
    assert request.env["DENO_DEPLOY_ORGANIZATION_ID"] == "acme"
    for config, code in (
        (CreateConfig(memory_mb=2048), "MEMORY_QUOTA"), (CreateConfig(memory_mb=512, timeout="2m"), "LIFETIME_QUOTA"),
        (CreateConfig(memory_mb=512, stop_at_ms=5), "INVALID_TIMEOUT"),
    ):  # fmt: skip
        with pytest.raises(HttpError) as caught:
            create_request(config, token, "default", 2)
        assert caught.value.code == code


def test_exposures_are_kept_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "exposures.json"
    first = Exposures(path, "example.com")
    name = first.reserve("sbx-1", "node")
    assert first.host_name(name) == f"{name}.example.com"
    with pytest.raises(CallError):
        first.bind(f"{name}.example.com:8443", "sbx-2", port=1)
    first.bind(f"{name}.example.com:8443", "sbx-1", port=80)
    user = first.reserve("sbx-1", "node", "ssh")
    again = Exposures(path, "example.com")
    again.load()
    found = again.find_host(f"{name.upper()}.example.com")
    assert found is not None
    assert found.port == 80
    assert again.find_host(f"{name}.evil.com") is None
    assert again.find(user, "http") is None
    assert again.find_host(f"{user}.example.com") is None
    assert again.sandboxes_on("node") == {"sbx-1"}
    again.remove_sandbox("sbx-1")
    assert again.find(user, "ssh") is None
    path.write_text("{")
    damaged = Exposures(path, "example.com")
    damaged.load()
    assert damaged.sandboxes_on("node") == set()
    assert (tmp_path / "exposures.damaged").exists()
    for _ in range(64):
        damaged.reserve("sbx-3", "node")
    with pytest.raises(HttpError):
        damaged.reserve("sbx-3", "node")

"""The gateway's pure parts: ids, configs, filters, sizes, patterns, failures, streams, exposures, tokens."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import posixpath
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.common.config.gateway import GatewaySettings
from agent.common.config.settings import ConfigError
from agent.common.errors import NotFound
from agent.common.model import new_sandbox_id
from agent.common.tokens import TokenFile, TokenFileError
from agent.gateway.app import _tls
from agent.gateway.errors import Failure, Refusal
from agent.gateway.ingress.exposures import Exposures
from agent.gateway.ingress.h2_ingress import _FrameLimit
from agent.gateway.jsonrpc import websockets  # noqa: F401  enters all methods
from agent.gateway.jsonrpc.connection import METHODS, _zod_like
from agent.gateway.jsonrpc.create_request import CreateConfig, create_request, parse_config
from agent.gateway.jsonrpc.streams import Inbound, Outbound
from agent.gateway.methods.files import times
from agent.gateway.methods.patterns import from_glob, from_javascript
from agent.gateway.nodes.ids import from_sdk, region_letters, to_sdk
from agent.gateway.rest.routes import label_filter
from agent.gateway.rest.volume_routes import _cursor, capacity_bytes

# -- ids ---------------------------------------------------------------------------------------------------------------


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


# -- configs -----------------------------------------------------------------------------------------------------------


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
    assert (javascript.lives_until() or 0) > time.time() + 50
    python = parse_config(header({"timeout": "5m", "volumes": {"/data": "vol-b"}, "env": {"A": "1"}, "labels": None}))
    assert python.mounts() == {"/data": "vol-b"}
    assert (python.lives_until() or 0) > time.time() + 290
    assert parse_config(header({"timeout": "session"})).lives_until() is None
    assert parse_config(header({})).memory_mb == 1280
    latin = base64.b64encode('{"labels": {"a": "é"}}'.encode("latin-1")).decode()  # as btoa() has it
    assert parse_config(latin).labels == {"a": "é"}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=80))
def test_any_header_is_a_config_or_a_refusal(raw: bytes | str) -> None:
    text = raw if isinstance(raw, str) else base64.b64encode(raw).decode()
    with contextlib.suppress(Refusal):
        parse_config(text).lives_until()


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
        with pytest.raises(Refusal) as caught:
            create_request(config, token, "default", 2)
        assert caught.value.code == code


def test_only_loopback_is_served_without_tls() -> None:
    assert _tls(GatewaySettings()) is None
    assert _tls(GatewaySettings(address="localhost:1")) is None
    for address in ("0.0.0.0:8600", "[::]:8600", "192.0.2.1:8600"):
        with pytest.raises(ConfigError, match="loopback"):
            _tls(GatewaySettings(address=address))
    with pytest.raises(ConfigError, match="cannot be used"):
        _tls(GatewaySettings(tls_cert="/nonexistent"))


# -- small languages ---------------------------------------------------------------------------------------------------


def test_label_filters() -> None:
    assert label_filter({"labels[job]": "x y", "limit": "1"}) == {"job": "x y"}
    assert label_filter({"labels": "{'job': 'x', 'a': 'b'}"}) == {"job": "x", "a": "b"}
    for wrong in ("{'a': 1}", "[]", "{", "x" * 5000, "{'a': __import__('os')}"):
        with pytest.raises(Refusal):
            label_filter({"labels": wrong})


def test_capacities_and_cursors() -> None:
    assert [capacity_bytes(value) for value in ("1GB", "1GiB", "300MB", "1.5 GB", 10**9, "400000 kB")] == [
        10**9, 2**30, 300 * 10**6, 15 * 10**8, 10**9, 4 * 10**8,
    ]  # fmt: skip
    for wrong in ("1 XB", "", "GB", "-1GB", "299MB", "21GiB", 5, "1e9"):
        with pytest.raises(Refusal):
            capacity_bytes(wrong)
    assert _cursor("vol-1") == "vol-1"
    assert _cursor("http://127.0.0.1:1/api/v2/volumes?limit=1&cursor=vol-2") == "vol-2"
    assert _cursor("http://127.0.0.1:1/") == ""


def test_times() -> None:
    made = times("2020-01-02T03:04:05.678Z", 5.5)
    assert made["access_time"].ToJsonString() == "2020-01-02T03:04:05.678Z"
    assert made["modify_time"].ToMicroseconds() == 5_500_000
    for wrong in ("yesterday", float("inf"), float("nan"), 1e300):
        with pytest.raises(Failure):
            times(wrong, 0.0)


@pytest.mark.parametrize(
    ("source", "flags", "yes", "no"),
    [
        (r"\.txt$", "", ["a.txt"], ["a.txt\n", "a.txtx"]),
        (r"^a", "m", ["b\na"], ["b"]),
        ("A", "i", ["a", "A"], ["b"]),
        (r"^\d+$", "", ["123"], ["١٢٣", ""]),
        (r"[\w-]+\/x", "", ["a-b/x"], ["/x"]),
        ("[^]", "", ["\n"], [""]),
        ("a[]b|c", "", ["c"], ["ab"]),
        ("[[]", "", ["["], ["]"]),
        (r"(?<year>\d{4})-\k<year>", "", ["2020-2020"], ["2020-2021"]),
        ("(?:a|b){2}(?!c)", "u", ["ab"], ["abc"]),
        ("a.c", "s", ["a\nc"], ["ac"]),
    ],
)
def test_javascript_patterns(source: str, flags: str, yes: list[str], no: list[str]) -> None:
    matches = from_javascript(source, flags)
    assert [text for text in yes if not matches(text)] == []
    assert [text for text in no if matches(text)] == []


def test_patterns_that_are_none_or_take_for_ever() -> None:
    for source, flags in (("(", ""), ("a", "q"), ("[z-a]", ""), (r"\cA", "")):
        with pytest.raises(Failure) as caught:
            from_javascript(source, flags)
        assert caught.value.kind == "SyntaxError"
    hostile = from_javascript("^(a|a|aa)+$", "")
    begun = time.monotonic()
    with pytest.raises(Failure, match="too long"):
        hostile("a" * 60 + "b")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("*.txt", ["a.txt", ".txt"], ["a/b.txt", "a.txtx"]),
        ("a?c", ["abc"], ["ac", "a/c"]),
        ("**/x", ["x", "a/x", "a/b/x"], ["ax"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab"]),
        ("{a,b}*.{md,txt}", ["a1.md", "b.txt"], ["c.md"]),
        ("[a-c]x", ["ax"], ["dx", "/x"]),
        ("[!a-c]x", ["dx"], ["ax", "/x"]),
        ("[[:digit:]]", ["5"], ["a"]),
        ("[]]", ["]"], ["["]),
        ("@(a|b)c", ["ac", "bc"], ["c", "abc"]),
        ("+(a|b)", ["abab"], [""]),
        ("?(a)b", ["b", "ab"], ["aab"]),
        ("!(a)b", ["bb", "b"], ["ab"]),
        (r"\*", ["*"], ["a"]),
        ("a{b", ["a{b"], ["ab"]),
        ("/abs/*", ["/abs/x"], ["abs/x"]),
    ],
)
def test_globs(glob: str, yes: list[str], no: list[str]) -> None:
    matches = from_glob(glob)
    assert [text for text in yes if not matches(text)] == []
    assert [text for text in no if matches(text)] == []


@settings(max_examples=300, deadline=None)
@given(st.text("ab*?[]{}(),|!+@\\/.-^", max_size=12))
def test_any_glob_is_a_pattern_or_a_failure(glob: str) -> None:
    with contextlib.suppress(Failure):
        from_glob(glob)(posixpath.normpath("a/b"))


# -- frames ------------------------------------------------------------------------------------------------------------


def test_every_method_of_the_protocol_is_there() -> None:
    assert len(METHODS) == 54


def test_validation_errors_as_the_python_sdk_reads_them() -> None:
    (item,) = json.loads(str(_zod_like("Expected `str`, got `int` - at `$.options[0].mode`")["message"]))
    assert (item["expected"], item["path"]) == ("str", ["options", "0", "mode"])
    (item,) = json.loads(str(_zod_like("Object missing required field `path`")["message"]))
    assert item["path"] == ["path"]


@given(st.lists(st.integers(0, 16384), max_size=6), st.randoms())
def test_frame_limits_whatever_the_pieces(sizes: list[int], random: Any) -> None:
    data = bytes(24) + b"".join(size.to_bytes(3, "big") + bytes(6) + bytes(size) for size in sizes)
    limit, at = _FrameLimit(), 0
    while at < len(data):
        step = random.choice((1, 5, 9, 1000, 100_000))
        assert limit.allows(data[at : at + step])
        at += step
    assert not limit.allows((16385).to_bytes(3, "big") + bytes(6))


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_what_does_not_fit_into_memory_waits_on_the_disk() -> None:
    waiting: list[int] = []
    stream = Inbound(waiting.append)
    pieces = [bytes([number]) * 300_000 for number in range(20)]
    for piece in pieces:
        stream.feed(piece)
    assert sum(waiting) >= 4_000_000
    stream.end()
    read = b""
    while data := await stream.read():
        read += data
    assert read == b"".join(pieces)
    assert sum(waiting) == 0
    stream.discard()
    stream.feed(b"late")
    assert await stream.read() == b""


async def drained(stream: Inbound) -> int:
    total = 0
    while data := await stream.read():
        total += len(data)
    return total


async def test_reading_and_feeding_in_turns() -> None:
    stream = Inbound()
    for number in range(200):
        stream.feed(bytes([number]) * 20_000)
        if number % 3 == 0:
            assert len(await stream.read()) > 0
    stream.end(Failure("Error", "given up"))
    with pytest.raises(Failure, match="given up"):
        await drained(stream)
    stream.discard()


async def test_nothing_is_sent_after_a_cancel_and_nothing_empty() -> None:
    sent: list[Any] = []

    async def send(message: object) -> None:
        sent.append(message)

    announced = asyncio.Event()
    announced.set()
    stream = Outbound(send, announced)
    await stream.write(b"")
    assert sent == []
    await stream.write(bytes(100_000))
    assert [message["method"].rpartition(".")[2] for message in sent] == ["start", "enqueue", "enqueue"]
    stream.cancel()
    await stream.write(b"more")
    await stream.end()
    assert len(sent) == 3
    other = Outbound(send, announced, ends_after_error=True)
    assert other.id == stream.id + 1
    await other.fail(Failure("Error", "x"))
    await other.end()
    assert [message["method"].rpartition(".")[2] for message in sent[3:]] == ["start", "error", "end"]


async def test_a_stream_begins_once_its_call_is_answered() -> None:
    sent: list[Any] = []

    async def send(message: object) -> None:
        sent.append(message)

    announced = asyncio.Event()
    writing = asyncio.create_task(Outbound(send, announced).write(b"early"))
    await asyncio.sleep(0.01)
    assert sent == []
    announced.set()
    await writing
    assert [message["method"].rpartition(".")[2] for message in sent] == ["start", "enqueue"]


# -- files of the gateway ----------------------------------------------------------------------------------------------


def test_exposures_are_kept_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "exposures.json"
    first = Exposures(path, "example.com")
    first.port = 8443
    name = first.reserve("sbx-1", "node")
    assert first.domain_of(name) == f"{name}.example.com:8443"
    with pytest.raises(Failure):
        first.bind(first.domain_of(name), "sbx-2", port=1)
    first.bind(first.domain_of(name), "sbx-1", port=80)
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
    again.drop("sbx-1")
    assert again.find(user, "ssh") is None
    path.write_text("{")
    damaged = Exposures(path, "example.com")
    damaged.load()
    assert damaged.sandboxes_on("node") == set()
    assert (tmp_path / "exposures.damaged").exists()
    for _ in range(64):
        damaged.reserve("sbx-3", "node")
    with pytest.raises(Refusal):
        damaged.reserve("sbx-3", "node")


def test_tokens(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "dir" / "tokens.json")
    assert file.check("ddo_x") is None
    token, text = file.create("acme", note="ci", regions=["loc"])
    assert text.startswith("ddo_")
    assert text not in (tmp_path / "dir" / "tokens.json").read_text()
    assert (tmp_path / "dir" / "tokens.json").stat().st_mode & 0o777 == 0o640
    found = TokenFile(tmp_path / "dir" / "tokens.json").check(text)
    assert found == token
    assert file.check(text + "x") is None
    with pytest.raises(NotFound):
        file.revoke("tok-none")
    file.revoke(token.id)
    assert file.check(text) is None
    for damage in ("{", '{"tokens": [{"id": 5}]}'):
        (tmp_path / "dir" / "tokens.json").write_text(damage)
        with pytest.raises(TokenFileError):
            file.check(text)

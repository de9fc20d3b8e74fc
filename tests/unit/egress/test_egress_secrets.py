"""Values in, values out: replacing in streams, placeholders, the vault, the guest's keystore."""

from __future__ import annotations

import base64
import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.common.errors import HostError, InvalidSpec
from agent.common.policy.rules import parse_rules
from agent.common.policy.secret import CaPair, Secret
from agent.daemon.storage.secrets.placeholder import PREFIX, new_placeholder
from agent.daemon.storage.secrets.vault import StoredSecrets, Vault
from agent.egress.http.secret_injection import SecretInjection, basic_credentials, secrets_mentioned
from agent.egress.http.stream_replacer import StreamReplacer
from guest import keystore

VALUE, MARK = 'v"al/ue+&0123456789', "sbx_secret_ABCDEFGH"


def secret(**fields: object) -> Secret:
    values = {"name": "KEY", "placeholder": MARK, "value": VALUE, "hosts": parse_rules(["a.example"], "x")}
    return Secret(**{**values, **fields})  # type: ignore[arg-type]


@given(st.lists(st.sampled_from([b"ab", b"abc", b"c", b"x", b"abab", b""])), st.integers(1, 5))
def test_replacing_does_not_depend_on_how_a_stream_is_cut(pieces: list[bytes], size: int) -> None:
    text = b"".join(pieces)
    pairs = {b"abc": b"<1>", b"abab": b"<2>"}
    whole = StreamReplacer(pairs).whole(text)
    replacer = StreamReplacer(pairs)
    cut = b"".join(replacer.feed(text[at : at + size]) for at in range(0, len(text), size)) + replacer.end()
    # Cut or not, nothing of a key is left that was there whole, and nothing else is changed.
    assert cut.replace(b"<1>", b"abc").replace(b"<2>", b"abab") == text
    assert whole.replace(b"<1>", b"abc").replace(b"<2>", b"abab") == text
    assert b"abc" not in cut


def test_only_what_may_be_the_beginning_is_held_back() -> None:
    replacer = StreamReplacer({b"secret": b"hidden"})
    assert replacer.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert replacer.feed(b"a sec") == b"a "
    assert replacer.feed(b"ret!") == b"hidden!"
    assert replacer.feed(b"sec") == b""
    assert replacer.feed(b"ond") == b"second"
    assert (replacer.feed(b"se"), replacer.end()) == (b"", b"se")


def test_requests_get_values_where_they_may() -> None:
    put = SecretInjection([secret()])
    basic = b"Basic " + base64.b64encode(b"u:" + MARK.encode())
    headers = [(b"X-Key", b"a " + MARK.encode()), (b"Authorization", basic), (b"Accept-Encoding", b"gzip")]
    path = f"/{MARK}?k={MARK}&b=1".encode()
    target, filled = put.inject(path, headers, has_body=False)
    changed = dict(filled)
    assert changed[b"X-Key"] == b"a " + VALUE.encode()
    assert basic_credentials(changed[b"Authorization"]) == b"u:" + VALUE.encode()
    assert changed[b"Accept-Encoding"] == b"identity"
    assert target == f"/{MARK}?k=v%22al%2Fue%2B%260123456789&b=1".encode()
    assert put.body(b"text/plain") is None


@pytest.mark.parametrize(
    ("fields", "target", "has_body", "encoding"),
    [
        ({}, b"/?k=" + MARK.encode(), False, b"identity"),
        ({}, b"/" + MARK.encode(), True, b"gzip"),
        ({"redact": False}, b"/?k=" + MARK.encode(), False, b"gzip"),
        ({"in_body": True}, b"/", True, b"identity"),
        ({"in_body": True}, b"/", False, b"gzip"),
    ],
)
def test_a_response_that_may_have_a_value_is_not_compressed(
    fields: dict[str, object], target: bytes, has_body: bool, encoding: bytes
) -> None:
    headers = [(b"Accept-Encoding", b"gzip")]
    assert SecretInjection([secret(**fields)]).inject(target, headers, has_body=has_body)[1] == [
        (b"Accept-Encoding", encoding)
    ]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        (b"application/json; charset=utf-8", json.dumps(VALUE)[1:-1]),
        (b"application/x-www-form-urlencoded", "v%22al%2Fue%2B%260123456789"),
        (b"text/plain", VALUE),
    ],
)
def test_bodies_get_values_in_the_form_of_their_type(kind: bytes, sent: str) -> None:
    body = SecretInjection([secret(in_body=True)]).body(kind)
    assert body is not None
    assert body.whole(b"a " + MARK.encode() + b" z") == f"a {sent} z".encode()


def test_answers_lose_values_and_keep_their_length() -> None:
    put = SecretInjection([secret()])
    put.inject(b"/", [(b"Authorization", b"Basic " + base64.b64encode(b"u:" + MARK.encode()))], has_body=False)
    redactor = put.redactor()
    assert redactor is not None
    basic = base64.b64encode(b"u:" + VALUE.encode()).decode()
    for text in (VALUE, json.dumps({"k": VALUE}), f"a={VALUE.replace('&', '&amp;').replace(chr(34), '&quot;')}", basic):
        hidden = redactor.whole(text.encode())
        assert len(hidden) == len(text)
        assert VALUE.encode() not in hidden
        assert hidden != text.encode()
    assert SecretInjection([secret(redact=False)]).redactor() is None
    assert SecretInjection([secret(value="short")]).redactor() is None


def test_placeholders_that_do_not_get_their_value_are_seen() -> None:
    one, two = secret(), secret(name="OTHER", placeholder="sbx_secret_OTHER")
    basic = b"Basic " + base64.b64encode(b"u:sbx_secret_OTHER")
    assert secrets_mentioned([one, two], b"/", [(b"authorization", basic)]) == [two]
    assert secrets_mentioned([one, two], f"/{MARK}".encode(), []) == [one]
    assert secrets_mentioned([one, two], b"/", [(b"x", b"y")]) == []


def test_placeholders_cannot_be_guessed_and_can_look_like_the_real_thing() -> None:
    made = {new_placeholder() for _ in range(100)}
    assert len(made) == 100
    assert all(mark.startswith(PREFIX) and len(mark) == len(PREFIX) + 32 for mark in made)
    like = "sk-ant-api03-AbC123_xyz-4567890abcdefghij"
    shaped = new_placeholder(like)
    assert (len(shaped), shaped[:13], shaped != like) == (len(like), like[:13], True)
    for one, other in zip(shaped[13:], like[13:], strict=True):
        for kind in (string.ascii_lowercase, string.ascii_uppercase, string.digits, "-_"):
            assert (one in kind) == (other in kind)
    with pytest.raises(InvalidSpec, match="keep_shape"):
        new_placeholder("ghp_tooshort")


async def test_the_vault_keeps_and_forgets(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "secrets")
    vault.open()
    held = StoredSecrets({"KEY": VALUE}, CaPair("certificate", "key"))
    await vault.put("sbx-1", held)
    again = Vault(tmp_path / "secrets")
    again.open()
    assert await again.get("sbx-1") == held
    assert await again.get("sbx-2") == StoredSecrets()
    assert all(VALUE.encode() not in path.read_bytes() for path in (tmp_path / "secrets").iterdir())
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "secrets").iterdir()} == {0o600}
    assert again.fingerprint({"a": "1"}) == vault.fingerprint({"a": "1"}) != vault.fingerprint({"a": "2"})
    assert VALUE not in repr(held)
    # One sandbox's values are not another's, whoever moves the files.
    (tmp_path / "secrets" / "sbx-1.sealed").rename(tmp_path / "secrets" / "sbx-2.sealed")
    with pytest.raises(HostError, match="cannot be decrypted"):
        await again.get("sbx-2")
    await again.delete("sbx-2")
    assert await again.get("sbx-2") == StoredSecrets()
    (tmp_path / "secrets" / "node.key").write_bytes(b"short")
    with pytest.raises(HostError, match="damaged"):
        Vault(tmp_path / "secrets").open()


def test_a_java_keystore_of_a_bundle() -> None:
    ders = [b"one", b"two" * 100]
    body = "".join(
        f"-----BEGIN CERTIFICATE-----\n{base64.encodebytes(der).decode()}-----END CERTIFICATE-----\n" for der in ders
    )
    assert keystore.certificates("junk\n" + body + "-----BEGIN CERTIFICATE-----\ncut") == ders
    store = keystore.keystore(ders)
    assert store[:12] == bytes.fromhex("feedfeed0000000200000002")
    assert store.count(b"X.509") == 2
    assert b"two" * 100 in store

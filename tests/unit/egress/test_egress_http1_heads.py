"""Request targets of HTTP/1.1: what a server gets of an absolute URL, and which authority was checked."""

from __future__ import annotations

import itertools
from urllib.parse import urlsplit

import h11
import pytest

from agent.common.policy.reasons import Reason
from agent.egress.http.http1_heads import authority_of, origin_form
from agent.egress.sandbox_state import Denied

AUTHORITIES = ["h", "h.example", "h:80", "192.0.2.1", "192.0.2.1:8080", "[2001:db8::1]", "[2001:db8::1]:80", "u:p@h"]
PATHS = ["", "/", "/a", "//a", "/a://b", "/a@b", "/a%2Fb"]
QUERIES = ["", "a=b", "a=/b", "a=//b/c", "a=http://other/x", "a=b?c=/d", "a=@other"]
FRAGMENTS = ["", "#", "#f", "#/f", "#?f=/g", "#@other/x"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("http://h?a=/b", "/?a=/b"),
        ("http://h?a=b", "/?a=b"),
        ("http://h", "/"),
        ("http://h/", "/"),
        ("HTTPS://h/a?b=c", "/a?b=c"),
        ("http://h#/b", "/"),
        ("http://h/a#/b?c", "/a"),
        ("http://h?a=/b#c", "/?a=/b"),
        ("http://user:word@h/a", "/a"),
        ("http://[2001:db8::1]:80?a=/b", "/?a=/b"),
        ("http://h//a", "//a"),
        ("/a?b=http://c/d", "/a?b=http://c/d"),
        ("*", "*"),
    ],
)
def test_origin_form(target: str, expected: str) -> None:
    assert origin_form(target.encode()) == expected.encode()


def test_origin_form_is_path_and_query_of_every_absolute_url() -> None:
    for authority, path, query, fragment in itertools.product(AUTHORITIES, PATHS, QUERIES, FRAGMENTS):
        resource = (path or "/") + (f"?{query}" if query else "")
        url = f"http://{authority}{path}{'?' if query else ''}{query}{fragment}"
        assert origin_form(url.encode()) == resource.encode(), url
        # The part that is cut off is the one that `authority_of` compares with the Host header.
        assert urlsplit(url).netloc == authority, url


def _authority(target: str, host: str) -> str:
    request = h11.Request(method="GET", target=target, headers=[("Host", host)])
    return authority_of(request, [(b"Host", host.encode())])


@pytest.mark.parametrize("end", ["", "/", "?a=/b", "#/b", "/a@other", "?@other/", "#@other/"])
def test_authority_ends_where_path_query_or_fragment_begins(end: str) -> None:
    for authority in AUTHORITIES:
        assert _authority(f"http://{authority}{end}", authority) == authority
        with pytest.raises(Denied) as caught:
            _authority(f"http://{authority}{end}", "other")
        assert caught.value.reason == Reason.HOST_MISMATCH

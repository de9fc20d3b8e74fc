"""TLS of the servers, domains of exposures, HTTP/2 frame sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.common.config.gateway import GatewaySettings
from agent.common.errors import ConfigError
from agent.gateway.app import api_tls_context
from agent.gateway.ingress.h2_ingress import FrameSizeLimit
from agent.gateway.ingress.https_ingress import Ingress
from agent.gateway.sandboxes.exposures import Exposures


def test_only_loopback_is_served_without_tls() -> None:
    assert api_tls_context(GatewaySettings()) is None
    assert api_tls_context(GatewaySettings(address="localhost:1")) is None
    for address in ("0.0.0.0:8600", "[::]:8600", "192.0.2.1:8600"):
        with pytest.raises(ConfigError, match="loopback"):
            api_tls_context(GatewaySettings(address=address))
    with pytest.raises(ConfigError, match="cannot be used"):
        api_tls_context(GatewaySettings(tls_cert="/nonexistent"))


def test_the_domain_of_an_exposure_names_the_port_unless_it_is_443(tmp_path: Path) -> None:
    exposures = Exposures(tmp_path / "exposures.json", "example.com")
    for told, bound, expected in ((0, 8643, "x.example.com:8643"), (8443, 8643, "x.example.com:8443"),
                                  (443, 8643, "x.example.com"), (0, 443, "x.example.com")):  # fmt: skip
        ingress = Ingress(GatewaySettings(ingress_port=told), exposures, lambda _address: None)
        ingress.port = bound
        assert ingress.authority("x") == expected


@given(st.lists(st.integers(0, 16384), max_size=6), st.randoms())
def test_frame_limits_whatever_the_pieces(sizes: list[int], random: Any) -> None:
    data = bytes(24) + b"".join(size.to_bytes(3, "big") + bytes(6) + bytes(size) for size in sizes)
    limit, at = FrameSizeLimit(), 0
    while at < len(data):
        step = random.choice((1, 5, 9, 1000, 100_000))
        assert limit.allows(data[at : at + step])
        at += step
    assert not limit.allows((16385).to_bytes(3, "big") + bytes(6))

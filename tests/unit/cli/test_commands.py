"""Parts of single commands: ports, locations, CPU use."""

from __future__ import annotations

import pytest
import typer

from agent.cli.commands.copy import Location
from agent.cli.commands.port_forward import parse_ports
from agent.cli.commands.top import cpu_percent

ID = "sbx-0123456789abcdef"


@pytest.mark.parametrize(
    ("word", "ports"), [("80", (80, 80)), ("8080:80", (8080, 80)), (":80", (0, 80)), ("0:80", (0, 80))]
)
def test_ports(word: str, ports: tuple[int, int]) -> None:
    assert parse_ports(word) == ports


@pytest.mark.parametrize("word", ["", "0", "http", "1:2:3", "80:", "70000:1", "1:70000", "-1:80"])
def test_wrong_ports(word: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_ports(word)


def test_places() -> None:
    assert Location.parse(f"{ID}:/a:b") == Location(ID, "/a:b")
    assert Location.parse(f"{ID}:") == Location(ID, "")
    for here in ("/a", "a:b", "sbx-short:/a", "-", f"./{ID}:x"):
        assert Location.parse(here) == Location("", here)


def test_cpu_percent() -> None:
    assert cpu_percent(1.0, 2.0, 2.0) == 50.0
    assert cpu_percent(2.0, 1.0, 1.0) == 0.0
    assert cpu_percent(1.0, 0.0, 1.0) is None
    assert cpu_percent(1.0, 2.0, 0.0) is None

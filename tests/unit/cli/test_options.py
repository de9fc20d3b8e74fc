"""Parsers of option values."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from agent.cli import options


def test_pairs() -> None:
    assert options.parse_pairs(["A=1", "B=x=y", "A=2", "C="], "--env") == {"A": "2", "B": "x=y", "C": ""}
    assert options.parse_pairs(["A"], "--label", value_needed=False) == {"A": ""}
    for wrong in ("A", "=1", ""):
        with pytest.raises(typer.BadParameter):
            options.parse_pairs([wrong], "--env")


def test_env_file(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("# comment\n\nA=1\nB = two words # kept\n")
    assert options.read_env_file(path) == {"A": "1", "B": " two words # kept"}
    path.write_text("A=1\nnonsense\n")
    with pytest.raises(typer.BadParameter, match="line 2"):
        options.read_env_file(path)
    with pytest.raises(typer.BadParameter, match="cannot read"):
        options.read_env_file(tmp_path / "none")

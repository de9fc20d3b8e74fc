"""Token file of the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.common.errors import NotFound
from agent.common.tokens import TokenFile, TokenFileError


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

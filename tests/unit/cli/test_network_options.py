"""What `create` and `update` make of their options about the network."""

from __future__ import annotations

import pytest
import typer

from agent.cli.commands import network_options
from agent.cli.errors import CliError
from sandboxd.v1 import sandbox_pb2


def test_policies() -> None:
    assert network_options.policy(None, nothing=False, inspect=False) is None
    some = network_options.policy(["a.example"], nothing=False, inspect=True)
    assert some is not None
    assert (list(some.allow.rules), some.inspect) == (["a.example"], True)
    nothing = network_options.policy(None, nothing=True, inspect=False)
    assert nothing is not None
    assert (nothing.HasField("allow"), list(nothing.allow.rules)) == (True, [])
    everything = network_options.policy(None, nothing=False, inspect=False, everything=True)
    assert everything is not None
    assert not everything.HasField("allow")
    with pytest.raises(typer.BadParameter):
        network_options.policy(["a.example"], nothing=True, inspect=False)


def test_secrets_come_from_the_environment_never_from_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "the value")
    found = network_options.secrets(["KEY=a.example,*.b.example+in-body+keep-shape"])["KEY"]
    assert (found.value, list(found.hosts)) == ("the value", ["a.example", "*.b.example"])
    assert (found.in_body, found.keep_shape, found.allow_reflection) == (True, True, False)
    with pytest.raises(CliError, match="set the environment variable NOBODYS"):
        network_options.secrets(["NOBODYS=a.example"])
    for wrong in ("KEY", "KEY=", "=a.example", "KEY=a.example+all"):
        with pytest.raises(typer.BadParameter):
            network_options.secrets([wrong])


def test_what_inspect_says() -> None:
    sandbox = sandbox_pb2.Sandbox(tenant="t", denials={"spoofed": 2})
    assert network_options.facts(sandbox)[0] == ("network", "open")
    sandbox.network.allow.SetInParent()
    sandbox.secrets["KEY"].CopyFrom(sandbox_pb2.SecretInfo(hosts=["a.example"], placeholder="mark"))
    assert network_options.facts(sandbox) == [
        ("network", "nothing"), ("  KEY", "mark for a.example"), ("  spoofed", "denied 2 times"), ("tenant", "t"),
    ]  # fmt: skip

"""The one place that rewrites a private table of h2, and what that table must be for it."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
from h2.connection import ConnectionInputs, ConnectionState, H2ConnectionStateMachine
from hyperframe.frame import GoAwayFrame

from agent.egress.http.h2_endpoint import keep_streams_after_goaway

REPOSITORY = Path(__file__).parents[3]
OPEN = (ConnectionState.CLIENT_OPEN, ConnectionState.SERVER_OPEN)


def test_the_table_is_what_stay_open_rewrites() -> None:
    table = H2ConnectionStateMachine._transitions
    assert type(table) is dict
    assert len(table) == 53
    for (state, action), (effect, target) in table.items():
        assert isinstance(state, ConnectionState)
        assert isinstance(action, ConnectionInputs)
        assert effect is None or callable(effect)
        assert isinstance(target, ConnectionState)
    for state in ConnectionState:
        assert table[state, ConnectionInputs.RECV_GOAWAY] == (None, ConnectionState.CLOSED)


def test_one_connection_alone_gets_another_table() -> None:
    before = dict(H2ConnectionStateMachine._transitions)
    connection = h2.connection.H2Connection()
    keep_streams_after_goaway(connection)
    changed = {key for key, value in connection.state_machine._transitions.items() if before[key] != value}
    assert changed == {(state, ConnectionInputs.RECV_GOAWAY) for state in OPEN}
    assert H2ConnectionStateMachine._transitions == before


@pytest.mark.parametrize("stays", [True, False])
def test_a_stream_goes_on_after_goaway(*, stays: bool) -> None:
    client = h2.connection.H2Connection()
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    if stays:
        keep_streams_after_goaway(client)
    client.initiate_connection()
    server.initiate_connection()
    client.send_headers(1, [(":method", "GET"), (":path", "/"), (":scheme", "https"), (":authority", "a")], True)
    server.receive_data(client.data_to_send())
    server.send_headers(1, [(":status", "200")])
    goodbye = GoAwayFrame(stream_id=0, last_stream_id=1, error_code=0).serialize()
    client.receive_data(server.data_to_send() + goodbye)
    server.send_data(1, b"the rest", end_stream=True)
    if not stays:  # once this fails, h2 does it by itself, and keep_streams_after_goaway can go
        with pytest.raises(h2.exceptions.ProtocolError):
            client.receive_data(server.data_to_send())
        return
    events = client.receive_data(server.data_to_send())
    assert [event.data for event in events if isinstance(event, h2.events.DataReceived)] == [b"the rest"]


def test_h2_is_pinned_to_what_was_tested() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (wanted,) = (text for text in project["dependencies"] if text.startswith("h2>="))
    lowest, _, highest = wanted.removeprefix("h2>=").partition(",<")
    installed, low, high = ([int(part) for part in text.split(".")] for text in (version("h2"), lowest, highest))
    assert low <= installed < high
    assert high == [low[0], low[1] + 1]  # private names may change with any minor version


def test_no_other_place_rewrites_it() -> None:
    sources = {str(path.relative_to(REPOSITORY)): path.read_text() for path in (REPOSITORY / "agent").rglob("*.py")}
    found = [name for name, text in sources.items() if "import h2" in text and "_transitions" in text]
    assert found == ["agent/egress/http/h2_endpoint.py"]

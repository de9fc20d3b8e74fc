"""One side of an HTTP/2 relay: its h2 state machine and the data that is queued for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from hyperframe.frame import GoAwayFrame

from agent.egress.http.secret_injection import Headers
from agent.egress.transport.byte_streams import Stream

MAX_HEADER_LIST_BYTES = 64 << 10
_MAX_STREAMS = 100
# The connection's window bounds the memory per connection and direction.
_WINDOW_BYTES = 256 << 10
_CONNECTION_WINDOW_BYTES = 512 << 10
_Code = h2.settings.SettingCodes
_SETTINGS = {
    _Code.MAX_CONCURRENT_STREAMS: _MAX_STREAMS,
    _Code.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_BYTES,
    _Code.INITIAL_WINDOW_SIZE: _WINDOW_BYTES,
}


@dataclass(eq=False, slots=True)
class OutgoingStream:
    """Data, trailers and end that are queued for one stream."""

    # Data, and its flow-controlled length on the other side.
    pieces: list[tuple[bytes, int]] = field(default_factory=list)
    trailers: Headers | None = None
    ended: bool = False


class H2Endpoint:
    """HTTP/2 connection to one side, with the data that its windows do not admit yet."""

    def __init__(self, stream: Stream, *, client_side: bool) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=client_side, header_encoding=False, normalize_outbound_headers=False)
        )
        self.queued: dict[int, OutgoingStream] = {}
        self.changed = asyncio.Event()
        self.sent = asyncio.Event()  # all that the windows admit was sent
        self._writing = asyncio.Lock()
        self.extra = b""  # written before the state machine's data
        settings = {**_SETTINGS, _Code.ENABLE_PUSH: 0} if client_side else _SETTINGS
        keep_streams_after_goaway(self.h2)
        self.h2.local_settings = h2.settings.Settings(client=client_side, initial_values=settings)
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(_CONNECTION_WINDOW_BYTES)

    async def flush(self) -> None:
        """Write the pending data of the state machine."""
        async with self._writing:  # the reading task waits, too, so answers to its frames cannot pile up
            extra, self.extra = self.extra, b""
            if data := extra + self.h2.data_to_send():
                await self.stream.write(data)

    def receive(self, data: bytes) -> list[h2.events.Event]:
        """Return the events of received bytes.

        :raises h2.exceptions.ProtocolError: they violate the protocol.
        """
        self.extra += self.h2.data_to_send()  # h2 discards pending data when it receives GOAWAY
        return self.h2.receive_data(data)

    def queue_goaway(self, last_stream_id: int) -> None:
        """Queue a GOAWAY that lets existing streams finish (RFC 9113, 6.8)."""
        goodbye = GoAwayFrame(stream_id=0, last_stream_id=last_stream_id, error_code=0)
        self.extra += self.h2.data_to_send() + goodbye.serialize()


def keep_streams_after_goaway(connection: h2.connection.H2Connection) -> None:
    """Keep the streams of `connection` alive after a received GOAWAY (RFC 9113, 6.8), at which h2 closes all of it.

    h2 has no setting for that, so this rewrites its private transition table, for one connection. It is the only place
    that does; pyproject.toml pins the versions of h2 whose table was tested
    (tests/unit/egress/test_egress_h2_table.py).
    """
    machine = connection.state_machine
    goaway = h2.connection.ConnectionInputs.RECV_GOAWAY
    states = (h2.connection.ConnectionState.CLIENT_OPEN, h2.connection.ConnectionState.SERVER_OPEN)
    machine._transitions = {**machine._transitions, **{(state, goaway): (None, state) for state in states}}


@contextlib.contextmanager
def ignoring_closed_stream(then: Callable[[], object] | None = None) -> Iterator[None]:
    """Suppress the error that the other side has closed the stream; call `then` in that case."""
    try:
        yield
    except (h2.exceptions.StreamClosedError, h2.exceptions.NoSuchStreamError):
        if then is not None:
            then()

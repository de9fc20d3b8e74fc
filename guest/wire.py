"""Frame format of the calls between host and guest: each call is a yamux stream with a JSON request and typed frames.

Both sides use this module; it imports the standard library only. A frame is a 5-byte head and its payload:

    0        1               5
    | type u8 | length u32 BE | payload (length bytes) |

The caller's first frame is REQUEST: a JSON object with "op". Then each side sends frames as the operation defines, and
the guest ends its side with exactly one RESULT (JSON object) or ERROR (JSON {"code", "message", "errno"?}). EOF means
that its sender sends no more data frames. Closing or resetting the stream earlier abandons the call.

Each length is checked before memory is allocated; a frame over a limit ends the link, since its sender is broken or
hostile.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum

from guest.yamux import Stream

VERSION = 1
HEAD = struct.Struct(">BI")
HEAD_BYTES = HEAD.size
MAX_JSON_BYTES = 2 << 20  # a process spec may carry 1 MiB of argv, 128 KiB of environment and the JSON escapes of both
MAX_DATA_BYTES = 1 << 20
LINK_PORT = 1024  # AF_VSOCK port on which the guest listens
SERIAL_NAME = "org.sandboxd.link"


class Frame(IntEnum):
    """Frame types."""

    REQUEST = 0  # JSON: first frame of the caller
    DATA = 1  # bytes: standard input, file contents, TCP bytes
    STDOUT = 2  # bytes
    STDERR = 3  # bytes
    EOF = 4  # empty
    RESULT = 5  # JSON: the call succeeded; last frame of the guest
    ERROR = 6  # JSON: the call failed; last frame of the guest
    EVENT = 7  # JSON: progress, pages of entries, control messages (resize, signal)


JSON_FRAMES = frozenset({Frame.REQUEST, Frame.RESULT, Frame.ERROR, Frame.EVENT})
_LIMITS = tuple(MAX_JSON_BYTES if kind in JSON_FRAMES else 0 if kind is Frame.EOF else MAX_DATA_BYTES for kind in Frame)


# Created once: json.dumps creates an encoder for each call, which takes 0.25 ms in an emulated guest.
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().decode


class WireError(Exception):
    """The peer broke the frame format or one of its limits."""


class CallError(Exception):
    """A call failed in the guest.

    :param code: INVALID | NOT_FOUND | EXISTS | DENIED | STATE | EXHAUSTED | UNSUPPORTED | INTERNAL
    :param errno: name of an errno such as "ENOENT", or a reason such as "EXEC_NOT_FOUND"; may be empty.
    """

    def __init__(self, code: str, message: str, errno: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.errno = errno


def parse_head(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int]:
    """Return (type, payload length) of the frame head at `offset`.

    :raises WireError: the type is unknown, or the length is over the type's limit.
    """
    kind, length = HEAD.unpack_from(data, offset)
    if kind >= len(_LIMITS):
        raise WireError(f"unknown frame type {kind}")
    if length > _LIMITS[kind]:
        raise WireError(f"frame of type {kind} with {length} bytes; at most {_LIMITS[kind]} are allowed")
    return kind, length


def pack(kind: int, payload: bytes | bytearray | memoryview = b"") -> bytes:
    """Return one whole frame.

    :raises WireError: the payload is over the type's limit.
    """
    if len(payload) > _LIMITS[kind]:
        raise WireError(f"frame of type {kind} with {len(payload)} bytes; at most {_LIMITS[kind]} are allowed")
    return HEAD.pack(kind, len(payload)) + payload


def pack_json(kind: int, value: dict[str, object]) -> bytes:
    """Return one whole JSON frame, in ASCII; bytes that are not UTF-8 are surrogate escapes (PEP 383).

    :raises WireError: the JSON is over the limit.
    """
    return pack(kind, _encode(value).encode("ascii"))


def parse_json(payload: bytes | bytearray | memoryview) -> dict[str, object]:
    """Return the JSON object in `payload`.

    :raises WireError: the payload is not a JSON object.
    """
    try:
        value = _decode(str(payload, "utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"frame is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError("frame is not a JSON object")
    return value


class FrameReader:
    """Parses the bytes of one yamux stream into frames.

    Data frames are returned in the pieces in which they arrive, so that at most a stream's window is buffered; JSON
    frames are returned whole, and buffered outside of the window up to their limit.
    """

    __slots__ = ("_json", "_kind", "_left", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._kind = -1
        self._left = 0
        self._json = bytearray()

    def next(self, max_bytes: int = MAX_DATA_BYTES) -> tuple[int, bytes] | None:
        """Return (type, payload), or None if more bytes are needed. At most `max_bytes` of a data frame at once.

        :raises WireError: the peer broke the frame format.
        """
        inbox = self._stream.inbox
        while True:
            if self._kind < 0:
                if len(inbox) < HEAD_BYTES:
                    return None
                self._kind, self._left = parse_head(inbox)
                self._stream.consume(HEAD_BYTES)
            if self._kind in JSON_FRAMES:
                return self._next_json(inbox)
            kind, size = self._kind, min(self._left, len(inbox), max_bytes)
            if size < self._left:
                if not size:
                    return None
                self._left -= size
            else:
                self._kind = -1
                if not size and kind != Frame.EOF:
                    continue  # an empty data frame has no meaning
            payload = bytes(memoryview(inbox)[:size])
            self._stream.consume(size)
            return kind, payload

    def _next_json(self, inbox: bytearray) -> tuple[int, bytes] | None:
        size = min(self._left, len(inbox))
        self._json += memoryview(inbox)[:size]
        self._stream.consume(size)
        self._left -= size
        if self._left:
            return None
        kind, payload = self._kind, bytes(self._json)
        self._kind = -1
        self._json.clear()
        return kind, payload


# A link can be lost and connected again at any byte. So a session begins with a handshake that cannot be mistaken for
# bytes of an earlier session: the host sends SYNC_REQUEST and a random nonce until the guest answers SYNC_REPLY and the
# same nonce; both discard the bytes before it. Before SYNC_REQUEST the host sends SYNC_FLUSH_BYTES zeros: they complete
# a frame of the earlier session that the guest may be receiving, and a header of zeros is a protocol error, after which
# the guest looks for the handshake again.
SYNC_REQUEST = b"\xffsandboxd-hello\xff"
SYNC_REPLY = b"\xffsandboxd-ready\xff"
NONCE_BYTES = 16
SYNC_BYTES = len(SYNC_REQUEST) + NONCE_BYTES
SYNC_FLUSH_BYTES = MAX_DATA_BYTES + 12


def find_sync(data: bytearray, word: bytes) -> bytes | None:
    """Return the nonce after the last `word` in `data`, and remove all up to its end; None if it is not complete.

    Without a match, only bytes that may be the beginning of one are kept, so that `data` stays small.
    """
    at = data.rfind(word)
    if at < 0 or len(data) < at + SYNC_BYTES:
        del data[: max(0, len(data) - SYNC_BYTES) if at < 0 else at]
        return None
    nonce = bytes(data[at + len(word) : at + SYNC_BYTES])
    del data[: at + SYNC_BYTES]
    return nonce

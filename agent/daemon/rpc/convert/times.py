"""Convert times and durations between protobuf messages and numbers of seconds or nanoseconds."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(unix_time_s: float) -> Timestamp:
    """Return a Timestamp for seconds since 1970, exact to the microsecond."""
    result = Timestamp()
    result.FromMicroseconds(round(unix_time_s * 1e6))
    return result


def timestamp_ns(unix_time_ns: int) -> Timestamp:
    """Return a Timestamp for nanoseconds since 1970."""
    seconds, nanos = divmod(unix_time_ns, 10**9)
    return Timestamp(seconds=seconds, nanos=nanos)


def unix_time_s(message: Timestamp) -> float:
    """Return seconds since 1970.

    Times outside of protobuf's range (years 1 to 9999) are converted, too; the caller checks the range.
    """
    return message.seconds + message.nanos / 1e9


def duration(seconds: float) -> Duration:
    """Return a Duration, exact to the microsecond."""
    result = Duration()
    result.FromMicroseconds(round(seconds * 1e6))
    return result


def duration_s(message: Duration) -> float:
    """Return the seconds of a Duration; the caller checks the range."""
    return message.seconds + message.nanos / 1e9

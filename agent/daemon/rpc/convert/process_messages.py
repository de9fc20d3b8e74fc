"""Convert a guest's descriptions of processes to the messages of process.proto."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.daemon.rpc.convert.guest_values import (
    guest_dict,
    guest_float,
    guest_int,
    guest_text,
    malformed,
    printable,
)
from agent.daemon.rpc.convert.times import timestamp_ns
from sandboxd.v1 import process_pb2

_MAX_PID = 1 << 30


def exit_message(values: Mapping[str, Any]) -> process_pb2.Exit:
    """Return how a process ended: its exit code, or the signal that killed it.

    :raises GuestUnreachable: a field is malformed.
    """
    signal_number = guest_int(values, "signal", 0, 64)
    message = process_pb2.Exit(
        signal=guest_text(values, "signal_name")[:32], signal_number=signal_number, oom_killed=values.get("oom") is True
    )
    if not signal_number:
        message.exit_code = guest_int(values, "code", 0, 255)
    return message


def process_message(values: Mapping[str, Any]) -> process_pb2.Process:
    """Return the message for a process that the API has started.

    :raises GuestUnreachable: a field is malformed.
    """
    argv = values.get("argv")
    if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
        raise malformed("argv")
    message = process_pb2.Process(
        process_id=guest_int(values, "id"), pid=guest_int(values, "pid", 0, _MAX_PID),
        argv=[printable(word) for word in argv], user=guest_text(values, "user"), cwd=guest_text(values, "cwd"),
        start_time=timestamp_ns(guest_int(values, "start_ns", 0, 1 << 62)), terminal=values.get("tty") is True,
    )  # fmt: skip
    if values.get("exit") is not None:
        message.exit.CopyFrom(exit_message(guest_dict(values, "exit")))
    return message


def system_process_message(values: Mapping[str, Any]) -> process_pb2.SystemProcess:
    """Return the message for one entry of the guest's process table (/proc).

    :raises GuestUnreachable: a field is malformed.
    """
    return process_pb2.SystemProcess(
        pid=guest_int(values, "pid", 0, _MAX_PID), parent_pid=guest_int(values, "ppid", 0, _MAX_PID),
        uid=guest_int(values, "uid", 0, (1 << 31) - 1), state=guest_text(values, "state")[:8],
        rss_bytes=guest_int(values, "rss"), command=guest_text(values, "command")[:4096],
        cpu_seconds=guest_float(values, "cpu_s"),
    )  # fmt: skip

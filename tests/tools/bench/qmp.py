"""QEMU's control protocol (QMP) without asyncio: for a create that a thread times, and for passing descriptors."""

from __future__ import annotations

import json
import socket
from typing import Any


class Qmp:
    """A control socket, one command at a time (QEMU's docs/interop/qmp-spec)."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = sock.makefile("rb")
        self._lines.readline()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> dict[str, Any]:
        """Return the command's result. :raises SystemExit: QEMU refuses the command."""
        return self._call(command, arguments, [])

    def pass_fd(self, name: str, fd: int) -> None:
        """Give QEMU a copy of a descriptor, under a name (getfd). :raises SystemExit: QEMU refuses it."""
        self._call("getfd", {"fdname": name}, [fd])

    def _call(self, command: str, arguments: dict[str, object], fds: list[int]) -> dict[str, Any]:
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        socket.send_fds(self._sock, [line], fds)
        while True:
            answer: dict[str, Any] = json.loads(self._lines.readline())
            if "return" in answer:
                return dict(answer["return"])
            if "error" in answer:
                raise SystemExit(f"QEMU refuses {command}: {answer['error']}")

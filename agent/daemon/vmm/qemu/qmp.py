"""QMP, QEMU's control protocol: one JSON object a line over a unix socket.

Source: QEMU's docs/interop/qmp-spec.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from agent.common.errors import VmmError

_MAX_LINE_BYTES = 4 << 20
_MAX_TEXT = 1000
_DEFAULT_TIMEOUT_S = 10.0


class Qmp:
    """A QMP connection with negotiated capabilities; runs one command at a time and skips events."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()
        self._last_id = 0

    @classmethod
    async def connect(cls, path: str, timeout_s: float = _DEFAULT_TIMEOUT_S) -> Qmp:
        """Connect to the socket at `path` and negotiate capabilities.

        :raises VmmError: no process listens there, or it is not QEMU, or it does not answer in time (QMP_FAILED).
        """
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_LINE_BYTES)
        except (OSError, TimeoutError) as error:
            raise VmmError(f"QEMU's control socket does not answer: {error}", reason="QMP_FAILED") from error
        qmp = cls(reader, writer)
        try:
            async with asyncio.timeout(timeout_s):
                greeting = await qmp._read()
            if "QMP" not in greeting:
                raise VmmError("QEMU's control socket sent no greeting", reason="QMP_FAILED")
            await qmp.execute("qmp_capabilities", timeout_s=timeout_s)
        except TimeoutError as error:
            qmp.close()
            raise VmmError("QEMU's control socket is silent", reason="QMP_FAILED") from error
        except BaseException:
            qmp.close()
            raise
        return qmp

    async def execute(self, command: str, *, timeout_s: float = _DEFAULT_TIMEOUT_S, **arguments: object) -> Any:
        """Run a command and return its result; underscores in argument names become hyphens.

        :raises VmmError: QEMU refused (QMP_REFUSED), did not answer in time (QMP_TIMEOUT), or is gone (QMP_FAILED).
        """
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                self._last_id += 1
                request["id"] = self._last_id
                self._writer.write(json.dumps(request).encode() + b"\n")
                await self._writer.drain()
                while True:
                    reply = await self._read()
                    if reply.get("id") != self._last_id:
                        continue  # an event, or the late answer to a command that timed out
                    if "return" in reply:
                        return reply["return"]
                    if "error" in reply:
                        error = reply["error"]
                        text = error.get("desc") if isinstance(error, dict) else error
                        raise VmmError(f"QEMU refused {command}: {str(text)[:_MAX_TEXT]}", reason="QMP_REFUSED")
        except TimeoutError as late:
            raise VmmError(f"QEMU did not answer {command} within {timeout_s:g} s", reason="QMP_TIMEOUT") from late
        except OSError as gone:
            raise VmmError(f"QEMU is gone: {gone}", reason="QMP_FAILED") from gone

    async def _read(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
            value = json.loads(line) if line else None
        except (ValueError, RecursionError) as error:  # an over-long line, or not JSON
            raise VmmError(f"QEMU's control socket sent garbage: {error}", reason="QMP_FAILED") from error
        except OSError as error:
            raise VmmError(f"QEMU is gone: {error}", reason="QMP_FAILED") from error
        if not isinstance(value, dict):
            raise VmmError("QEMU closed its control socket", reason="QMP_FAILED")
        return value

    def close(self) -> None:
        """Close the connection; QEMU runs on. Idempotent."""
        self._writer.close()

"""Client of a Deno REPL in a sandbox: `deno repl --json`, which speaks on descriptor 3 (observed with Deno 2.9.6).

A message is its length, u32 LE, and JSON. The request {"type": "Run", "code", "output"} is answered by RunSuccess,
RunFailure or Error. Answers come from the guest and are hostile.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import grpc
import msgspec

from agent.gateway.errors import CallError, process_gone
from agent.gateway.nodes.guest_stream import GuestStream

_LENGTH = struct.Struct("<I")
_MAX_ANSWER_BYTES = 64 << 20
# The REPL keeps the last value and the last error in `_` and `_error`, until user code redefines these names; so their
# getters are saved first. The output of a run is text.
_PREPARE = """{
  const kept = (name) => Object.getOwnPropertyDescriptor(globalThis, name).get;
  const [value, error] = [kept("_"), kept("_error")];
  const text = (thing) => { try { return String(thing); } catch { return ""; } };
  const describe = (thing) => typeof thing === "object" && thing !== null && "message" in thing
    ? { constructorName: text(thing.constructor?.name ?? "Error"), message: text(thing.message),
        name: text(thing.name ?? ""), code: typeof thing.code === "string" ? thing.code : null,
        stack: text(thing.stack ?? "") }
    : { constructorName: "Error", message: `Uncaught ${text(thing)}`, name: "", code: null, stack: "" };
  const encode = JSON.stringify;
  Object.defineProperty(globalThis, Symbol.for("sandboxd.repl"), {
    value: { value: () => encode(value()) ?? "null", error: () => encode(describe(error())) },
  });
}"""
_VALUE = 'globalThis[Symbol.for("sandboxd.repl")].value()'
_ERROR = 'globalThis[Symbol.for("sandboxd.repl")].error()'
_EXIT = "Deno.exit(0)"


class GuestRepl:
    """One REPL process. Concurrent calls are evaluated one after another."""

    def __init__(self, pid: int, stream: GuestStream) -> None:
        self._pid = pid
        self._stream = stream
        self._pending = bytearray()
        self._turn = asyncio.Lock()
        self._prepared = False

    async def evaluate(self, code: str) -> msgspec.Raw:
        """Evaluate a snippet and return the JSON of its completion value; undefined and functions become null.

        :raises CallError: the snippet threw, does not parse, or its value has no JSON form; or the REPL has ended.
        """
        async with self._turn:
            if not self._prepared:
                await self._run(_PREPARE)
                self._prepared = True
            answer = await self._run(code)
            if answer.get("type") == "Error":
                raise CallError("SyntaxError", str(answer.get("error")).removeprefix("SyntaxError: "))
            if answer.get("type") != "RunSuccess":
                raise await self._thrown_error()
            answer = await self._run(_VALUE)
            if answer.get("type") != "RunSuccess":  # such as a cycle, or a bigint
                raise await self._thrown_error()
            return _checked_json(answer.get("output"))

    async def call(self, function: str, args: list[Any]) -> msgspec.Raw:
        """Call a function, given by name or as an expression, and return the JSON of its awaited result.

        :raises CallError: as for `evaluate`.
        """
        text = json.dumps(json.dumps(args))
        return await self.evaluate(f"await ({function})(...JSON.parse({text}))")

    async def _thrown_error(self) -> CallError:
        answer = await self._run(_ERROR)
        try:
            error = msgspec.json.decode(str(answer.get("output")), type=dict[str, str | None])
        except msgspec.DecodeError:
            return CallError("Error", "the snippet failed, and the REPL reported no error")
        failure = CallError(
            error.get("constructorName") or "Error", error.get("message") or "", code=error.get("code"),
            name=error.get("name"),
        )  # fmt: skip
        failure.stack = error.get("stack") or None
        return failure

    async def _run(self, code: str) -> dict[str, Any]:
        message = json.dumps({"type": "Run", "code": code, "output": True}).encode()
        try:
            await self._stream.write(_LENGTH.pack(len(message)) + message)
            (length,) = _LENGTH.unpack(await self._read(_LENGTH.size))
            if length > _MAX_ANSWER_BYTES:
                raise CallError("RangeError", f"the value has {length} bytes of JSON; the limit is {_MAX_ANSWER_BYTES}")
            answer = msgspec.json.decode(await self._read(length))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, EOFError, msgspec.DecodeError):
            self._stream.close()
            raise process_gone(self._pid) from None
        return answer if isinstance(answer, dict) else {}

    async def _read(self, size: int) -> bytes:
        while len(self._pending) < size:
            data = await self._stream.read()
            if not data:
                raise EOFError
            self._pending += data
        data = bytes(self._pending[:size])
        del self._pending[:size]
        return data

    async def exit(self) -> None:
        """Ask the REPL to exit.

        :raises CallError: it has exited already.
        """
        message = json.dumps({"type": "Run", "code": _EXIT, "output": False}).encode()
        try:
            await self._stream.write(_LENGTH.pack(len(message)) + message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise process_gone(self._pid) from None

    def close(self) -> None:
        """Close the channel, which ends the REPL. Idempotent."""
        self._stream.close()


def _checked_json(text: object) -> msgspec.Raw:
    """Decode and encode JSON again, so that it can be embedded in a response.

    :raises CallError: it is not JSON: code in the sandbox has tampered with the REPL.
    """
    try:
        return msgspec.Raw(msgspec.json.encode(msgspec.json.decode(str(text))))
    except (msgspec.DecodeError, RecursionError):
        raise CallError("InvalidData", "the REPL answered with something that is not JSON") from None

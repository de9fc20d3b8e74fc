"""A Deno REPL in a sandbox: `deno repl --json`, whose protocol is on descriptor 3 (seen with Deno 2.9.6): a message is
its length, u32 LE, and JSON. {"type": "Run", "code", "output"} is answered by RunSuccess, RunFailure or Error.

Everything that comes back is hostile.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import grpc
import msgspec

from agent.gateway.errors import Failure, process_gone
from agent.gateway.nodes.guest_tcp import GuestStream

_LENGTH = struct.Struct("<I")
_MAX_ANSWER_BYTES = 64 << 20
# The REPL keeps the last value and the last error in `_` and `_error`, until the user gives these names to something
# else; so their getters are put aside first. Text is all that a run gives back.
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


class Repl:
    """One REPL. Snippets are evaluated one after another."""

    def __init__(self, pid: int, stream: GuestStream) -> None:
        self._pid = pid
        self._stream = stream
        self._pending = bytearray()
        self._turn = asyncio.Lock()
        self._prepared = False

    async def evaluate(self, code: str) -> msgspec.Raw:
        """Returns the JSON of a snippet's completion value; null for what JSON cannot say.

        :raises Failure: the snippet threw, or is no program, or the REPL has ended.
        """
        async with self._turn:
            if not self._prepared:
                await self._run(_PREPARE)
                self._prepared = True
            answer = await self._run(code)
            if answer.get("type") == "Error":
                raise Failure("SyntaxError", str(answer.get("error")).removeprefix("SyntaxError: "))
            if answer.get("type") != "RunSuccess":
                raise await self._thrown()
            answer = await self._run(_VALUE)
            if answer.get("type") != "RunSuccess":  # such as a cycle, or a bigint
                raise await self._thrown()
            return _checked_json(answer.get("output"))

    async def call(self, function: str, args: list[Any]) -> msgspec.Raw:
        """Calls a function, given by its name or as an expression, and awaits what it returns. :raises Failure:"""
        text = json.dumps(json.dumps(args))
        return await self.evaluate(f"await ({function})(...JSON.parse({text}))")

    async def _thrown(self) -> Failure:
        answer = await self._run(_ERROR)
        try:
            error = msgspec.json.decode(str(answer.get("output")), type=dict[str, str | None])
        except msgspec.DecodeError:
            return Failure("Error", "the snippet failed, and the REPL cannot say how")
        failure = Failure(
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
                raise Failure("RangeError", f"the value takes {length} bytes; at most {_MAX_ANSWER_BYTES} are carried")
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
        """Asks the REPL to end. :raises Failure: it has ended already."""
        message = json.dumps({"type": "Run", "code": _EXIT, "output": False}).encode()
        try:
            await self._stream.write(_LENGTH.pack(len(message)) + message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise process_gone(self._pid) from None

    def close(self) -> None:
        """Closes the channel, which ends the REPL. Idempotent."""
        self._stream.close()


def _checked_json(text: object) -> msgspec.Raw:
    """Returns JSON that can go into an answer as it is. :raises Failure: it is none: somebody tampers with the REPL."""
    try:
        return msgspec.Raw(msgspec.json.encode(msgspec.json.decode(str(text))))
    except (msgspec.DecodeError, RecursionError):
        raise Failure("InvalidData", "the REPL answered with something that is not JSON") from None

"""A sandbox of a real daemon on the test internet, and what tests of its network ask again and again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import textwrap
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from sandboxd.v1 import network_pb2, process_pb2
from sandboxd.v1 import sandbox_pb2 as pb
from tests.support.client import Client
from tests.support.internet.internet import Internet

_PRELUDE = (Path(__file__).parent / "prelude.py").read_text()
# The egress process reports every quarter of a second.
_COUNTED_WITHIN_S = 6.0
_SETTLED_S = 0.4
_PROBE_PORT = 9999
_prepared: set[str] = set()


def policy(allow: Iterable[str] | None, *, inspect: bool = False) -> pb.NetworkPolicy:
    """Returns the message; None is the open internet."""
    message = pb.NetworkPolicy(inspect=inspect)
    if allow is not None:
        message.allow.rules.extend(allow)
        message.allow.SetInParent()
    return message


@dataclass
class Box:
    """A running sandbox whose guest trusts the test internet's certificates."""

    client: Client
    id: str
    internet: Internet

    async def get(self) -> pb.Sandbox:
        return await self.client.sandboxes.GetSandbox(pb.GetSandboxRequest(id=self.id))

    async def prepare(self) -> None:
        """Has the guest trust the servers of the test internet, and run probes. Idempotent."""
        if self.id in _prepared:
            return
        _prepared.add(self.id)
        argv = ("sh", "-c", "cat >> /etc/ssl/certs/ca-certificates.crt")
        pem = await asyncio.to_thread(Path(self.internet.ca_file).read_bytes)
        assert (await self.client.run(self.id, *argv, stdin=pem, user="root")).code == 0
        server = f"{_PRELUDE}\nserve({_PROBE_PORT})\n"
        spec = process_pb2.ProcessSpec(argv=["python3", "-c", server], user="root")
        await self.client.processes.StartProcess(process_pb2.StartProcessRequest(sandbox_id=self.id, spec=spec))
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await self.probe("return 1") == 1
                    return
                except grpc.aio.AioRpcError:  # it does not listen yet
                    await asyncio.sleep(0.1)

    async def allow(self, *rules: str, inspect: bool = False) -> None:
        await self.update(network=policy(rules, inspect=inspect))

    async def open(self) -> None:
        await self.update(network=policy(None))

    async def update(
        self, network: pb.NetworkPolicy | None = None, secrets: Mapping[str, pb.Secret] | None = None,
        remove: Iterable[str] = (),
    ) -> None:  # fmt: skip
        request = pb.UpdateSandboxRequest(id=self.id, network=network, set_secrets=secrets, remove_secrets=remove)
        await self.client.sandboxes.UpdateSandbox(request)

    async def probe(self, code: str, timeout_s: float = 60.0, **values: Any) -> Any:
        """Runs the body of a function in the guest, as root, with `tests.support.prelude` and these values."""
        body = textwrap.indent(textwrap.dedent(code), "    ")
        given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        script = f"{given}\ndef work():\n{body}\n".encode()

        async def messages() -> AsyncIterator[network_pb2.DialRequest]:
            yield network_pb2.DialRequest(open=network_pb2.DialRequest.Open(sandbox_id=self.id, port=_PROBE_PORT))
            yield network_pb2.DialRequest(data=script)

        async with asyncio.timeout(timeout_s):
            said = json.loads(b"".join([answer.data async for answer in self.client.network.Dial(messages())]))
        assert "error" not in said, said["error"]
        return said["result"]

    async def denials(self) -> dict[str, int]:
        return dict((await self.get()).denials)

    @asynccontextmanager
    async def denied(self, *reasons: str, reaches: Iterable[tuple[int, str, int]] = ()) -> AsyncIterator[None]:
        """Expects what is inside to be denied for these reasons, for no other, and to reach only what is listed."""
        before, mark = await self.denials(), self.internet.mark()
        yield
        wanted = set(reasons)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_COUNTED_WITHIN_S):
                while not wanted <= self._new(before, await self.denials()):  # noqa: ASYNC110  in another process
                    await asyncio.sleep(0.1)
        await asyncio.sleep(_SETTLED_S)  # the last report: of this test, not of the next
        found = self._new(before, await self.denials())
        assert found == wanted, f"denied for {sorted(found)}, not for {sorted(wanted)}"
        escaped = self.internet.reached(mark) - set(reaches)
        assert not escaped, escaped

    @staticmethod
    def _new(before: Mapping[str, int], after: Mapping[str, int]) -> set[str]:
        return {reason for reason, count in after.items() if count > before.get(reason, 0)}

"""FileService as tests call it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from sandboxd.v1 import file_pb2 as pb
from sandboxd.v1 import sandbox_pb2
from tests.support.client import Client

HOME = "/home/sandbox"


class Files:
    """FileService of one sandbox, without the words that every call repeats."""

    def __init__(self, client: Client, sandbox: sandbox_pb2.Sandbox) -> None:
        self.client = client
        self.id = sandbox.id

    async def write(self, path: str, *pieces: bytes, **fields: Any) -> int:
        async def messages() -> AsyncIterator[pb.WriteFileRequest]:
            yield pb.WriteFileRequest(open=pb.WriteFileRequest.Open(sandbox_id=self.id, path=path, **fields))
            for piece in pieces:
                yield pb.WriteFileRequest(data=piece)

        return int((await self.client.files.WriteFile(messages())).written_bytes)

    async def read(self, path: str, **fields: Any) -> bytes:
        request = pb.ReadFileRequest(sandbox_id=self.id, path=path, **fields)
        return b"".join([piece.data async for piece in self.client.files.ReadFile(request)])

    async def stat(self, path: str, **fields: Any) -> pb.FileInfo:
        found: pb.FileInfo = await self.client.files.Stat(pb.StatRequest(sandbox_id=self.id, path=path, **fields))
        return found

    async def call(self, name: str, **fields: Any) -> Any:
        """Calls a unary RPC by name."""
        return await getattr(self.client.files, name)(getattr(pb, f"{name}Request")(sandbox_id=self.id, **fields))

    async def sh(self, script: str) -> None:
        result = await self.client.run(self.id, "sh", "-ec", script, user="root")
        assert result.code == 0, result.stderr

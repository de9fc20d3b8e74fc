"""Rates of a 256 MiB file written to and read from the sandbox through FileService."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from sandboxd.v1 import file_pb2
from tests.support.client import MIB
from tests.tools.bench.harness import Target

_SIZE_BYTES = 256 * MIB
_BLOCK = bytes(range(256)) * 1024
_PATH = "/home/sandbox/bench"


async def _upload(target: Target) -> float:
    async def messages() -> AsyncIterator[file_pb2.WriteFileRequest]:
        yield file_pb2.WriteFileRequest(open=file_pb2.WriteFileRequest.Open(sandbox_id=target.id, path=_PATH))
        for _ in range(_SIZE_BYTES // len(_BLOCK)):
            yield file_pb2.WriteFileRequest(data=_BLOCK)

    start = time.perf_counter()
    written = await target.client.files.WriteFile(messages())
    assert written.written_bytes == _SIZE_BYTES
    return _SIZE_BYTES / MIB / (time.perf_counter() - start)


async def _download(target: Target) -> float:
    start = time.perf_counter()
    size = 0
    async for piece in target.client.files.ReadFile(file_pb2.ReadFileRequest(sandbox_id=target.id, path=_PATH)):
        size += len(piece.data)
    assert size == _SIZE_BYTES
    return _SIZE_BYTES / MIB / (time.perf_counter() - start)


async def measure(target: Target) -> None:
    """Adds `upload_mib_s` and `download_mib_s`."""
    for _ in range(max(1, target.rounds // 2)):
        target.report.add("upload, MiB/s", await _upload(target))
        target.report.add("download, MiB/s", await _download(target))
    for name in ("upload", "download"):
        target.report.figures[f"{name}_mib_s"] = target.report.median(f"{name}, MiB/s")

"""Rates of a file written to and read from the sandbox through FileService."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from sandboxd.v1 import file_pb2
from tests.support.client import MIB
from tests.tools.bench.figures import Better, Figure
from tests.tools.bench.harness import Target

FIGURES: tuple[Figure, ...] = (
    Figure("upload_mib_s", "MiB/s", "a 256 MiB file through WriteFile", Better.HIGHER),
    Figure("download_mib_s", "MiB/s", "a 256 MiB file through ReadFile", Better.HIGHER),
)
_SIZE_BYTES, _SMALL_BYTES = 256 * MIB, 8 * MIB
_BLOCK = bytes(range(256)) * 1024
_PATH = "/home/sandbox/bench"


async def _upload(target: Target, size_bytes: int) -> float:
    """Return MiB/s."""

    async def messages() -> AsyncIterator[file_pb2.WriteFileRequest]:
        yield file_pb2.WriteFileRequest(open=file_pb2.WriteFileRequest.Open(sandbox_id=target.id, path=_PATH))
        for _ in range(size_bytes // len(_BLOCK)):
            yield file_pb2.WriteFileRequest(data=_BLOCK)

    start = time.perf_counter()
    written = await target.client.files.WriteFile(messages())
    assert written.written_bytes == size_bytes
    return size_bytes / MIB / (time.perf_counter() - start)


async def _download(target: Target, size_bytes: int) -> float:
    """Return MiB/s."""
    start = time.perf_counter()
    size = 0
    async for piece in target.client.files.ReadFile(file_pb2.ReadFileRequest(sandbox_id=target.id, path=_PATH)):
        size += len(piece.data)
    assert size == size_bytes
    return size_bytes / MIB / (time.perf_counter() - start)


async def measure(target: Target) -> None:
    """Measure a file written and read, in turns; see FIGURES."""
    report = target.report
    size_bytes = _SMALL_BYTES if report.small else _SIZE_BYTES
    for _ in range(max(1, report.rounds // 2)):
        report.add("upload, MiB/s", await _upload(target, size_bytes))
        report.add("download, MiB/s", await _download(target, size_bytes))
    for name in ("upload", "download"):
        report.figures[f"{name}_mib_s"] = report.median(f"{name}, MiB/s")

"""`report`: diagnostics of this host and its daemon in one archive, for a bug report.

Contains no secrets and no data of guests or clients: no environment, labels, console output, files or host names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.cli import output
from agent.cli.connect import connected
from agent.cli.errors import CliError, print_warning

_HOST_FILES = (
    "/etc/os-release", "/proc/version", "/proc/cmdline", "/proc/meminfo", "/proc/loadavg", "/proc/pressure/cpu",
    "/proc/pressure/memory", "/proc/pressure/io", "/proc/self/cgroup", "/proc/self/mountinfo", "/proc/filesystems",
)  # fmt: skip
_COMMANDS = (
    ("journal", ("journalctl", "--unit=sandboxd*", "--lines=5000", "--no-pager", "--output=cat")),
    ("unit", ("systemctl", "status", "--no-pager", "--lines=0", "sandboxd*")),
    ("disk", ("df", "--all", "--human-readable")),
)
_TIMEOUT_S = 20.0
# Fields of a sandbox that the daemon sets; other ones can have data of clients.
_SANDBOX_FIELDS = (
    "id",
    "state",
    "image_digest",
    "vcpus",
    "memory_bytes",
    "disk_bytes",
    "create_time",
    "expire_time",
    "phases",
    "vmm",
)


async def report(
    to: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Archive to write. Default: sandboxd-report-TIME.tar.gz."),
    ] = None,
) -> None:
    """Collect diagnostics for a bug report into an archive.

    The archive has no secrets and no data of guests.
    """
    import platform

    path = to or Path(f"sandboxd-report-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.tar.gz")
    parts: dict[str, str] = {"about.json": json.dumps({"host": platform.node(), "python": platform.python_version()})}
    for name, collect in (("host", _host), ("daemon", _daemon), ("settings", _settings), ("metrics", _metrics)):
        await _add(parts, name, collect)
    try:
        _write(path, parts)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}", reason="WRITE_FAILED") from error
    output.print_result({"path": str(path), "parts": sorted(parts)}, str(path))


async def _add(parts: dict[str, str], name: str, collect: Callable[[], Awaitable[dict[str, str]]]) -> None:
    """Add the parts that `collect` returns, or its error: most reports are made because something is broken."""
    try:
        parts |= await collect()
    except Exception as error:  # noqa: BLE001  any failure must leave the other parts
        parts[f"{name}.error"] = f"{type(error).__name__}: {error}"
        print_warning(f"the report lacks {name}: {error}")


async def _host() -> dict[str, str]:
    import asyncio

    return await asyncio.to_thread(_read_host)


def _read_host() -> dict[str, str]:
    import subprocess

    found = {}
    for name in _HOST_FILES:
        try:
            found[f"host{name}"] = Path(name).read_text(errors="replace")
        except OSError as error:
            found[f"host{name}.error"] = str(error)
    for name, argv in _COMMANDS:
        try:
            done = subprocess.run(argv, capture_output=True, timeout=_TIMEOUT_S, check=False)
            found[f"host/{name}"] = (done.stdout + done.stderr).decode(errors="replace")
        except (OSError, subprocess.TimeoutExpired) as error:
            found[f"host/{name}.error"] = str(error)
    return found


async def _daemon() -> dict[str, str]:
    from sandboxd.v1 import node_pb2, sandbox_pb2

    async with connected() as api:
        node = await api.nodes.GetNode(node_pb2.GetNodeRequest())
        templates = await api.templates.ListTemplates(node_pb2.ListTemplatesRequest())
        sandboxes = await api.sandboxes.ListSandboxes(sandbox_pb2.ListSandboxesRequest(page_size=1000))
    shown = [_without_client_data(output.to_json(sandbox)) for sandbox in sandboxes.sandboxes]
    return {
        "daemon/node.json": _json(output.to_json(node)),
        "daemon/templates.json": _json([output.to_json(template) for template in templates.templates]),
        "daemon/sandboxes.json": _json(shown),
    }


def _without_client_data(sandbox: dict[str, Any]) -> dict[str, Any]:
    facts = {name: sandbox[name] for name in _SANDBOX_FIELDS}
    return facts | {"volumes": len(sandbox["volumes"]), "failed": bool(sandbox["error"])}


async def _settings() -> dict[str, str]:
    """Return the settings: they have paths and limits, and never keys or values of secrets."""
    import dataclasses

    from agent.common.config.loading import load

    return {"settings.json": _json(dataclasses.asdict(load()))}


async def _metrics() -> dict[str, str]:
    import urllib.request

    from agent.common.config.loading import load

    address = load().metrics.address
    if not address:
        return {}
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as answer:  # noqa: ASYNC210
        return {"metrics.txt": answer.read().decode()}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"


def _write(path: Path, parts: dict[str, str]) -> None:
    import io
    import tarfile

    with tarfile.open(path, "x:gz") as archive:
        for name, text in sorted(parts.items()):
            data = text.encode()
            entry = tarfile.TarInfo(f"sandboxd-report/{name.lstrip('/')}")
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
            archive.addfile(entry, io.BytesIO(data))
    path.chmod(0o600)

"""`image`: what sandboxes boot."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Annotated

import typer

from agent.cli import output, text
from agent.cli.connect import connected
from agent.cli.errors import INTERRUPTED, CliError, complain, status_of
from agent.common.errors import AgentError

_Name = Annotated[str, typer.Argument(metavar="NAME")]


async def ls() -> None:
    """List the images of the node."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        images = (await api.images.ListImages(node_pb2.ListImagesRequest())).images
    if output.json_wanted():
        for image in images:
            output.emit({key: value for key, value in output.to_json(image).items() if key != "packages"})
        return
    rows = [
        (
            image.name, text.size(image.size_bytes), image.kernel_version, text.size(image.min_memory_bytes),
            output.since(image.create_time), image.digest.removeprefix("sha256:")[:12],
        )
        for image in images
    ]  # fmt: skip
    output.print_table(("NAME", "SIZE", "KERNEL", "MIN MEMORY", "AGE", "DIGEST"), rows)


async def inspect(name: _Name) -> None:
    """Show one image with its packages."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        image = await api.images.GetImage(node_pb2.GetImageRequest(name=name))
    if output.json_wanted():
        output.emit(output.to_json(image))
        return
    facts = [
        ("name", image.name), ("digest", image.digest), ("size", text.size(image.size_bytes)),
        ("kernel", image.kernel_version), ("min memory", text.size(image.min_memory_bytes)),
        ("created", image.create_time.ToJsonString()), ("packages", str(len(image.packages))),
    ]  # fmt: skip
    for key, value in facts:
        output.say(f"{key:<12}{value}")
    for package in image.packages:
        output.say(f"  {package.replace('=', ' ', 1)}")


async def rm(name: _Name) -> None:
    """Delete an image that no sandbox uses."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        await api.images.DeleteImage(node_pb2.DeleteImageRequest(name=name))
    if output.json_wanted():
        output.emit({"name": name, "deleted": True})
    else:
        output.say(name)


def build(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as minimal or default.")],
    check: Annotated[bool, typer.Option("--check", help="Also build without caches; fail if a byte differs.")] = False,
    mirror: Annotated[str, typer.Option(metavar="URL", help="Debian archive; default: this machine's.")] = "",
) -> int:
    """Build an image on this machine, unless it is up to date; progress is on stderr."""
    from agent.common.config.loading import load

    try:
        settings = load()
        argv = [
            sys.executable, "-m", "rootfs", "build", name, "--images-dir", str(settings.images.images_dir),
            "--cache-dir", str(settings.paths.cache_dir / "rootfs"),
            *(["--check"] if check else []), *(["--mirror", mirror] if mirror else []),
        ]  # fmt: skip
        result = _run(argv)
    except AgentError as error:
        complain(error)
        return status_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    if output.json_wanted():
        output.emit(result)
    else:
        state = "is up to date" if result.get("cached") else "built"
        output.say(f"{result.get('name')} {state}: {result.get('path')} ({result.get('digest')})")
    return 0


def _run(argv: list[str]) -> dict[str, object]:
    """Runs the builder to its end, which removes what it began, whatever ends us. :raises CliError: it failed."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    # In a process group of its own, so that Ctrl-C reaches it once, through us: a second signal would end its clean-up.
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, process_group=0) as builder:
        try:
            printed, _ = builder.communicate()
        except KeyboardInterrupt:
            builder.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if builder.returncode == 2:
        raise CliError("the builder does not know this image or option; see above", reason="USAGE", status=2)
    try:
        result: dict[str, object] = json.loads(printed.splitlines()[-1])
    except (ValueError, IndexError):
        raise CliError(
            f"the builder ended with status {builder.returncode}; what it said is above", reason="BUILD_FAILED"
        ) from None
    return result

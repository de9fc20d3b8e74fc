"""`image`: the images that sandboxes boot, on the node and built on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import formatting, output
from agent.cli.connect import connected
from agent.cli.errors import EXIT_INTERRUPTED, CliError, error_exit_status, print_error
from agent.common.errors import AgentError

if TYPE_CHECKING:
    from sandboxd.v1.node_pb2 import Image

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Image name.")]


async def ls() -> None:
    """List the images of the node."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        images = (await api.images.ListImages(node_pb2.ListImagesRequest())).images
    if output.json_enabled():
        for image in images:
            output.print_json({key: value for key, value in output.to_json(image).items() if key != "packages"})
        return
    headers = ("NAME", "SIZE", "KERNEL", "MIN MEMORY", "AGE", "DIGEST")
    output.print_table(headers, [_row(image) for image in images])


def _row(image: Image) -> tuple[str, ...]:
    size, min_memory = formatting.size(image.size_bytes), formatting.size(image.min_memory_bytes)
    age, digest = formatting.since(image.create_time), image.digest.removeprefix("sha256:")[:12]
    return image.name, size, image.kernel_version, min_memory, age, digest


async def inspect(name: _Name) -> None:
    """Show one image and its packages."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        image = await api.images.GetImage(node_pb2.GetImageRequest(name=name))
    if output.json_enabled():
        output.print_json(output.to_json(image))
        return
    facts = [
        ("name", image.name), ("digest", image.digest), ("size", formatting.size(image.size_bytes)),
        ("kernel", image.kernel_version), ("min memory", formatting.size(image.min_memory_bytes)),
        ("created", image.create_time.ToJsonString()), ("packages", str(len(image.packages))),
    ]  # fmt: skip
    output.print_facts(facts, width=12)
    for package in image.packages:
        output.print_line(f"  {package.replace('=', ' ', 1)}")


async def rm(name: _Name) -> None:
    """Delete an image that no sandbox uses."""
    from sandboxd.v1 import node_pb2

    async with connected() as api:
        await api.images.DeleteImage(node_pb2.DeleteImageRequest(name=name))
    output.print_result({"name": name, "deleted": True}, name)


def build(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Image name, such as minimal or default.")],
    check: Annotated[
        bool, typer.Option("--check", help="Build again without caches; fail if the results differ.")
    ] = False,
    mirror: Annotated[str, typer.Option(metavar="URL", help="Debian mirror. Default: that of this machine.")] = "",
) -> int:
    """Build an image on this machine unless it is up to date.

    Progress goes to stderr.
    """
    from agent.common.config.loading import load

    try:
        settings = load()
        argv = [
            sys.executable, "-m", "rootfs", "build", name, "--images-dir", str(settings.images.images_dir),
            "--cache-dir", str(settings.paths.cache_dir / "rootfs"),
            *(["--check"] if check else []), *(["--mirror", mirror] if mirror else []),
        ]  # fmt: skip
        result = _run_builder(argv)
    except AgentError as error:
        print_error(error)
        return error_exit_status(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    state = "is up to date" if result.get("cached") else "built"
    output.print_result(result, f"{result.get('name')} {state}: {result.get('path')} ({result.get('digest')})")
    return 0


def _run_builder(argv: list[str]) -> dict[str, object]:
    """Run the image builder and return its result; on SIGINT and SIGTERM let it clean up first.

    :raises CliError: the builder failed.
    :raises KeyboardInterrupt: after SIGINT or SIGTERM.
    """

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    # A process group of its own, so that Ctrl-C reaches the builder once, from here: a second signal ends its cleanup.
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, process_group=0) as builder:
        try:
            printed, _ = builder.communicate()
        except KeyboardInterrupt:
            builder.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if builder.returncode == 2:
        raise CliError(
            "the image builder rejected the image name or an option; see its output above", reason="USAGE", status=2
        )
    try:
        result: dict[str, object] = json.loads(printed.splitlines()[-1])
    except (ValueError, IndexError):
        raise CliError(
            f"the image builder failed with exit status {builder.returncode}; see its output above",
            reason="BUILD_FAILED",
        ) from None
    return result

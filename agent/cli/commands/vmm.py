"""`vmm`: the program that runs virtual machines on this host."""

from __future__ import annotations

import hashlib
from typing import Annotated

import typer

from agent.cli import output


async def install(
    sha256: Annotated[
        str, typer.Option(metavar="DIGEST", help="Of the release, from where you trust it. Default: the settings'.")
    ] = "",
) -> None:
    """Download the release of Cloud Hypervisor that sandboxd works with, check its digest, and put it where the daemon
    looks.
    """
    from agent.common.config.loading import load
    from agent.daemon.vmm.cloud_hypervisor.install import URL
    from agent.daemon.vmm.cloud_hypervisor.install import install as download

    settings = load()
    vmm = settings.vmm
    path = await download(settings.paths.tools_dir, sha256 or vmm.download_sha256, vmm.download_url or URL)
    if output.json_wanted():
        output.emit({"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    else:
        output.say(str(path))

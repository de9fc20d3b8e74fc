"""Makes the test internet: a namespace with servers, and an uplink namespace that leads there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from tests.support.internet import log, zone

_READY_S = 30.0


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@dataclass(frozen=True)
class Internet:
    """A running test internet."""

    directory: Path
    uplink: str  # namespace
    namespace: str

    @property
    def ca_file(self) -> str:
        """The certificate that its servers' certificates are from."""
        return str(self.directory / "ca.pem")

    def settings(self) -> dict[str, Any]:
        """Returns what a daemon of this internet is started with."""
        return {
            "egress__uplink": self.uplink, "egress__resolvers": zone.RESOLVER, "egress__upstream_ca_file": self.ca_file,
        }  # fmt: skip

    def mark(self) -> int:
        """Returns the place in the log where it ends now."""
        return (self.directory / "log").stat().st_size

    def since(self, mark: int, kind: str) -> list[dict[str, Any]]:
        """Returns what arrived since then: of kind dns, http, tcp or packet."""
        return [line for line in log.read(self.directory / "log", mark) if line["kind"] == kind]

    def reached(self, mark: int) -> set[tuple[int, str, int]]:
        """Returns (protocol, address, port) of all that arrived since then, but for questions to the resolver."""
        return {
            (line["protocol"], line["target"], line["port"])
            for line in self.since(mark, "packet")
            if (line.get("target"), line.get("port")) != (zone.RESOLVER, 53)
        }


def _certificates(directory: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(directory / "ca.pem"))
    server = ca.issue_cert(*zone.CERTIFIED)
    server.private_key_pem.write_to_path(str(directory / "server.key"))
    for index, part in enumerate(server.cert_chain_pems):
        part.write_to_path(str(directory / "server.pem"), append=index > 0)


def _repository(directory: Path) -> None:
    """A git repository, as files that a web server gives out (git-update-server-info(1))."""
    work, bare = directory / "work", directory / "files" / "repo.git"
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(directory)}
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]

    def git(*words: str) -> None:
        subprocess.run(["git", *who, *words], check=True, env=env, capture_output=True)

    git("init", str(work))
    (work / "README").write_text("a repository\n")
    git("-C", str(work), "add", "README")
    git("-C", str(work), "commit", "-m", "first")
    git("clone", "--bare", str(work), str(bare))
    git("-C", str(bare), "update-server-info")


def _namespaces(uplink: str, internet: str) -> None:
    link = f"egt{os.getpid()}"
    for name in (uplink, internet):
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", uplink, "link", "add", "up0", "type", "veth", "peer", "name", link, "netns", internet)
    for name, interface, ipv4, ipv6 in (
        (uplink, "up0", zone.UPLINK4, zone.UPLINK6), (internet, link, zone.INTERNET4, zone.INTERNET6),
    ):  # fmt: skip
        _ip("-n", name, "addr", "add", f"{ipv4}/30", "dev", interface)
        _ip("-n", name, "addr", "add", f"{ipv6}/64", "dev", interface, "nodad")
        _ip("-n", name, "link", "set", interface, "up")
    _ip("-n", uplink, "route", "add", "default", "via", zone.INTERNET4)
    _ip("-n", uplink, "route", "add", "default", "via", zone.INTERNET6)
    # Every address but the uplink's is one of this namespace's own.
    _ip("-n", internet, "route", "add", "local", "default", "dev", "lo", "table", "main")
    _ip("-n", internet, "-6", "route", "add", "local", "default", "dev", "lo", "table", "main")


@contextmanager
def running() -> Iterator[Internet]:
    """A test internet; it is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="egt-"))
    directory.chmod(0o755)  # the egress process, which is nobody, reads the CA's certificate before it is
    made = Internet(directory, f"egu-{os.getpid()}", f"egi-{os.getpid()}")
    process = None
    try:
        (directory / "files").mkdir()
        (directory / "log").touch()
        _certificates(directory)
        _repository(directory)
        _namespaces(made.uplink, made.namespace)
        words = [sys.executable, "-m", "tests.support.internet", str(directory), f"egt{os.getpid()}"]
        with (directory / "server.log").open("wb") as out:
            process = subprocess.Popen(["ip", "netns", "exec", made.namespace, *words], stdout=out, stderr=out)
        deadline = time.monotonic() + _READY_S
        while not (directory / "ready").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the test internet does not start: {(directory / 'server.log').read_text()}")
            time.sleep(0.05)
        yield made
    finally:
        if process is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        for name in (made.uplink, made.namespace):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        shutil.rmtree(directory)

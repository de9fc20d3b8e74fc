"""A `sandboxd-gateway` process of a test's own, and what its clients need to know."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ctl import Ctl
from tests.support.daemon import Daemon

_READY_S = 60.0
ORG = "tests"


@dataclass
class Gateway:
    """A running gateway in front of one daemon."""

    directory: Path
    daemon: Daemon
    process: subprocess.Popen[bytes]
    env: dict[str, str]
    token: str
    api: int
    ingress: int
    ssh: int
    metrics: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api}"

    @property
    def ca_file(self) -> Path:
        """Whom to trust for exposed ports."""
        return self.directory / "ca.pem"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def figures(self) -> dict[str, float]:
        """Returns what its metrics say, by name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def called(self) -> Counter[str]:
        """Returns how often each method of the protocol was answered with a result."""
        name = re.compile(r'sandboxd_gateway_call_seconds_count\{method="(\w+)",outcome="ok"\}')
        counts = ((name.fullmatch(figure), value) for figure, value in self.figures().items())
        return Counter({match[1]: int(value) for match, value in counts if match is not None})

    def new_token(self, *options: str) -> str:
        """Returns the text of a fresh token."""
        return Ctl(self.env)("token", "create", *options).decode().strip()

    def client_env(self) -> dict[str, str]:
        """Returns the environment of an SDK's program."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SANDBOXD_", "DENO_"))}
        return {
            **env, "DENO_SANDBOX_ENDPOINT": self.url, "DENO_DEPLOY_ENDPOINT": self.url, "DENO_DEPLOY_TOKEN": self.token,
            "NODE_EXTRA_CA_CERTS": str(self.ca_file), "NO_PROXY": "127.0.0.1,localhost",
        }  # fmt: skip


@contextmanager
def running(daemon: Daemon, directory: Path, **settings: str) -> Iterator[Gateway]:
    """Runs a gateway that must stop well."""
    directory.mkdir(exist_ok=True)
    given = {
        "address": "127.0.0.1:0", "ingress_address": "127.0.0.1:0", "ssh_address": "127.0.0.1:0",
        "metrics_address": "127.0.0.1:0",
        "state_dir": str(directory), **settings,
    }  # fmt: skip
    env = daemon.env | {f"SANDBOXD_GATEWAY__{name.upper()}": value for name, value in given.items()}
    env["SANDBOXD_LOG__LEVEL"] = "info"  # which says that it is ready, and where
    ctl = Ctl(env)
    if not (directory / "ca.pem").exists():
        ctl("ca", "create")
    token = ctl("token", "create", "--org", ORG).decode().strip()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "agent.gateway"], env=env, stderr=log, stdout=log)
    try:
        ports = _await_ready(process, directory / "log")
        yield Gateway(
            directory, daemon, process, env, token, ports["api"], ports["ingress"], ports["ssh"], ports["metrics"]
        )
        if process.poll() == -signal.SIGKILL:
            return  # by the test
        if process.poll() is None:
            process.terminate()
        assert process.wait(30) == 0, (directory / "log").read_text()
        said = (directory / "log").read_text()
        assert "Traceback" not in said and "never retrieved" not in said, said[-6000:]  # noqa: PT018
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)


def _await_ready(process: subprocess.Popen[bytes], log: Path) -> dict[str, int]:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if '"event": "ready"' in line:
                ports: dict[str, int] = json.loads(line)
                return ports
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"the gateway is not ready: {log.read_text()}")

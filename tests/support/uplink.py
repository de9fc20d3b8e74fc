"""The network namespace that sandboxes of this test run lead out to: never the machine's own."""

from __future__ import annotations

import atexit
import functools
import os
import subprocess


@functools.cache
def name() -> str:
    """Returns the namespace of this process, made on the first call and removed at its end: a place with no way out."""
    made = f"egt-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", made], check=True)
    atexit.register(subprocess.run, ["ip", "netns", "delete", made], check=False)
    subprocess.run(["ip", "-n", made, "link", "set", "lo", "up"], check=True)
    return made

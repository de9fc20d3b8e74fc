"""How an egress process is started: its arguments, and the identity by which an agent knows whether one is of use."""

from __future__ import annotations

import hashlib

from agent.common.config.egress import EgressSettings
from agent.egress.code_identity import own_identity


def identity_of(settings: EgressSettings) -> str:
    """Return what must be the same for an agent to use a process that runs already: its settings and its code.

    The egress process has to ask for it while it may still read its own code, before it gives up its privileges.

    :raises HostError: a file of the code cannot be read.
    """
    text = repr((arguments_of(settings), settings.uplink))
    return f"{own_identity()}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def arguments_of(settings: EgressSettings) -> list[str]:
    """Return the command-line arguments that state the settings to `python -m agent.egress`."""
    arguments = ["--uid", str(settings.uid), "--gid", str(settings.gid)]
    for resolver in settings.resolvers:
        arguments += ["--resolver", resolver]
    if settings.upstream_ca_file:
        arguments += ["--ca-file", settings.upstream_ca_file]
    return arguments

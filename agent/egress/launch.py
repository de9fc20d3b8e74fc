"""Arguments of the egress process, and its identity, by which an agent decides whether to keep a running one."""

from __future__ import annotations

import hashlib

from agent.common.config.egress import EgressSettings
from agent.egress.code_identity import own_identity


def identity_of(settings: EgressSettings) -> str:
    """Return the identity of code and settings. An agent replaces a running process whose identity differs.

    The egress process must call this before it drops privileges, while it may still read its own code.

    :raises HostError: a source file cannot be read.
    """
    text = repr((arguments_of(settings), settings.uplink))
    return f"{own_identity()}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def arguments_of(settings: EgressSettings) -> list[str]:
    """Return the command-line arguments of `python -m agent.egress` for these settings."""
    arguments = ["--uid", str(settings.uid), "--gid", str(settings.gid)]
    for resolver in settings.resolvers:
        arguments += ["--resolver", resolver]
    if settings.upstream_ca_file:
        arguments += ["--ca-file", settings.upstream_ca_file]
    return arguments

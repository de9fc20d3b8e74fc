"""Word to systemd about how a service is (sd_notify(3))."""

from __future__ import annotations

import os
import socket


def notify(message: str) -> None:
    """Tells systemd, if it started us (sd_notify(3)): "READY=1", "STOPPING=1"."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(message.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)

"""Parse addresses to listen on or connect to, as settings have them."""

from __future__ import annotations

from agent.common.errors import ConfigError


def split_address(address: str, name: str) -> tuple[str, int]:
    """Return (host, port) of "host:port" or "[v6]:port"; ("", 0) for "".

    :param name: of the setting, for the error message.
    :raises ConfigError: the address has another form.
    """
    if not address:
        return "", 0
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{name} is {address!r}; write host:port")
    return host.strip("[]"), int(port)

"""TLS server contexts from certificate files."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from agent.common.errors import ConfigError


def server_context(certificate: str, key: str, alpn: Sequence[str], setting: str) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer.

    :param key: file of the private key, or "" if it is in the certificate's file.
    :param setting: name of the certificate's setting, for the error message.
    :raises ConfigError: the files cannot be read, or do not hold a matching certificate and key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(list(alpn))
    try:
        context.load_cert_chain(certificate, key or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{setting} {certificate} cannot be used: {error}") from error
    return context

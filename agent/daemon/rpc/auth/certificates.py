"""The certificates of mutual TLS, which can be renewed while the server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from agent.common.config.settings import ApiSettings, ConfigError


class Certificates:
    """What `api.tls_*` name, as read last."""

    def __init__(self, api: ApiSettings) -> None:
        self._api = api
        self._newest: grpc.ServerCertificateConfiguration | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Reads the files; each new connection meets what was read last. :raises ConfigError: they cannot be read."""
        first = self._read()
        fetch: Any = self._fetch  # the stubs do not know of None
        return grpc.dynamic_ssl_server_credentials(first, fetch, require_client_authentication=True)

    def reload(self) -> None:
        """Reads the files anew. :raises ConfigError: they cannot be read; then those before stay."""
        self._newest = self._read()

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, in a thread of its own, before each handshake; None: nothing is new."""
        newest, self._newest = self._newest, None
        return newest

    def _read(self) -> grpc.ServerCertificateConfiguration:
        api = self._api
        try:
            key, cert, ca = (Path(path).read_bytes() for path in (api.tls_key, api.tls_cert, api.tls_client_ca))
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}; TLS needs all of api.tls_*") from error
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)

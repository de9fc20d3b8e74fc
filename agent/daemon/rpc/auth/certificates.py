"""Load the certificates for mutual TLS, and reload them while the server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from agent.common.config.daemon import ApiSettings
from agent.common.errors import ConfigError


class Certificates:
    """The files named by the settings `api.tls_*`, as last read."""

    def __init__(self, api: ApiSettings) -> None:
        self._api = api
        self._newest: grpc.ServerCertificateConfiguration | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files and return server credentials; each new connection uses the files as last read.

        :raises ConfigError: a file cannot be read.
        """
        first = self._read()
        fetch: Any = self._fetch  # the stubs do not allow None as its result
        return grpc.dynamic_ssl_server_credentials(first, fetch, require_client_authentication=True)

    def reload(self) -> None:
        """Read the files again, for new connections.

        :raises ConfigError: a file cannot be read; the certificates in use stay.
        """
        self._newest = self._read()

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the certificates if reloaded since the last call, else None; gRPC calls this before each handshake."""
        newest, self._newest = self._newest, None
        return newest

    def _read(self) -> grpc.ServerCertificateConfiguration:
        api = self._api
        try:
            key, cert, ca = (Path(path).read_bytes() for path in (api.tls_key, api.tls_cert, api.tls_client_ca))
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}; TLS needs all of api.tls_*") from error
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)

"""Make programs trust the sandbox's CA, and set the placeholders of secrets in the environment (sys.trust).

The certificate is added to the system's bundle, which most programs read; programs with a bundle of their own are
pointed to it by the environment variables that they document.
"""

from __future__ import annotations

import os

from guest.process_ops import parse_env
from guest.wire import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Call
    from guest.process_ops import ProcessOps

_ANCHOR = "/usr/local/share/ca-certificates/sandboxd.crt"  # update-ca-certificates(8) keeps files in this directory
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_KEYSTORE = "/etc/ssl/certs/sandboxd.jks"
_JVM = "/usr/lib/jvm"
_MAX_PEM = 64 << 10
_READ_BUNDLE = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO", "PIP_CERT", "AWS_CA_BUNDLE", "DENO_CERT", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "HTTPLIB2_CA_CERTS", "BUNDLE_SSL_CA_CERT", "COMPOSER_CAFILE", "NIX_SSL_CERT_FILE",
)  # fmt: skip


class Trust:
    """Handler of sys.trust."""

    def __init__(self, processes: ProcessOps) -> None:
        self._processes = processes
        self._trusted = ""
        self._added: dict[str, str] = {}

    async def trust(self, call: Call) -> dict[str, object]:
        """Serve sys.trust {"certificate": PEM, "env": {...}, "remove_env": [names]}, each optional; return {}."""
        certificate = call.req.get("certificate") or ""
        if not isinstance(certificate, str) or len(certificate) > _MAX_PEM:
            raise CallError("INVALID", "certificate must be PEM text")
        env = parse_env(call.req.get("env") or {})
        if certificate and certificate != self._trusted:
            try:
                self._added = _install(certificate)
            except OSError as error:
                raise CallError("INTERNAL", f"installing the sandbox's certificate: {error}") from error
            self._trusted = certificate
        names = call.req.get("remove_env")
        kept = {
            name: value
            for name, value in self._processes.env.items()
            if not (isinstance(names, list) and name in names)
        }
        # Variables of the create request override those for the certificate.
        self._processes.env = {**self._added, **kept, **env}
        return {}


def _install(certificate: str) -> dict[str, str]:
    """Install the certificate; return the environment variables that point programs to it."""
    text = certificate.strip() + "\n"
    for path in (_ANCHOR, _BUNDLE):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(_ANCHOR, "w") as file:
        file.write(text)
    with open(_BUNDLE, "a+") as file:
        file.write(text)
    env = dict.fromkeys(_READ_BUNDLE, _BUNDLE)
    env["DENO_TLS_CA_STORE"] = "system,mozilla"
    if os.path.isdir(_JVM):
        from guest.keystore import write_keystore

        write_keystore(_BUNDLE, _KEYSTORE)
        env["JAVA_TOOL_OPTIONS"] = f"-Djavax.net.ssl.trustStore={_KEYSTORE} -Djavax.net.ssl.trustStoreType=JKS"
    return env

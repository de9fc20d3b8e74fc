"""Local certificate authorities (CAs), which issue server certificates on demand.

Each sandbox whose TLS connections are inspected has a CA that only its guest trusts; the gateway has one for exposed
ports.
"""

from __future__ import annotations

import datetime
import os
import ssl
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_DAYS = 3650
_LEAF_DAYS = 30
_RENEW_BEFORE_S = 86400.0
_SKEW = datetime.timedelta(hours=24)  # tolerance for guests' clocks, which root in the guest can set
_MAX_CONTEXTS = 256
_CERTIFICATE_FILE, _KEY_FILE = "ca.pem", "ca-key.pem"


class LocalCa:
    """CA with a cache of TLS server contexts, one per name and ALPN list.

    :raises ValueError: the certificate or the key is not valid PEM.
    :raises TypeError: the key is not an elliptic curve key.
    """

    def __init__(self, certificate_pem: str, key_pem: str) -> None:
        self.certificate_pem = certificate_pem
        self.key_pem = key_pem
        self._certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
        key = serialization.load_pem_private_key(key_pem.encode(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("the key of the CA must be an elliptic curve key")
        self._key = key
        # One key for all server certificates: they have one owner, and making a key costs as much as signing.
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._contexts: OrderedDict[tuple[str, tuple[str, ...]], tuple[ssl.SSLContext, float]] = OrderedDict()

    @classmethod
    def generate(cls, owner: str) -> LocalCa:
        """Return a new CA (ECDSA P-256, valid for ten years) with `owner` in its name."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "sandboxd"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"sandboxd CA of {owner}"),
        ])  # fmt: skip
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key.public_key(), _CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate.public_bytes(serialization.Encoding.PEM).decode(), _pem(key).decode())

    @classmethod
    def load(cls, certificate_pem: str, key_pem: str) -> LocalCa:
        """Return the CA of a certificate and key that `generate` made.

        :raises ValueError: the certificate or the key is not valid PEM.
        :raises TypeError: the key is not an elliptic curve key.
        """
        return cls(certificate_pem, key_pem)

    def context(self, name: str, alpn: Sequence[str]) -> ssl.SSLContext:
        """Return a TLS server context with a certificate for `name`, a host name or an IP address."""
        key = (name, tuple(alpn))
        found = self._contexts.get(key)
        if found is not None and found[1] > time.time():
            self._contexts.move_to_end(key)
            return found[0]
        context = self._make_context(name, alpn)
        self._contexts[key] = (context, time.time() + _LEAF_DAYS * 86400 - _RENEW_BEFORE_S)
        while len(self._contexts) > _MAX_CONTEXTS:
            self._contexts.popitem(last=False)
        return context

    def _make_context(self, name: str, alpn: Sequence[str]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.num_tickets = 0  # a resumed session would skip the check of the server name
        if alpn:
            context.set_alpn_protocols(list(alpn))
        chain = self._leaf(name).public_bytes(serialization.Encoding.PEM) + self.certificate_pem.encode()
        # The ssl module loads certificates from files only; a memfd keeps the key off the disk.
        fd = os.memfd_create("leaf", os.MFD_CLOEXEC)
        with os.fdopen(fd, "wb") as file:
            file.write(_pem(self._leaf_key) + chain)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context

    def _leaf(self, name: str) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            _builder(subject, self._certificate.subject, self._leaf_key.public_key(), _LEAF_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(issuer_identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def read_ca(directory: Path) -> LocalCa | None:
    """Return the CA that `write_ca` stored in a directory; None if there is none.

    :raises OSError: a file cannot be read.
    :raises ValueError: a file is not valid PEM.
    :raises TypeError: the key is not an elliptic curve key.
    """
    try:
        certificate, key = ((directory / name).read_text() for name in (_CERTIFICATE_FILE, _KEY_FILE))
    except FileNotFoundError:
        return None
    return LocalCa.load(certificate, key)


def write_ca(directory: Path, ca: LocalCa) -> Path:
    """Store a CA in a directory, its key readable by the directory's owner only; return the certificate's path.

    :raises FileExistsError: the directory has a CA already.
    :raises OSError: a file cannot be written.
    """
    directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    owner = directory.stat()
    for name, text, mode in ((_KEY_FILE, ca.key_pem, 0o600), (_CERTIFICATE_FILE, ca.certificate_pem, 0o644)):
        fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "w") as file:
            os.fchown(fd, owner.st_uid, owner.st_gid)
            file.write(text)
    return directory / _CERTIFICATE_FILE


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

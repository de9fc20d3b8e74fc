"""Java's own store of trusted certificates, in the format that every Java reads: JKS.

The format is that of sun.security.provider.JavaKeyStore (OpenJDK): big-endian; magic, version, count, entries, and a
SHA-1 over password, a fixed text and all of it. The password keeps nothing secret: it is Java's default.
"""

from __future__ import annotations

import binascii
import hashlib
import struct

_MAGIC, _VERSION, _TRUSTED = 0xFEEDFEED, 2, 2
_PASSWORD = "changeit".encode("utf-16-be")
_SALT = b"Mighty Aphrodite"
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def certificates(pem: str) -> list[bytes]:
    """Returns the certificates of a bundle as DER; what is none is left out."""
    found = []
    for part in pem.split(_BEGIN)[1:]:
        body, end, _ = part.partition(_END)
        if end:
            try:
                found.append(binascii.a2b_base64(body))
            except binascii.Error:
                continue
    return found


def keystore(ders: list[bytes]) -> bytes:
    """Returns the store's bytes."""
    data = struct.pack(">III", _MAGIC, _VERSION, len(ders))
    for number, der in enumerate(ders):
        alias = b"certificate%d" % number
        data += struct.pack(">IH", _TRUSTED, len(alias)) + alias + struct.pack(">QH", 0, 5) + b"X.509"
        data += struct.pack(">I", len(der)) + der
    return data + hashlib.sha1(_PASSWORD + _SALT + data).digest()  # noqa: S324  what the format says


def write_keystore(bundle: str, path: str) -> None:
    """Writes the certificates of a bundle as a store. :raises OSError:"""
    with open(bundle) as file:
        ders = certificates(file.read())
    with open(path, "wb") as out:
        out.write(keystore(ders))

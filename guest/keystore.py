"""Write Java's store of trusted certificates (JKS, which all versions of Java can read).

The format is that of sun.security.provider.JavaKeyStore (OpenJDK): big-endian; magic, version, count, entries, and a
SHA-1 digest of the password, a fixed text and the data. The password is Java's default, so it protects nothing.
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
    """Return the DER certificates of a PEM bundle; malformed ones are left out."""
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
    """Return the contents of a JKS file with these DER certificates."""
    data = struct.pack(">III", _MAGIC, _VERSION, len(ders))
    for number, der in enumerate(ders):
        alias = b"certificate%d" % number
        data += struct.pack(">IH", _TRUSTED, len(alias)) + alias + struct.pack(">QH", 0, 5) + b"X.509"
        data += struct.pack(">I", len(der)) + der
    return data + hashlib.sha1(_PASSWORD + _SALT + data).digest()  # noqa: S324  required by the format


def write_keystore(bundle: str, path: str) -> None:
    """Write the certificates of the PEM file `bundle` to the JKS file `path`.

    :raises OSError: a file cannot be read or written.
    """
    with open(bundle) as file:
        ders = certificates(file.read())
    with open(path, "wb") as out:
        out.write(keystore(ders))

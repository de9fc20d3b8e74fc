"""Extract the uncompressed kernel (an ELF file) from a bzImage.

The VMMs load an ELF kernel directly (PVH entry point). So no real-mode code and no decompression run in the guest:
both are slow under emulation. Header offsets: Linux, Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import subprocess

from rootfs.command import require
from rootfs.errors import BuildError

_HEADER_MAGIC = b"HdrS"
_HEADER_MAGIC_AT = 0x202
_SETUP_SECTS_AT = 0x1F1
_PAYLOAD_AT = 0x248  # payload_offset and payload_length, both 32 bits little endian, protocol 2.08 and newer
_SECTOR = 512

_PROGRAMS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4"}


def extract(image: bytes) -> bytes:
    """Return the ELF kernel in a bzImage; an ELF file is returned unchanged.

    :raises BuildError: the image is not a bzImage, is truncated, or has an unknown compression.
    """
    if image.startswith(b"\x7fELF"):
        return image
    payload = _payload(image)
    # Except for gzip, the kernel's build appends the uncompressed size to the payload, after the compressed stream.
    kernel = _unpack(payload)
    if not kernel.startswith(b"\x7fELF"):
        raise BuildError("the kernel's payload is not an ELF file; use a kernel of Debian's linux-image packages")
    return kernel


def _payload(image: bytes) -> bytes:
    if len(image) < _PAYLOAD_AT + 8 or image[_HEADER_MAGIC_AT : _HEADER_MAGIC_AT + 4] != _HEADER_MAGIC:
        raise BuildError("not a Linux bzImage (no HdrS signature)")
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_AT)
    start = (1 + (image[_SETUP_SECTS_AT] or 4)) * _SECTOR + offset
    payload = image[start : start + length]
    if length == 0 or len(payload) != length:
        raise BuildError("the bzImage is truncated: its payload ends after the end of the file")
    return payload


def _unpack(payload: bytes) -> bytes:
    try:
        if payload.startswith(b"\x1f\x8b"):
            return gzip.GzipFile(fileobj=io.BytesIO(payload)).read()
        if payload.startswith(b"\xfd7zXZ\x00"):
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
        if payload.startswith(b"\x5d\x00\x00"):
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload)
    except (OSError, EOFError, lzma.LZMAError) as e:
        raise BuildError(f"the kernel's payload is damaged: {e}") from e
    program = _PROGRAMS.get(payload[:4])
    if program is None:
        raise BuildError(f"unknown compression of the kernel (its payload begins with {payload[:4].hex()})")
    return _unpack_with(program, payload[:-4])


def _unpack_with(program: str, payload: bytes) -> bytes:
    require(program)
    done = subprocess.run([program, "-dc"], input=payload, capture_output=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{program} cannot decompress the kernel: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout

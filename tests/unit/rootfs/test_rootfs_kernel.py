"""The parts of the image builder that read kernels: payload of a bzImage, modules, initramfs archive."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rootfs import initramfs, kernel, modules, vmlinux
from rootfs.cpio import CpioWriter
from rootfs.errors import BuildError

ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"a kernel, so to say " * 500


def bzimage(payload: bytes) -> bytes:
    """A bzImage with two setup sectors and the payload 64 bytes into the protected-mode part."""
    head = bytearray(3 * 512)
    head[0x1F1] = 2
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 64, len(payload))
    return bytes(head) + bytes(64) + payload + b"signature of the image"


def with_size(packed: bytes) -> bytes:
    return packed + struct.pack("<I", len(ELF))


def by_program(name: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        options = ["-l"] if name == "lz4" else ["-19"]
        return with_size(subprocess.run([name, *options, "-c"], input=data, capture_output=True, check=True).stdout)

    return pack


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda data: with_size(lzma.compress(data, lzma.FORMAT_XZ)),
    "lzma": lambda data: with_size(lzma.compress(data, lzma.FORMAT_ALONE)),
    "zstd": by_program("zstd"),
    "lz4": by_program("lz4"),
}


@pytest.mark.parametrize("kind", PACKERS)
def test_kernel_comes_out_of_every_kind_of_bzimage(kind: str) -> None:
    if kind in {"zstd", "lz4"} and shutil.which(kind) is None:
        pytest.skip(f"{kind} is not installed")
    assert vmlinux.extract(bzimage(PACKERS[kind](ELF))) == ELF


def test_an_elf_kernel_stays_as_it_is() -> None:
    assert vmlinux.extract(ELF) == ELF


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"", "not a Linux bzImage"),
        (bytes(4096), "not a Linux bzImage"),
        (bzimage(gzip.compress(ELF))[:1650], "truncated"),
        (bzimage(b""), "truncated"),
        (bzimage(b"\x1f\x8b" + bytes(200)), "damaged"),
        (bzimage(b"????" + bytes(200)), "unknown compression"),
        (bzimage(gzip.compress(b"no kernel")), "not an ELF file"),
    ],
)
def test_bad_kernels_are_refused(image: bytes, complaint: str) -> None:
    with pytest.raises(BuildError, match=complaint):
        vmlinux.extract(image)


def module(*modinfo: str) -> bytes:
    """An ELF64 file with the two sections that matter: names and .modinfo."""
    names = b"\0.modinfo\0.shstrtab\0"
    info = b"".join(line.encode() + b"\0" for line in modinfo)
    table = 64 + len(names) + len(info)
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", head, 0x28, table)
    struct.pack_into("<HHH", head, 0x3A, 64, 3, 2)
    sections = bytes(64)
    for name, at, size in ((1, 64 + len(names), len(info)), (10, 64, len(names))):
        sections += struct.pack("<IIQQQQ", name, 1, 0, 0, at, size).ljust(64, b"\0")
    return bytes(head) + names + info + sections


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The modules of a kernel: net needs ring (packed) and failover, fs prefers crc, and virtio is built in."""
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\n")
    folder = tmp_path / "kernel"
    folder.mkdir()
    (folder / "my-net.ko").write_bytes(module("license=GPL", "depends=virtio,virtio-ring,failover"))
    (folder / "virtio_ring.ko.xz").write_bytes(lzma.compress(module("depends=virtio")))
    (folder / "failover.ko").write_bytes(module("depends="))
    (folder / "fs.ko").write_bytes(module("depends=", "softdep=pre: crc not-there post: late"))
    (folder / "crc.ko").write_bytes(module())
    (folder / "late.ko").write_bytes(module())
    (folder / "egg.ko").write_bytes(module("depends=hen"))
    (folder / "hen.ko").write_bytes(module("depends=egg"))
    (folder / "orphan.ko").write_bytes(module("depends=lost"))
    return tmp_path


def test_modules_load_after_those_they_need(tree: Path) -> None:
    found = modules.ModuleTree(tree)
    assert found.load_order(["my_net", "fs"]) == ["virtio_ring", "failover", "my_net", "crc", "fs"]
    assert found.load_order(["my-net", "virtio"], loaded=["failover"]) == ["virtio_ring", "my_net"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("absent", "no module absent"), ("orphan", r"no module lost \(needed by orphan\)"), ("egg", "egg -> hen -> egg")],
)
def test_modules_that_cannot_be_loaded_are_named(tree: Path, name: str, complaint: str) -> None:
    with pytest.raises(BuildError, match=complaint):
        modules.ModuleTree(tree).load_order([name])


def test_a_folder_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"modules\.builtin"):
        modules.ModuleTree(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"text", module("depends=x")[:100], module("depends=x")[:-80]])
def test_damaged_modules_are_refused(damage: bytes) -> None:
    with pytest.raises(BuildError):
        modules.needs(damage)


def test_signatures_are_cut_off() -> None:
    plain = module("depends=x")
    signed = plain + b"S" * 50 + struct.pack(">8xI", 50) + b"~Module signature appended~\n"
    assert modules.strip_signature(signed) == plain
    assert modules.strip_signature(plain) == plain


def test_initramfs_loads_what_it_holds(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "BASE_MODULES", ("my_net",))
    monkeypatch.setattr(initramfs, "VSOCK_MODULES", ("failover", "fs"))
    archive = initramfs.build(b"program", modules.ModuleTree(tree))
    assert archive == initramfs.build(b"program", modules.ModuleTree(tree))
    for name in ("virtio_ring", "failover", "my_net", "crc", "fs"):
        assert f"modules/{name}.ko\0".encode() in archive
    assert b'modules="virtio_ring failover my_net"' in archive
    assert b'modules="$modules crc fs"' in archive
    assert b"@" not in archive[archive.index(b"#!/bin/busybox") : archive.index(b'fail "cannot start')]


def test_cpio_layout() -> None:
    """Offsets from the kernel's buffer-format.rst; that the kernel reads it is shown by every VM test."""
    out = CpioWriter()
    out.file("x", b"hello", 0o600)
    data = out.finish()
    assert data[:14] == b"07070100000001"
    assert int(data[14:22], 16) == 0o100600
    assert int(data[54:62], 16) == 5  # file size
    assert int(data[94:102], 16) == 2  # name size with its zero byte
    assert data[110:112] == b"x\0"
    assert data[112:117] == b"hello"
    assert data[120:126] == b"070701"
    assert len(data) % 512 == 0


def test_build_time_is_that_of_the_package(tmp_path: Path) -> None:
    deb = tmp_path / "x.deb"
    deb.write_bytes(b"!<arch>\n" + b"debian-binary".ljust(16) + b"1763658416  " + b"0     0     100644  4         `\n")
    assert kernel.build_time(deb) == 1763658416
    deb.write_bytes(b"not an archive")
    with pytest.raises(BuildError, match="not a Debian package"):
        kernel.build_time(deb)

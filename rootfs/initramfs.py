"""Build the initramfs: busybox, a script, and the kernel modules that the script loads."""

from __future__ import annotations

from pathlib import Path

from rootfs.cpio import CpioWriter
from rootfs.modules import ModuleTree

# Needed by every boot: disks, link, network card, entropy source, and the two file systems of the root.
BASE_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "erofs", "overlay", "virtio_net", "virtio_rng")
# Needed only if the link is AF_VSOCK.
VSOCK_MODULES = ("vmw_vsock_virtio_transport",)

_SCRIPT = Path(__file__).with_name("init.sh")
_APPLETS = ("insmod", "mount", "sleep", "switch_root", "umount")


def build(busybox: bytes, modules: ModuleTree) -> bytes:
    """Return the cpio archive. It is not compressed: decompressing a few MiB in an emulated guest is slow.

    :raises BuildError: the kernel lacks a module.
    """
    base = modules.load_order(BASE_MODULES)
    vsock = modules.load_order(VSOCK_MODULES, loaded=base)
    out = CpioWriter()
    for folder in ("bin", "dev", "modules", "newroot", "proc", "sys"):
        out.folder(folder)
    out.character_device("dev/console", 5, 1)
    out.file("bin/busybox", busybox, 0o755)
    for applet in _APPLETS:
        out.symlink(f"bin/{applet}", "busybox")
    out.file("init", _script(base, vsock), 0o755)
    for name in base + vsock:
        out.file(f"modules/{name}.ko", modules.read(name))
    return out.finish()


def _script(base: list[str], vsock: list[str]) -> bytes:
    text = _SCRIPT.read_text()
    return text.replace("@BASE_MODULES@", " ".join(base)).replace("@VSOCK_MODULES@", " ".join(vsock)).encode()

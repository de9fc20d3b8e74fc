"""QEMU's command line for a `VmSpec`: pure, so that every argument is tested without QEMU.

The machine is q35: microvm restores a little faster, but its cold boots hung now and then. Devices that a Linux guest
on virtio does not need are left out, since each one costs boot time and attack surface.
"""

from __future__ import annotations

from agent.common.errors import InvalidSpec
from agent.daemon.vmm.driver import LinkKind, VmSpec

GUEST_CID = 3
# Part of the snapshot key: increase it whenever machine or devices change.
REVISION = 2
SERIAL_PORT_NAME = "org.sandboxd.link"
# Five-level page tables make every TLB miss of the emulator a fifth longer, and no guest here has 128 TiB.
_TCG_CPU = "max,la57=off,erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off"
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def value(text: object) -> str:
    """Escape `text` for a comma-separated option: commas are doubled.

    :raises InvalidSpec: `text` has control characters.
    """
    string = str(text)
    if any(ord(letter) < 32 for letter in string):
        raise InvalidSpec(f"{string!r} cannot be given to QEMU: it has control characters")
    return string.replace(",", ",,")


def machine_args(spec: VmSpec, accelerator: str) -> list[str]:
    """Return the arguments for machine, CPU and memory."""
    # With an HPET, an idle guest's VMM wakes 250 times a second: 2 % of a CPU instead of 0.5 % when emulated.
    cpu = "host" if accelerator == "kvm" else _TCG_CPU
    incoming = [] if spec.restore_from is None else ["-incoming", "defer"]
    return [
        "-nodefaults", "-no-user-config", "-no-reboot", "-nographic", "-S",
        "-name", f"{spec.id},process={spec.id}",
        "-sandbox", _SANDBOX,
        "-M", "q35,memory-backend=mem0,hpet=off,usb=off,vmport=off,smbus=off,sata=off,graphics=off",
        "-accel", accelerator,
        "-cpu", cpu,
        "-smp", str(spec.vcpu_count),
        "-m", f"size={spec.memory_bytes // 1024}k",
        "-object", _memory(spec),
        *incoming,
    ]  # fmt: skip


def _memory(spec: VmSpec) -> str:
    if spec.memory_file is None:
        # vhost-user backends map the guest's memory: it must be a shared memfd for them.
        share = "on" if spec.link is LinkKind.VSOCK else "off"
        return f"memory-backend-memfd,id=mem0,size={spec.memory_bytes},share={share}"
    # rom=off: the file is opened read-only, yet the guest may write, into pages of its own.
    access = "share=off,readonly=on,rom=off" if spec.memory_file.private else "share=on"
    return f"memory-backend-file,id=mem0,size={spec.memory_bytes},mem-path={value(spec.memory_file.path)},{access}"


def device_args(
    spec: VmSpec, link_fd: int | None, console_fd: int, qmp_fd: int, vsock: str | None, tap_fd: int | None
) -> list[str]:
    """Return the arguments for kernel, disks, network card and sockets.

    :param link_fd: listening socket of the serial link; None for a vsock link. `console_fd` and `qmp_fd` likewise.
    :param vsock: arguments of the vsock device, from `vsock_device`; None for a serial link.
    :param tap_fd: open TAP of the network card.
    """
    args = []
    if spec.restore_from is None:  # a restored VM has its kernel in its RAM
        args += ["-kernel", str(spec.kernel), "-initrd", str(spec.initramfs), "-append", spec.cmdline]
    for disk in spec.disks:
        node = value(disk.serial)
        access = f"read-only={'on' if disk.read_only else 'off'}"
        mode = access if disk.read_only else f"{access},discard=unmap,detect-zeroes=unmap"
        cache = "" if disk.read_only or disk.durable else ",cache.no-flush=on"  # the disk is deleted with its sandbox
        args += ["-blockdev", f"driver=file,node-name=f-{node},filename={value(disk.path)},{access}"]
        args += ["-blockdev", f"driver=raw,node-name=d-{node},file=f-{node},{mode}{cache}"]
        args += ["-device", f"virtio-blk-pci,drive=d-{node},serial={node}"]
    if spec.nic is not None:
        args += ["-netdev", f"tap,id=net0,fd={tap_fd},vhost=off"]
        args += ["-device", f"virtio-net-pci,netdev=net0,mac={value(spec.nic.mac)},romfile="]
    args += ["-device", "virtio-rng-pci"]
    args += ["-chardev", f"socket,id=console,fd={console_fd},server=on,wait=off", "-serial", "chardev:console"]
    args += ["-chardev", f"socket,id=qmp,fd={qmp_fd},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
    if link_fd is not None:
        args += ["-device", "virtio-serial-pci"]
        args += ["-chardev", f"socket,id=link,fd={link_fd},server=on,wait=off"]
        args += ["-device", f"virtserialport,chardev=link,name={SERIAL_PORT_NAME}"]
    if vsock is not None:
        args += vsock.split()
    return args


def vsock_device(backend_socket: str | None, cid: int = GUEST_CID) -> str:
    """Return the arguments for a vsock device.

    :param backend_socket: socket of a vhost-user backend; None: the kernel's vhost-vsock.
    """
    if backend_socket is None:
        return f"-device vhost-vsock-pci,id=vsock0,guest-cid={cid}"
    return f"-chardev socket,id=vsock,path={value(backend_socket)} -device vhost-user-vsock-pci,id=vsock0,chardev=vsock"

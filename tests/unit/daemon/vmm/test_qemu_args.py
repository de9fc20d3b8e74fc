"""Every word of QEMU's command line."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest

from agent.common.errors import InvalidSpec
from agent.daemon.vmm.driver import DiskSpec, LinkKind, NicSpec, VmSpec
from agent.daemon.vmm.qemu import qemu_args
from guest.wire import SERIAL_NAME

SPEC = VmSpec(
    id="sbx-0",
    vcpu_count=3,
    memory_bytes=(512 << 20) + 1023,
    kernel=Path("/k,ernel"),
    initramfs=Path("/init"),
    cmdline="console=ttyS0 a=b,c",
    disks=(DiskSpec(Path("/root,1.img"), "root", True), DiskSpec(Path("/data.img"), "da,ta", False)),
    nic=NicSpec("tap0", "02:00:00:00:00:01"),
    netns="sbx-0",
    run_dir=Path("/run/x"),
    link=LinkKind.SERIAL,
)


def options(args: list[str], name: str) -> list[str]:
    return [value for option, value in pairwise(args) if option == name]


def devices(spec: VmSpec, link_fd: int | None = 5, vsock: str | None = None) -> list[str]:
    return qemu_args.device_args(spec, link_fd, 6, 7, vsock, 8)


def test_machine() -> None:
    args = qemu_args.machine_args(SPEC, "kvm")
    assert {"-nodefaults", "-no-user-config", "-no-reboot", "-nographic", "-S"} <= set(args)
    assert options(args, "-accel") == ["kvm"]
    assert options(args, "-cpu") == ["host"]
    assert options(args, "-smp") == ["3"]
    assert options(args, "-m") == [f"size={512 << 10}k"]
    assert options(args, "-name") == ["sbx-0,process=sbx-0"]
    assert options(args, "-object") == [f"memory-backend-memfd,id=mem0,size={SPEC.memory_bytes},share=off"]
    assert options(args, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]


def test_emulation_has_its_own_cpu() -> None:
    (cpu,) = options(qemu_args.machine_args(SPEC, "tcg"), "-cpu")
    model, *features = cpu.split(",")
    assert (model, "la57=off" in features) == ("max", True)
    assert all(feature.endswith("=off") for feature in features)


def test_memory_is_shared_with_a_vsock_backend_only() -> None:
    spec = dataclasses.replace(SPEC, link=LinkKind.VSOCK)
    assert options(qemu_args.machine_args(spec, "tcg"), "-object")[0].endswith(",share=on")


def test_kernel_is_given_word_for_word() -> None:
    args = devices(SPEC)
    assert args[:6] == ["-kernel", "/k,ernel", "-initrd", "/init", "-append", "console=ttyS0 a=b,c"]


def test_disks_keep_their_rights_and_commas() -> None:
    assert options(devices(SPEC), "-blockdev") == [
        "driver=file,node-name=f-root,filename=/root,,1.img,read-only=on",
        "driver=raw,node-name=d-root,file=f-root,read-only=on",
        "driver=file,node-name=f-da,,ta,filename=/data.img,read-only=off",
        "driver=raw,node-name=d-da,,ta,file=f-da,,ta,read-only=off,discard=unmap,detect-zeroes=unmap,cache.no-flush=on",
    ]
    assert [d for d in options(devices(SPEC), "-device") if "blk" in d] == [
        "virtio-blk-pci,drive=d-root,serial=root", "virtio-blk-pci,drive=d-da,,ta,serial=da,,ta",
    ]  # fmt: skip


def test_a_nic_is_the_tap_that_exists_or_none() -> None:
    args = devices(SPEC)
    assert options(args, "-netdev") == ["tap,id=net0,fd=8,vhost=off"]
    assert "virtio-net-pci,netdev=net0,mac=02:00:00:00:00:01,romfile=" in options(args, "-device")
    assert not any("net" in word for word in devices(dataclasses.replace(SPEC, nic=None)))


def test_sockets_are_descriptors() -> None:
    args = devices(SPEC)
    assert options(args, "-chardev") == [
        f"socket,id={name},fd={fd},server=on,wait=off" for name, fd in (("console", 6), ("qmp", 7), ("link", 5))
    ]
    assert options(args, "-serial") == ["chardev:console"]
    assert options(args, "-mon") == ["chardev=qmp,mode=control"]
    assert f"virtserialport,chardev=link,name={SERIAL_NAME}" in options(args, "-device")


def test_a_vsock_link_has_no_serial_port() -> None:
    backend = devices(SPEC, None, qemu_args.vsock_device("/run/vhost.sock"))
    assert backend[-4:] == [
        "-chardev", "socket,id=vsock,path=/run/vhost.sock", "-device", "vhost-user-vsock-pci,id=vsock0,chardev=vsock",
    ]  # fmt: skip
    kernel = devices(SPEC, None, qemu_args.vsock_device(None, 9))
    assert kernel[-2:] == ["-device", "vhost-vsock-pci,id=vsock0,guest-cid=9"]
    assert not any("virtserialport" in word for word in backend + kernel)


@pytest.mark.parametrize("text", ["a\nb", "\0", "a\x1b[0m", "\t"])
def test_control_characters_are_refused(text: str) -> None:
    with pytest.raises(InvalidSpec, match="control characters"):
        qemu_args.value(text)
    with pytest.raises(InvalidSpec):
        devices(dataclasses.replace(SPEC, disks=(DiskSpec(Path(f"/x{text}"), "root", True),)))


def test_a_comma_cannot_add_an_option() -> None:
    assert qemu_args.value("a,read-only=off") == "a,,read-only=off"
    assert qemu_args.value(Path("/a,,b")) == "/a,,,,b"

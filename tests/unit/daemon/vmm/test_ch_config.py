"""Cloud Hypervisor's configuration, word by word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from agent.common.errors import InvalidSpec, VmmError
from agent.daemon.vmm.cloud_hypervisor import config
from agent.daemon.vmm.cloud_hypervisor.cloud_hypervisor import trial
from agent.daemon.vmm.driver import DiskSpec, LinkKind, MemoryFile, NicSpec, RateLimits, VmSpec

GIB = 1 << 30


def spec(**changes: Any) -> VmSpec:
    base = VmSpec(
        id="sbx-1",
        vcpu_count=2,
        memory_bytes=GIB,
        kernel=Path("/img/vmlinux"),
        initramfs=Path("/img/initramfs"),
        cmdline="console=ttyS0 panic=-1",
        disks=(DiskSpec(Path("/img/root"), "root", read_only=True), DiskSpec(Path("/sb/data"), "data", False)),
        nic=NicSpec("tap0", "02:00:00:00:00:01"),
        netns="sbx-1",
        run_dir=Path("/run/sb/1"),
        link=LinkKind.VSOCK,
    )
    return dataclasses.replace(base, **changes)


TEMPLATE = {"memory_file": MemoryFile(Path("/tpl/mem0"), private=False)}
CLONE = {"memory_file": MemoryFile(Path("/tpl/mem0"), private=True), "restore_from": Path("/tpl/snap")}


def test_what_is_booted() -> None:
    assert config.vm_config(spec(), landlock=False) == {
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2, "nested": False},
        "memory": {"size": GIB},
        "payload": {"kernel": "/img/vmlinux", "initramfs": "/img/initramfs", "cmdline": "console=ttyS0 panic=-1"},
        "disks": [
            {"id": "disk-root", "path": "/img/root", "serial": "root", "readonly": True, "image_type": "Raw"},
            {"id": "disk-data", "path": "/sb/data", "serial": "data", "readonly": False, "image_type": "Raw"},
        ],
        "rng": {"src": "/dev/urandom"},
        "vsock": {"id": "vsock0", "cid": 3, "socket": "/run/sb/1/vmm/vsock.sock"},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "landlock_enable": False,
        "balloon": {"id": "balloon0", "size": 0, "deflate_on_oom": True, "free_page_reporting": True},
    }


def test_the_ram_of_a_template_is_shared() -> None:
    built = config.vm_config(spec(**TEMPLATE), landlock=False)
    zone = {"id": "mem0", "size": GIB, "file": "/tpl/mem0", "shared": True}
    assert built["memory"] == {"size": 0, "thp": False, "zones": [zone]}


def test_a_clone_differs_from_its_template_in_paths_sharing_and_rates_alone() -> None:
    limits = RateLimits(disk_bytes=1000, disk_operations=10, net_bytes=500)
    template = config.restore_config(spec(**TEMPLATE), landlock=False)
    clone = config.restore_config(spec(**CLONE, run_dir=Path("/run/sb/2"), limits=limits), landlock=False)
    zone = {"id": "mem0", "size": GIB, "file": "/tpl/mem0", "shared": False}
    assert clone.pop("memory") == {"size": 0, "thp": False, "zones": [zone]}
    assert clone.pop("vsock") == {"id": "vsock0", "cid": 3, "socket": "/run/sb/2/vmm/vsock.sock"}
    for entry in clone["disks"]:
        assert entry.pop("rate_limiter_config") == {
            "bandwidth": {"size": 1000, "refill_time": 1000},
            "ops": {"size": 10, "refill_time": 1000},
        }
    assert clone["net"] == [
        {
            "id": "net0", "mac": "02:00:00:00:00:01", "num_queues": 2, "fds": [-1],
            "rate_limiter_config": {"bandwidth": {"size": 500, "refill_time": 1000}},
        }
    ]  # fmt: skip
    clone["net"][0].pop("rate_limiter_config")
    for name in ("memory", "vsock"):
        template.pop(name)
    assert clone == template


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (RateLimits(), None),
        (RateLimits(disk_bytes=5), {"bandwidth": {"size": 5, "refill_time": 1000}}),
        (RateLimits(disk_operations=7), {"ops": {"size": 7, "refill_time": 1000}}),
        (RateLimits(net_bytes=9), None),
    ],
)
def test_limits_of_a_disk(limits: RateLimits, expected: object) -> None:
    built = config.disk(DiskSpec(Path("/d"), "d", False), limits)
    assert built.get("rate_limiter_config") == expected


def test_the_card_is_without_a_name_a_host_mac_and_an_mtu() -> None:
    built = config.net(NicSpec("tap0", "02:00:00:00:00:01"), RateLimits(disk_bytes=1))
    assert built == {"id": "net0", "mac": "02:00:00:00:00:01", "num_queues": 2}
    assert "net" not in config.vm_config(spec(), landlock=False)
    assert "net" not in config.restore_config(spec(nic=None, **CLONE), landlock=False)


@pytest.mark.parametrize("changes", [TEMPLATE, CLONE])
def test_no_balloon_where_ram_is_a_file(changes: dict[str, Any]) -> None:
    assert "balloon" not in config.vm_config(spec(**changes), landlock=False)


def test_landlock_lets_a_template_write_its_snapshot() -> None:
    plain = config.vm_config(spec(), landlock=True)
    assert (plain["landlock_enable"], plain["landlock_rules"]) == (True, [])
    template = config.vm_config(spec(**TEMPLATE), landlock=True)
    assert template["landlock_rules"] == [{"path": "/run/sb/1/snapshot", "access": "rw"}]
    clone = config.restore_config(spec(**CLONE, save_root=Path("/sb/1")), landlock=True)
    assert clone["landlock_rules"] == [{"path": "/sb/1", "access": "rw"}]


def test_what_was_saved_is_restored_with_the_memory_that_it_had(tmp_path: Path) -> None:
    saved = spec(restore_from=tmp_path, save_root=Path("/sb/1"))
    config.check(saved)
    for template, zone in ((spec(), False), (spec(**CLONE), True)):
        (tmp_path / "config.json").write_text(json.dumps(config.vm_config(template, landlock=False)))
        assert config.has_zone(tmp_path) is zone
    cold = config.restore_config(saved, landlock=True, zone=False)
    assert cold["memory"] == {"size": GIB}
    assert "balloon" in cold
    clone = config.restore_config(saved, landlock=True, zone=True)
    assert clone["memory"] == {"size": 0, "thp": False, "zones": [{"id": "mem0", "size": GIB, "shared": False}]}
    assert "balloon" not in clone
    assert {"path": str(tmp_path), "access": "r"} in clone["landlock_rules"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(VmmError, match="cannot be read"):
        config.has_zone(tmp_path)


def test_what_cannot_be() -> None:
    for good in (spec(), spec(**TEMPLATE), spec(**CLONE)):
        config.check(good)
    with pytest.raises(VmmError, match=r"vmm\.link") as caught:
        config.check(spec(link=LinkKind.SERIAL))
    assert caught.value.reason == "LINK_UNSUPPORTED"
    for bad in (spec(**(CLONE | {"restore_from": None})), spec(**TEMPLATE, restore_from=Path("/s"))):
        with pytest.raises(InvalidSpec, match="private memory file"):
            config.check(bad)


def test_the_trial() -> None:
    assert trial("/bin/ch", Path("/k"), Path("/i"), "a b") == [
        "/bin/ch", "--kernel", "/k", "--initramfs", "/i", "--cmdline", "a b", "--cpus", "boot=1,nested=off",
        "--memory", "size=256M", "--serial", "tty", "--console", "off",
    ]  # fmt: skip

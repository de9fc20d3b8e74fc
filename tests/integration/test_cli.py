"""`sandboxctl` as its users run it, against a real daemon and a real sandbox."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.client import MIB
from tests.support.ctl import TIMEOUT_S, Ctl

pytestmark = pytest.mark.vm


# -- sandboxes and the node --------------------------------------------------------------------------------------------


def test_ls_and_inspect(ctl: Ctl, ctl_box: str) -> None:
    assert any(line.startswith(f"{ctl_box}  running") for line in ctl("ls").decode().splitlines())
    (listed,) = ctl.objects("ls", "--label", "test=cli", "--state", "running")
    (inspected,) = ctl.objects("inspect", ctl_box)
    assert listed == inspected
    assert (listed["id"], listed["memory_bytes"], listed["vmm"].partition(" ")[0]) == (ctl_box, 256 * MIB, "qemu")
    assert "guest.configure" in ctl("inspect", ctl_box).decode()
    ctl("inspect", "sbx-0000000000000000", status=1)
    assert ctl.err.endswith("(SANDBOX_NOT_FOUND)\n")


def test_create_use_and_rm_with_json(ctl: Ctl) -> None:
    (made,) = ctl.objects("create", "--memory", "192MiB", "--lifetime", "10m")
    assert (made["state"], made["memory_bytes"]) == ("running", 192 * MIB)
    assert made["expire_time"] is not None
    assert ctl.objects("update", made["id"], "--no-expire")[0]["expire_time"] is None
    assert ctl.objects("rm", made["id"]) == [{"id": made["id"], "deleted": True}]
    ctl("rm", made["id"], status=1)


def test_node_images_and_version(ctl: Ctl, ctl_box: str) -> None:
    (node,) = ctl.objects("node")
    assert (node["state"], node["vmm"]) == ("ready", "qemu")
    assert node["sandboxes"]["allocated"] >= 1
    assert "ALLOCATABLE" in ctl("node").decode()
    assert "minimal" in [image["name"] for image in ctl.objects("image", "ls")]
    (image,) = ctl.objects("image", "inspect", "minimal")
    assert any(package.startswith("bash=") for package in image["packages"])
    ctl("image", "rm", "minimal", status=1)
    assert "IMAGE_IN_USE" in ctl.err
    (version,) = ctl.objects("version")
    assert version["sandboxctl"] == version["sandboxd"]


def test_doctor_finds_all_that_these_tests_need(ctl: Ctl) -> None:
    (report,) = ctl.objects("doctor", "--probe")
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] is True
    assert {checks[name]["status"] for name in ("root", "tun", "qemu", "mkfs.ext4", "image minimal", "daemon")} == {
        "ok"
    }
    (node,) = ctl.objects("node")
    used = f"{node['vmm']} {node['vmm_version']} ({node['accelerator']}): "
    assert checks["vmm"]["detail"] == used + node["vmm_reason"]


def test_top_once(ctl: Ctl, ctl_box: str) -> None:
    busy = ctl.start("exec", ctl_box, "sh", "-c", "while :; do :; done", stdin=subprocess.DEVNULL)
    try:
        (seen,) = ctl.objects("top", "--once", "--interval", "1s", ctl_box)
        assert seen["id"] == ctl_box
        assert 0 < seen["memory_available_bytes"] < seen["memory_total_bytes"] <= 256 * MIB * 1.05
        assert seen["vmm_pss_bytes"] > 32 * MIB
        assert 5 < seen["cpu_percent"] < 400
    finally:
        busy.send_signal(signal.SIGINT)
        assert busy.wait(TIMEOUT_S) == 130
    assert re.search(rf"^{ctl_box} +\d+ ", ctl("top", "--once", "--interval", "200ms").decode(), re.MULTILINE)


def test_logs(ctl: Ctl, ctl_box: str) -> None:
    whole = ctl("logs", ctl_box)
    assert b"sandboxd-init" in whole
    assert ctl("logs", "--tail", "20", ctl_box) == whole[-20:]
    pieces = ctl.objects("logs", ctl_box)
    assert all(set(piece) == {"data"} for piece in pieces)


# -- exec --------------------------------------------------------------------------------------------------------------


def test_exec_passes_streams_environment_and_status(ctl: Ctl, ctl_box: str) -> None:
    script = 'echo "$GREETING $MORE $PWD $(id -un)"; echo oops >&2; exit 7'
    out = ctl("exec", "-u", "root", "-w", "/etc", "-e", "MORE=more", ctl_box, "--", "sh", "-c", script, status=7)
    assert (out, ctl.err) == (b"hello more /etc root\n", "oops\n")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["no-such-program"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_exit_codes(ctl: Ctl, ctl_box: str, words: list[str], status: int) -> None:
    assert ctl("exec", ctl_box, *words, status=status) == b""


def test_stdin_is_binary_safe_and_ends(ctl: Ctl, ctl_box: str) -> None:
    data = os.urandom(3 * MIB + 1)
    assert ctl("exec", "-i", ctl_box, "cat", stdin=data) == data
    assert ctl("exec", ctl_box, "cat", stdin=b"not passed on") == b""


def test_output_is_not_hoarded_for_a_slow_reader(ctl: Ctl, ctl_box: str) -> None:
    reading = ctl.start("exec", ctl_box, "sh", "-c", "head -c 67108864 /dev/zero", stdout=subprocess.PIPE)
    assert reading.stdout is not None
    with reading:
        assert len(os.read(reading.stdout.fileno(), 1)) == 1
        before = _rss(reading.pid)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            assert _rss(reading.pid) < before + 48 * MIB
            time.sleep(0.1)
        reading.stdout.close()
        assert reading.wait(TIMEOUT_S) == 141


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_interrupt_goes_to_the_program(ctl: Ctl, ctl_box: str) -> None:
    script = 'trap "echo caught; exit 5" INT; echo up; while :; do sleep 0.1; done'
    running = ctl.start("exec", ctl_box, "bash", "-c", script, stdout=subprocess.PIPE)
    assert running.stdout is not None
    with running:
        assert running.stdout.readline() == b"up\n"
        running.send_signal(signal.SIGINT)
        assert running.stdout.readline() == b"caught\n"
        assert running.wait(TIMEOUT_S) == 5


def test_detached_processes(ctl: Ctl, ctl_box: str) -> None:
    number = ctl("exec", "-d", ctl_box, "--", "sh", "-c", "echo kept; sleep 1000").decode().strip()
    (process,) = [one for one in ctl.objects("ps", ctl_box) if one["process_id"] == int(number)]
    assert process["exit"] is None
    assert re.search(rf"^{number} .* running ", ctl("ps", ctl_box).decode(), re.MULTILINE)
    assert any(one["command"] == "sleep 1000" for one in ctl.objects("ps", "--all", ctl_box))
    attached = ctl.start("attach", ctl_box, number, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert attached.stdout is not None
    with attached:
        assert attached.stdout.readline() == b"kept\n"
        ctl("kill", ctl_box, number, "-s", "KILL")
        assert attached.wait(TIMEOUT_S) == 137
    ctl("wait", ctl_box, number, status=137)
    ctl("kill", ctl_box, number, status=1)
    assert "PROCESS_EXITED" in ctl.err

"""`doctor` without a daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.cli.commands.host_checks import Status, host_checks
from agent.common.config.daemon import VmmSettings
from agent.common.config.settings import Settings
from tests.unit.cli.command import ctl


def _doctor(tmp_path: Path, *words: str, **env: str) -> tuple[int, dict[str, dict[str, Any]], dict[str, Any]]:
    places = {
        "SANDBOXD_PATHS__RUN_DIR": str(tmp_path / "run"),
        "SANDBOXD_PATHS__STATE_DIR": str(tmp_path / "state"),
        "SANDBOXD_NODE__RESERVED_DISK_BYTES": "0",
    }
    done = ctl("--json", "doctor", *words, **{**places, **env})
    report = json.loads(done.stdout)
    return done.returncode, {check["name"]: check for check in report["checks"]}, report


def test_doctor_without_a_daemon_says_what_is_missing(tmp_path: Path) -> None:
    status, checks, report = _doctor(tmp_path, SANDBOXD_IMAGES__IMAGES_DIR=str(tmp_path), SANDBOXD_VMM__BINARY="/none")
    assert status == 1
    assert report["ok"] is False
    assert checks["daemon"]["status"] == "warn"
    assert checks["qemu"]["status"] == "missing"
    assert checks["image minimal"]["advice"] == "sandboxctl image build minimal"
    assert checks["run directory"]["status"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports_a_disk_that_is_too_full(tmp_path: Path) -> None:
    _, checks, _ = _doctor(tmp_path, SANDBOXD_NODE__RESERVED_DISK_BYTES="1000TiB")
    assert checks["free disk"]["status"] == "missing"


def test_doctor_for_people_has_a_line_for_each_check_and_no_colours(tmp_path: Path) -> None:
    done = ctl("doctor", SANDBOXD_PATHS__RUN_DIR=str(tmp_path), SANDBOXD_IMAGES__IMAGES_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert any(line.startswith("missing image minimal") for line in lines)
    assert {line.split()[0] for line in lines} <= {"ok", "warn", "missing", "->"}


def test_what_the_settings_ask_for_decides_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.cli.commands import host_checks as checks_module

    monkeypatch.setattr(checks_module, "_open_error", lambda device: "No such file or directory")
    monkeypatch.setattr("agent.daemon.vmm.qemu.vsock_backend.shutil.which", lambda *args, **kwargs: None)

    def status(name: str, **vmm: Any) -> Status:
        (found,) = [check for check in host_checks(Settings(vmm=VmmSettings(**vmm))) if check.name == name]
        return found.status

    assert status("kvm") is Status.WARN
    assert status("kvm", accelerator="tcg") is Status.OK
    assert status("kvm", accelerator="kvm") is Status.MISSING
    assert status("vhost-device-vsock") is Status.WARN
    assert status("vhost-device-vsock", link="vsock") is Status.MISSING

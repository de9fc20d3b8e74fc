"""The image builder without root and network: recipe digests, mirror discovery, the store, the root tree."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from rootfs import apt, build, command, npm, packages, store, tree
from rootfs.__main__ import main
from rootfs.errors import BuildError
from rootfs.flavours import FLAVOURS, NpmTool
from rootfs.kernel import KernelSource

KERNEL = KernelSource("linux-image-6.12.1-cloud-amd64", "6.12.1-1", "1:1.37.0-6")


class FakeApt:
    """What a mirror offers, for `Builder._resolve`."""

    def __init__(self, versions: dict[str, str]) -> None:
        self.versions = versions

    def resolve(self, _packages: object, *, essential: bool = False) -> dict[str, str]:
        return self.versions

    def candidates(self, *names: str) -> dict[str, dict[str, str]]:
        return {
            names[0]: {"Depends": f"{KERNEL.package} (= {KERNEL.version})"},
            names[1]: {"Version": KERNEL.busybox_version},
        }


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    folder = tmp_path / "guest"
    folder.mkdir()
    (folder / "init.py").write_text("def main(): pass\n")
    return folder


@pytest.fixture
def builder(tmp_path: Path, guest: Path, monkeypatch: pytest.MonkeyPatch) -> build.Builder:
    monkeypatch.setattr(build, "run", lambda argv: "1.0")
    mirror = apt.Mirror("http://mirror/debian", "http://mirror/debian-security")
    return build.Builder(tmp_path / "images", tmp_path / "cache", mirror, guest)


def input_digest(builder: build.Builder, versions: dict[str, str], flavour: str = "minimal") -> str:
    return builder._resolve(FLAVOURS[flavour], FakeApt(versions)).digest  # type: ignore[arg-type]


def test_digest_follows_every_input(builder: build.Builder, guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [input_digest(builder, {"a": "1", "b": "2"})]
    assert input_digest(builder, {"b": "2", "a": "1"}) == seen[0]

    seen.append(input_digest(builder, {"a": "1+deb13u1", "b": "2"}))
    seen.append(input_digest(builder, {"a": "1", "b": "2"}, "default"))
    (guest / "more.py").write_text("x = 1\n")
    seen.append(input_digest(builder, {"a": "1", "b": "2"}))
    (guest / "more.py").write_text("x = 2\n")
    seen.append(input_digest(builder, {"a": "1", "b": "2"}))
    (guest / "more.py").rename(guest / "other.py")
    seen.append(input_digest(builder, {"a": "1", "b": "2"}))
    monkeypatch.setattr(build, "run", lambda argv: "1.1")
    seen.append(input_digest(builder, {"a": "1", "b": "2"}))
    assert len(set(seen)) == len(seen)


def test_a_changed_recipe_changes_the_digest(builder: build.Builder) -> None:
    flavour = FLAVOURS["minimal"]
    changed = dataclasses.replace(flavour, dpkg_options=(*flavour.dpkg_options, "path-exclude=/x"))
    fake = FakeApt({"a": "1"})
    first, second = (builder._resolve(f, fake).digest for f in (flavour, changed))  # type: ignore[arg-type]
    assert first != second


def test_guest_code_must_be_whole(guest: Path) -> None:
    assert list(build.guest_files(guest)) == ["init.py"]
    (guest / "init.py").unlink()
    with pytest.raises(BuildError, match=r"has no init\.py"):
        build.guest_files(guest)


# Mirror discovery


def test_mirror_is_the_machines_own() -> None:
    found = apt.parse_targets(
        "bookworm|main|http://vendor/linux/|Vendor\n"
        "bookworm|contrib|http://other/debian/|Debian\n"
        "bookworm-updates|main|http://m/debian/|Debian\n"
        "bookworm-security|main|http://s/debian-security/|Debian\n"
        "bookworm|main|http://m/debian/|Debian\n"
    )
    assert (found.archive, found.security) == ("http://m/debian", "http://s/debian-security")


def test_mirror_is_known_before_the_first_update() -> None:
    found = apt.parse_targets("bookworm|main|http://m/debian/|$(ORIGIN)\n")
    assert (found.archive, found.security) == ("http://m/debian", "http://m/debian-security")


@pytest.mark.parametrize("text", ["", "noble|main|http://archive/ubuntu/|Ubuntu\n", "||||\n", "garbage\n"])
def test_a_machine_that_is_not_debian_is_told_what_to_do(text: str) -> None:
    with pytest.raises(BuildError, match="--mirror"):
        apt.parse_targets(text)


def test_installations_are_read_from_apts_simulation() -> None:
    text = (
        "Inst base-files (13.8 Debian:13.8/stable [amd64])\n"
        "Inst libc6 [2.40] (2.41-12+deb13u5 Debian:13.8/stable [amd64]) []\n"
        "Conf libc6 (2.41-12+deb13u5 Debian:13.8/stable [amd64])\n"
    )
    assert dict(apt._INSTALL_LINE.findall(text)) == {"base-files": "13.8", "libc6": "2.41-12+deb13u5"}


STATUS = """Package: a
Status: install ok installed
Version: 1
Description: text
 Status: more: text

Package: gone
Status: deinstall ok config-files
Version: 2
"""


def test_only_installed_packages_count(tmp_path: Path) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(STATUS)
    assert packages.check_installed(tmp_path, {"a": "1"}) == {"a": "1"}
    with pytest.raises(BuildError, match=r"mirror changed .*\(a, b\)"):
        packages.check_installed(tmp_path, {"a": "2", "b": "1"})


# npm


def test_an_npm_package_must_have_the_recipes_digest(tmp_path: Path) -> None:
    archive = tmp_path / "x.tgz"
    archive.write_bytes(b"as published")
    good = "sha512-" + base64.b64encode(hashlib.sha512(b"as published").digest()).decode()
    tool = NpmTool("x", "1.0", good, "package/x", "usr/local/bin/x")
    npm.check(archive, tool)
    archive.write_bytes(b"something else")
    with pytest.raises(BuildError, match="another file"):
        npm.check(archive, tool)
    assert not archive.exists()


# The store


def make_image(folder: Path, text: str, input_digest: str = "0" * 64) -> Path:
    folder.mkdir(parents=True)
    manifest: dict[str, object] = {"name": "minimal", "digest": text, "input_digest": input_digest}
    for part in ("kernel", "initramfs", "root"):
        (folder / part).write_text(text)
        manifest[part] = {"file": part, "size_bytes": len(text)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def publish(images: store.Store, text: str) -> Path:
    with store.locked(images.folder), images.draft() as draft:
        return images.publish("minimal", make_image(draft / "image", text, text * 64), text * 64)


def test_publishing_swaps_a_link_and_keeps_one_image_before(tmp_path: Path) -> None:
    images = store.Store(tmp_path)
    first, second, third = (publish(images, text) for text in "abc")
    assert (tmp_path / "minimal").resolve() == third == images.current("minimal")
    assert not first.exists()
    assert second.exists()
    assert images.find("minimal", "c" * 64) == third
    assert images.find("minimal", "a" * 64) is None
    assert sorted(os.listdir(images.folder)) == [".lock", second.name, third.name]


def test_publishing_the_same_image_again_changes_nothing(tmp_path: Path) -> None:
    images = store.Store(tmp_path)
    publish(images, "a")
    second = publish(images, "b")
    with store.locked(images.folder):
        assert images.publish("minimal", second, "b" * 64) == second
    assert images.find("minimal", "a" * 64) is not None


def test_an_image_that_lost_a_file_is_not_found(tmp_path: Path) -> None:
    images = store.Store(tmp_path)
    entry = publish(images, "a")
    (entry / "root").write_text("cut")
    assert images.find("minimal", "a" * 64) is None
    assert images.current("minimal") is None


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    images = store.Store(tmp_path)

    def build_half() -> None:
        with store.locked(images.folder), images.draft() as draft:
            (draft / "tree").mkdir()
            raise BuildError("half way")

    with pytest.raises(BuildError, match="half way"):
        build_half()
    assert os.listdir(images.folder) == [".lock"]


def test_drafts_of_killed_builds_are_removed(tmp_path: Path) -> None:
    (tmp_path / "tmp-killed" / "tree").mkdir(parents=True)
    with store.locked(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]


def test_two_builders_wait_for_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entered = threading.Event()

    def other() -> None:
        with store.locked(tmp_path):
            entered.set()

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.05)
    thread.join()
    assert entered.is_set()
    assert "waiting for another build" in capsys.readouterr().err


def test_a_directory_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "minimal").mkdir()
    with pytest.raises(BuildError, match="in the way"):
        publish(store.Store(tmp_path), "a")


# The root tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for path in ("etc/machine-id", "var/log/dpkg.log", "var/cache/apt/x.bin", "etc/ssh/ssh_host_rsa_key", "dev/null"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("x")
    for name in ("passwd", "group", "shadow"):
        (root / "etc" / name).write_text("root:x:0:0::/root:/bin/bash\n")
    (root / "etc/ssh/ssh_config").write_text("kept")
    return root


def test_nothing_of_the_build_stays(root: Path) -> None:
    tree.clean(root)
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert left == ["etc/group", "etc/passwd", "etc/shadow", "etc/ssh/ssh_config"]
    assert all((root / name).is_dir() for name in ("dev", "newroot", "overlay", "proc", "run", "sys", "tmp", "var/log"))
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_the_user_has_a_home_and_no_password(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: dict[Path, tuple[int, int]] = {}
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: owners.update({path: (uid, gid)}))  # only root may
    tree.add_user(root)
    assert owners == {root / "app": (1000, 1000)}
    assert (root / "etc/passwd").read_text().splitlines()[-1] == "sandbox:x:1000:1000:sandbox:/home/sandbox:/bin/bash"
    assert (root / "etc/shadow").read_text().splitlines()[-1].startswith("sandbox:*:")
    assert (root / "home/app").readlink() == Path("sandbox")


# Commands


def test_missing_programs_name_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_path", lambda: "/nowhere")
    with pytest.raises(BuildError, match="apt-get install erofs-utils no-such-program"):
        command.require("mkfs.erofs", "no-such-program")


def test_a_failed_command_shows_itself_and_its_last_words() -> None:
    with pytest.raises(BuildError, match=r"status 3: sh -c 'echo why; exit 3'\n    why"):
        command.run(["sh", "-c", "echo why; exit 3"])


def test_a_full_disk_is_called_by_its_name() -> None:
    with pytest.raises(BuildError, match="disk is full"):
        command.run(["sh", "-c", "echo 'tar: No space left on device' >&2; exit 1"])


def test_without_root_the_builder_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["build", "minimal"]) == 1
    captured = capsys.readouterr()
    assert "sudo" in captured.err
    assert captured.out == ""


def test_an_unknown_flavour_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["build", "maximal"])
    assert ended.value.code == 2
    assert "'default', 'minimal'" in capsys.readouterr().err

"""Build an image: resolve the inputs, reuse an image of the same inputs or else make one, and publish it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rootfs import digest, kernel, npm, packages, tree
from rootfs.apt import Apt, Mirror
from rootfs.command import require, run
from rootfs.errors import BuildError
from rootfs.flavours import SUITE, Flavour
from rootfs.kernel import KernelFiles, KernelSource
from rootfs.progress import say, step
from rootfs.store import DRAFT_PREFIX, MANIFEST, Store, locked, read_manifest

SCHEMA = 1
ROOT_FILE = "root.erofs"
_CODE = Path(__file__).parent
GUEST_DIR = _CODE.parent / "guest"
_TOOLS = ("erofs-utils", "mmdebstrap")


@dataclass(frozen=True, slots=True)
class Inputs:
    """All inputs of a build: packages, kernel, recipe, code and tools."""

    versions: Mapping[str, str]
    kernel: KernelSource
    summary: Mapping[str, object]

    @property
    def digest(self) -> str:
        """Digest of the inputs; builds with equal digests give equal images."""
        return digest.of_value(self.summary)


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a build, printed as JSON on the last line of standard output."""

    name: str
    digest: str
    path: str
    cached: bool


class Builder:
    """Builder of images from one mirror into one images directory, with one cache."""

    def __init__(self, images_dir: Path, cache_dir: Path, mirror: Mirror, guest_dir: Path = GUEST_DIR) -> None:
        self._store = Store(images_dir)
        self._cache = cache_dir
        self._mirror = mirror
        self._guest_dir = guest_dir

    def build(self, flavour: Flavour) -> Result:
        """Publish an up-to-date image of the flavour.

        :raises BuildError: the build failed; the image published before is unchanged.
        """
        require("mmdebstrap", "mkfs.erofs", "dpkg-deb", "tar", "zstd", "setpriv", "unshare")
        with locked(self._cache), locked(self._store.folder):
            apt = Apt(self._cache, self._mirror, SUITE)
            if not _update(apt):
                return self._offline(flavour)
            inputs = self._resolve(flavour, apt)
            found = self._store.find(flavour.name, inputs.digest)
            if found is not None:
                say(f"image {flavour.name}: inputs unchanged")
                return _result(self._store.publish(flavour.name, found, inputs.digest), cached=True)
            with self._store.draft() as draft:
                image = self._make(flavour, inputs, apt, draft)
                return _result(self._store.publish(flavour.name, image, inputs.digest), cached=False)

    def check(self, flavour: Flavour) -> Result:
        """Build the image, build it once more without caches, and compare the two.

        :raises BuildError: files of the two images differ; the message names them.
        """
        first = self.build(flavour)
        with locked(self._cache), tempfile.TemporaryDirectory(prefix=DRAFT_PREFIX, dir=self._cache) as folder:
            scratch = Builder(Path(folder) / "images", Path(folder) / "cache", self._mirror, self._guest_dir)
            second = scratch.build(flavour)
            differing = [
                name
                for name in sorted(path.name for path in Path(first.path).iterdir())
                if digest.of_file(Path(first.path) / name) != digest.of_file(Path(second.path) / name)
            ]
        if differing:
            raise BuildError(f"not reproducible: two builds of the same inputs differ in {', '.join(differing)}")
        return first

    def _offline(self, flavour: Flavour) -> Result:
        current = self._store.current(flavour.name)
        if current is None:
            raise BuildError(
                f"no mirror can be reached, and there is no image {flavour.name} of an earlier build: connect, "
                "or give --mirror URL"
            )
        say(f"image {flavour.name}: kept; it may be older than the guest code and Debian's updates")
        return _result(current, cached=True)

    def _resolve(self, flavour: Flavour, apt: Apt) -> Inputs:
        versions = apt.resolve(flavour.packages, essential=True)
        source = kernel.resolve(apt)
        builder = sorted(path for pattern in ("*.py", "*.sh") for path in _CODE.glob(pattern))
        summary = {
            "suite": SUITE,
            "recipe": digest.of_value(dataclasses.asdict(flavour)),
            "builder": digest.of_files(_CODE, builder),
            "guest": digest.of_files(self._guest_dir, guest_files(self._guest_dir).values()),
            "packages": digest.of_value(dict(versions)),
            "kernel": f"{source.package} {source.version}",
            "busybox": source.busybox_version,
            "tools": {name: run(["dpkg-query", "--show", "--showformat=${Version}", name]) for name in _TOOLS},
        }
        return Inputs(versions, source, summary)

    def _make(self, flavour: Flavour, inputs: Inputs, apt: Apt, draft: Path) -> Path:
        """Make the image in `draft`; return its directory."""
        tools = inputs.summary["tools"]
        assert isinstance(tools, dict)
        boot = kernel.prepare(inputs.kernel, apt, self._cache)
        tarball = packages.base_tarball(flavour, inputs.versions, apt, tools["mmdebstrap"], self._cache)
        root, image = draft / "tree", draft / "image"
        with step("root tree: unpacking, adding the guest's code"):
            tree.unpack(tarball, root)
            installed = packages.check_installed(root, inputs.versions)
            tree.finish(root, guest_files(self._guest_dir))
        for tool in flavour.npm_tools:
            npm.install(tool, root, self._cache)
        image.mkdir()
        shutil.copyfile(boot.vmlinux, image / "vmlinux")
        shutil.copyfile(boot.initramfs, image / "initramfs")
        with step("root file system: writing"):
            _write_root(root, image / ROOT_FILE, boot.epoch, inputs.digest)
        manifest = _manifest(flavour, inputs, installed, boot, image)
        (image / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        return image


def guest_files(folder: Path) -> dict[str, Path]:
    """Return path in the guest package -> file, of all its modules.

    :raises BuildError: the folder is not the guest package.
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.py"))}
    if "init.py" not in files:
        raise BuildError(f"{folder} has no init.py: run the builder from a complete checkout or installation")
    return files


def _update(apt: Apt) -> bool:
    """Update the package lists; return False if the mirror cannot be reached and there are no earlier lists."""
    try:
        with step("package lists: updating"):
            apt.update()
    except BuildError as e:
        say(f"the package lists cannot be updated. {e}")
        if not apt.has_lists():
            return False
        say("continuing with the package lists of an earlier build")
    return True


def _write_root(root: Path, target: Path, epoch: int, input_digest: str) -> None:
    identity = uuid.uuid5(uuid.NAMESPACE_OID, input_digest)
    run(["mkfs.erofs", "--quiet", f"-T{epoch}", f"-U{identity}", target, root])


def _manifest(
    flavour: Flavour, inputs: Inputs, installed: Mapping[str, str], boot: KernelFiles, image: Path
) -> dict[str, object]:
    def part(file: str, **more: str) -> dict[str, object]:
        path = image / file
        return {"file": file, "sha256": digest.of_file(path), "size_bytes": path.stat().st_size, **more}

    parts = {
        "kernel": part("vmlinux", version=boot.release),
        "initramfs": part("initramfs"),
        "root": part(ROOT_FILE, format="erofs"),
    }
    return {
        "schema": SCHEMA,
        "name": flavour.name,
        "digest": digest.of_value({name: values["sha256"] for name, values in parts.items()}),
        "input_digest": inputs.digest,
        "created": datetime.fromtimestamp(boot.epoch, UTC).isoformat().replace("+00:00", "Z"),
        **parts,
        "min_memory_bytes": flavour.min_memory_bytes,
        "packages": [{"name": name, "version": version} for name, version in sorted(installed.items())],
        "inputs": dict(inputs.summary),
    }


def _result(image: Path, *, cached: bool) -> Result:
    manifest = read_manifest(image)
    if manifest is None:
        raise BuildError(f"{image} is damaged: remove it and build again")
    return Result(str(manifest["name"]), str(manifest["digest"]), str(image), cached)

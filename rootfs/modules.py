"""Find the load order of kernel modules from their dependencies.

Debian's kernel packages have no modules.dep (it is made at installation), so the dependencies are read from the
`.modinfo` section of each module: `depends=` and the `pre:` part of `softdep=` (modprobe.d(5)).
"""

from __future__ import annotations

import lzma
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from rootfs.errors import BuildError

_SUFFIXES = (".ko", ".ko.xz")
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_HEADER_BYTES = 12  # struct module_signature; ends with the signature's length, 32 bits big endian


class ModuleTree:
    """The modules of one kernel version.

    :param folder: `lib/modules/<version>` of an unpacked kernel package.
    :raises BuildError: the folder has no modules.builtin.
    """

    def __init__(self, folder: Path) -> None:
        builtin = folder / "modules.builtin"
        if not builtin.is_file():
            raise BuildError(f"{folder} has no modules.builtin: it is not the modules of a kernel")
        self._builtin = {module_name(Path(line)) for line in builtin.read_text().splitlines() if line}
        self._files = {module_name(path): path for path in folder.rglob("*.ko*") if path.name.endswith(_SUFFIXES)}

    def load_order(self, wanted: Iterable[str], *, loaded: Iterable[str] = ()) -> list[str]:
        """Return the modules to load, dependencies first, without those that are built in or loaded already.

        :raises BuildError: a module does not exist, or the dependencies have a cycle.
        """
        order: list[str] = []
        done = set(loaded)
        for name in wanted:
            self._visit(_normal(name), order, done, ())
        return order

    def read(self, name: str) -> bytes:
        """Return a module's ELF file, decompressed and without its signature."""
        path = self._files[name]
        data = path.read_bytes()
        return strip_signature(lzma.decompress(data) if path.suffix == ".xz" else data)

    def _visit(self, name: str, order: list[str], done: set[str], above: tuple[str, ...]) -> None:
        if name in done or name in self._builtin:
            return
        if name in above:
            raise BuildError(f"kernel modules have a dependency cycle: {' -> '.join((*above, name))}")
        if name not in self._files:
            needed_by = f" (needed by {above[-1]})" if above else ""
            raise BuildError(f"this kernel has no module {name}{needed_by}; choose another kernel package")
        hard, soft = needs(self.read(name))
        for other in hard:
            self._visit(other, order, done, (*above, name))
        for other in soft:
            if other in self._files:
                self._visit(other, order, done, (*above, name))
        done.add(name)
        order.append(name)


def module_name(path: Path) -> str:
    """Return the kernel's name of a module file, with underscores for dashes."""
    return _normal(path.name.split(".ko")[0])


def strip_signature(module: bytes) -> bytes:
    """Return a module without the signature appended to it (Linux, Documentation/admin-guide/module-signing.rst).

    The guest's kernel would check each module at every boot, which takes 0.2 s of 3.0 s under emulation; apt has
    already checked the package.

    :raises BuildError: the signature is malformed.
    """
    if not module.endswith(_SIGNATURE_MAGIC):
        return module
    end = len(module) - len(_SIGNATURE_MAGIC) - _SIGNATURE_HEADER_BYTES
    (length,) = struct.unpack_from(">I", module, end + _SIGNATURE_HEADER_BYTES - 4)
    if length > end:
        raise BuildError("a kernel module's signature is longer than the module")
    return module[: end - length]


def needs(module: bytes) -> tuple[list[str], list[str]]:
    """Return (required, optional) dependencies of a module: names of modules to load before it.

    :raises BuildError: it is not a 64-bit little-endian ELF file.
    """
    hard: list[str] = []
    soft: list[str] = []
    for entry in _modinfo(module).split(b"\0"):
        key, _, value = entry.decode(errors="replace").partition("=")
        if key == "depends":
            hard += [_normal(name) for name in value.split(",") if name]
        elif key == "softdep" and (match := re.search(r"pre:([^:]*)(?=\s\w+:|$)", value)):
            soft += [_normal(name) for name in match[1].split()]
    return hard, soft


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _modinfo(module: bytes) -> bytes:
    """Return the bytes of the section `.modinfo` (elf(5), Elf64_Ehdr and Elf64_Shdr)."""
    try:
        if module[:6] != b"\x7fELF\x02\x01":
            raise BuildError("a kernel module is not a 64-bit little-endian ELF file")
        (table,) = struct.unpack_from("<Q", module, 0x28)
        size, count, names_index = struct.unpack_from("<HHH", module, 0x3A)
        headers = [struct.unpack_from("<IIQQQQ", module, table + index * size) for index in range(count)]
        names_at = headers[names_index][4]
        for header in headers:
            at = names_at + header[0]
            if module[at : module.index(b"\0", at)] == b".modinfo":
                return module[header[4] : header[4] + header[5]]
    except (struct.error, IndexError, ValueError) as e:
        raise BuildError("a kernel module is cut short or damaged") from e
    return b""

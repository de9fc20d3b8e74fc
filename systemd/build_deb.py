"""Build the Debian package (`just deb`), with the Python libraries of uv.lock in a virtual environment.

    python systemd/build_deb.py DIRECTORY

Time stamps are SOURCE_DATE_EPOCH or the time of the last commit; files are owned by root.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
UNITS = ROOT / "systemd"
HOME = Path("usr/lib/sandboxd")
PROGRAMS = {
    "sandboxd": "agent.daemon.__main__", "sandboxctl": "agent.cli.app", "sandboxd-gateway": "agent.gateway.__main__",
    "sandboxd-egress": "agent.egress.__main__",
}  # fmt: skip
# -P: modules are not loaded from the directory of the caller.
SCRIPT = """#!/{home}/bin/python3 -P
import sys

from {module} import main

sys.exit(main())
"""
SCRIPTS = ("postinst", "prerm", "postrm")


def run(*argv: str | Path, **env: str) -> str:
    """Run a command in the checkout; return its standard output.

    :raises subprocess.CalledProcessError: its status is not 0.
    """
    return subprocess.run(
        [str(word) for word in argv], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **env}
    ).stdout


def install_code(tree: Path, python: str) -> None:
    """Install the virtual environment and the commands; compile bytecode, as the package's files are read-only."""
    home = tree / HOME
    run(python, "-m", "venv", "--without-pip", "--symlinks", home)
    requirements = run("uv", "export", "--frozen", "--no-dev", "--no-emit-project", "--quiet")
    with tempfile.TemporaryDirectory() as scratch:
        locked = Path(scratch, "requirements.txt")
        locked.write_text(requirements)
        into = ("--python", home / "bin/python3")
        run("uv", "pip", "install", "--quiet", "--require-hashes", "--link-mode=copy", *into, "--requirement", locked)
        run("uv", "build", "--quiet", "--wheel", "--out-dir", scratch, ROOT)
        wheel = next(Path(scratch).glob("*.whl"))
        run("uv", "pip", "install", "--quiet", "--no-deps", "--link-mode=copy", *into, wheel)
    for leftover in [*(home / "bin").iterdir(), home / ".lock"]:
        if not leftover.name.startswith("python"):
            leftover.unlink(missing_ok=True)
    (home / "pyvenv.cfg").write_text(f"home = {Path(python).parent}\ninclude-system-site-packages = false\n")
    run(python, "-m", "compileall", "-q", "-s", tree, "-p", "/", "--invalidation-mode", "unchecked-hash", home)
    (tree / "usr/bin").mkdir(parents=True)
    for name, module in PROGRAMS.items():
        path = tree / "usr/bin" / name
        path.write_text(SCRIPT.format(home=HOME, module=module))
        path.chmod(0o755)


def install_units(tree: Path) -> None:
    """Install units, sysusers, tmpfiles, the settings file and the documentation."""
    units = tree / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for pattern in ("*.service", "*.socket", "*.slice"):
        for path in UNITS.glob(pattern):
            shutil.copy(path, units)
    for name in ("sysusers.d", "tmpfiles.d"):
        shutil.copytree(UNITS / name, tree / "usr/lib" / name)
    settings = tree / "etc/sandboxd"
    settings.mkdir(parents=True)
    shutil.copy(UNITS / "config.toml", settings)
    documents = tree / "usr/share/doc/sandboxd"
    documents.mkdir(parents=True)
    shutil.copy(ROOT / "LICENSE", documents / "copyright")
    shutil.copytree(ROOT / "docs", documents / "docs")


def write_control(tree: Path, version: str, python: str) -> None:
    """Write the control files of the package (deb(5))."""
    major, minor = run(python, "-c", "import sys; print(*sys.version_info[:2])").split()
    size = sum(path.lstat().st_size for path in tree.rglob("*") if path.is_file())
    control = tree / "DEBIAN"
    control.mkdir()
    fields = (UNITS / "debian/control.in").read_text()
    (control / "control").write_text(
        fields.format(
            version=version,
            installed_kib=size >> 10,
            python=f"{major}.{minor}",
            next_python=f"{major}.{int(minor) + 1}",
        )
    )
    (control / "conffiles").write_text("/etc/sandboxd/config.toml\n")
    for name in SCRIPTS:
        shutil.copy(UNITS / "debian" / name, control / name)
        (control / name).chmod(0o755)


def debian_version(version: str) -> str:
    """Return a PEP 440 version as dpkg orders it: a pre-release, after a tilde, comes before its release."""
    return re.sub(r"\.?(dev|a|b|rc)(\d+)", r"~\1\2", version)


def main() -> int:
    """Build the package into a directory and print its path."""
    parser = argparse.ArgumentParser(prog="just deb", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    python = "/usr/bin/python3"
    version = debian_version(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
    date = os.environ.get("SOURCE_DATE_EPOCH") or run("git", "log", "-1", "--format=%ct").strip()
    directory.mkdir(parents=True, exist_ok=True)
    package = directory / f"sandboxd_{version}_amd64.deb"
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "sandboxd")
        tree.mkdir(mode=0o755)
        os.umask(0o022)
        install_code(tree, python)
        install_units(tree)
        write_control(tree, version, python)
        run("dpkg-deb", "--build", "--root-owner-group", "-Zxz", "-z1", tree, package, SOURCE_DATE_EPOCH=date)
    sys.stdout.write(f"{package}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Build hook: generate the package `sandboxd` from proto/ for wheels and editable installs. It is not committed.

`python hatch_build.py` generates it in a checkout; `just proto` runs that.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent


def generate(root: Path) -> None:
    """Write sandboxd/v1/*_pb2.py and *_pb2_grpc.py, and type stubs if mypy-protobuf is installed."""
    from importlib.resources import files
    from importlib.util import find_spec

    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(root / "proto")) for path in (root / "proto").rglob("*.proto"))
    out = [f"--python_out={root}", f"--grpc_python_out={root}"]
    if find_spec("mypy_protobuf") is not None:
        # The plugins are in the interpreter's directory, which need not be in PATH.
        scripts = Path(sys.executable).parent
        out += [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
        out += [f"--mypy_out=quiet:{root}", f"--mypy_grpc_out=quiet:{root}"]
    include = str(files("grpc_tools") / "_proto")
    if protoc.main(["protoc", f"--proto_path={root / 'proto'}", f"--proto_path={include}", *out, *sources]) != 0:
        raise SystemExit("protoc failed; see above")
    for package in ("sandboxd", "sandboxd/v1"):
        (root / package / "__init__.py").touch()
    if any((root / "sandboxd/v1").glob("*.pyi")):
        # PEP 561. Without the stubs, type checkers would find no message in the generated modules.
        (root / "sandboxd/py.typed").touch()


if __name__ == "__main__":
    generate(ROOT)
    sys.exit(0)

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run without hatchling, by `just proto`
    pass
else:

    class CustomBuildHook(BuildHookInterface):  # type: ignore[misc]
        """Generates the package before hatchling collects files."""

        def initialize(self, version: str, build_data: dict[str, object]) -> None:
            generate(ROOT)

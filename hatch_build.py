"""Generates the package `sandboxd` from proto/ whenever a wheel or an editable install is built; none of it is
committed.

`python hatch_build.py` does the same in a checkout: that is `just proto`.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent


def generate(root: Path) -> None:
    """Writes sandboxd/v1/*_pb2.py, *_pb2_grpc.py and stubs for the type checker where their generator is installed."""
    from importlib.resources import files
    from importlib.util import find_spec

    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(root / "proto")) for path in (root / "proto").rglob("*.proto"))
    out = [f"--python_out={root}", f"--grpc_python_out={root}"]
    if find_spec("mypy_protobuf") is not None:
        # The plugins lie beside the interpreter, which need not be in PATH.
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
except ImportError:  # imported by a tool, not by a build
    pass
else:

    class CustomBuildHook(BuildHookInterface):  # type: ignore[misc]
        """Called by hatchling before it collects files."""

        def initialize(self, version: str, build_data: dict[str, object]) -> None:
            generate(ROOT)

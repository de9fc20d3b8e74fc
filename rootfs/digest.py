"""SHA-256 digests of values and files, which identify images and cache entries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


def of_value(value: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(root: Path, paths: Iterable[Path]) -> str:
    """Return the SHA-256 over the names (relative to `root`) and bytes of files, as hex."""
    return of_value({str(path.relative_to(root)): of_file(path) for path in paths})

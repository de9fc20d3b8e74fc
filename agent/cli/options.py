"""Global options of one `sandboxctl` run, and the parsers of option values such as 512MiB, 10m and KEY=VALUE."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import typer


@dataclass(slots=True)
class Options:
    """The options that every command accepts: how to reach the daemon, and whether to print JSON."""

    address: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    insecure: bool = False
    json: bool = False


_current = Options()


def current() -> Options:
    """Return the global options of this run."""
    return _current


def set_current(options: Options) -> None:
    """Replace the global options of this run."""
    global _current  # noqa: PLW0603  a process is one run; only tests make several
    _current = options


def parse_size(text: str) -> int:
    """Return the bytes of an option such as --memory 512MiB.

    :raises typer.BadParameter: `text` is not a size.
    """
    from agent.common import quantities

    try:
        return quantities.parse_size(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_duration(text: str) -> float:
    """Return the seconds of an option such as --lifetime 10m.

    :raises typer.BadParameter: `text` is not a duration.
    """
    from agent.common import quantities

    try:
        return quantities.parse_duration(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_pairs(words: Iterable[str] | None, option: str, *, value_needed: bool = True) -> dict[str, str]:
    """Return KEY=VALUE words as a mapping; the last of equal keys wins.

    :param option: the option that the words were given to, for the error message.
    :param value_needed: reject a KEY without "=VALUE".
    :raises typer.BadParameter: a word is not of that form.
    """
    result = {}
    for word in words or ():
        key, separator, value = word.partition("=")
        if not key or (value_needed and not separator):
            raise typer.BadParameter(f"{word!r} is not of the form KEY=VALUE", param_hint=option)
        result[key] = value
    return result


def read_env_file(path: Path) -> dict[str, str]:
    """Return the variables of a file with one KEY=VALUE per line; skip blank lines and lines that start with #.

    Values are taken literally: no quotes, no expansion.

    :raises typer.BadParameter: the file cannot be read, or a line is not of that form.
    """
    result = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}", param_hint="--env-file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, separator, value = line.partition("=")
        if not separator or not key.strip():
            raise typer.BadParameter(f"{path}, line {number}: write KEY=VALUE", param_hint="--env-file")
        result[key.strip()] = value
    return result

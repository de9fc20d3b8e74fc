"""What is said once for every command: where the daemon is, and whether programs or people read the output."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, cast

import typer


@dataclass(slots=True)
class Options:
    """The options that all commands share."""

    address: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    insecure: bool = False
    json: bool = False


_options = Options()


def current() -> Options:
    """Returns the options of this run."""
    return _options


def begin(options: Options) -> None:
    """Sets the options of this run, as they stand before the command's name."""
    global _options  # noqa: PLW0603  one process is one run; tests begin several
    _options = options


def _set_json(value: bool) -> bool:
    _options.json = _options.json or value
    return value


def _set_address(value: str) -> str:
    _options.address = value or _options.address
    return value


_EVERYWHERE = {
    "json_": (bool, False, typer.Option("--json", callback=_set_json, help="Print JSON only.")),
    "address_": (
        str, "",
        typer.Option("--address", callback=_set_address, metavar="ADDRESS", help="unix:PATH or HOST:PORT."),
    ),
}  # fmt: skip


def add_command(app: typer.Typer, function: Callable[..., Any], name: str | None = None, **settings: Any) -> None:
    """Adds a command to `app`; the options that are accepted everywhere are accepted after its name, too.

    A coroutine function is run to its end, and what it returns is the exit status; see `agent.cli.runner`.
    """
    signature = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for added in _EVERYWHERE:
            del values[added]
        result = function(**values)
        if inspect.iscoroutine(result):
            from agent.cli.runner import run

            result = run(cast("Coroutine[Any, Any, int | None]", result))
        raise typer.Exit(result or 0)

    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in _EVERYWHERE.items()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=[*parameters, *extra])  # type: ignore[attr-defined]
    app.command(name, **settings)(command)

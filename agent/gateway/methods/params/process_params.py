"""Parameters of the methods on processes, REPLs and the environment."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from agent.gateway.jsonrpc.messages import Params
from agent.gateway.methods.params.common import Id

# Only the Python SDK sends "inherit": it shows the output itself.
OutputMode = Literal["piped", "null", "inherit"]


class StartProcess(Params):
    """Common parameters of the methods that start a process."""

    env: dict[str, str] | None = None
    clear_env: bool | None = None
    cwd: str | None = None
    stdin_stream_id: Id | None = None
    stdout: OutputMode | None = None
    stderr: OutputMode | None = None


class Spawn(StartProcess, kw_only=True):
    """Parameters of spawn."""

    command: str
    args: list[str] | None = None


class SpawnDeno(StartProcess, kw_only=True):
    """Parameters of spawnDeno."""

    entrypoint: str | None = None
    watch: bool | list[str] | None = None
    code: str | None = None
    extension: Literal["js", "cjs", "mjs", "ts", "cts", "mts", "jsx", "tsx"] | None = None
    script_args: list[str] | None = None


class SpawnRepl(StartProcess, kw_only=True):
    """Parameters of spawnDenoRepl."""

    script_args: list[str] | None = None


class Pid(Params):
    """Parameters of the methods on one process."""

    pid: Id


class Kill(Pid):
    """Parameters of processKill."""

    signal: str | None = None


class Abort(Params, rename={"target": "abortId"}):
    """Parameters of abort. A member `abort_id` would make the abort itself abortable, so it has another name here."""

    target: Id


class ReplEval(Pid):
    """Parameters of denoReplEval."""

    code: str


class ReplCall(Pid):
    """Parameters of denoReplCall."""

    fn: str
    args: list[Any] = msgspec.field(default_factory=list)


class Vscode(Params):
    """Parameters of vscode."""

    path: str
    extensions: list[str] = msgspec.field(default_factory=list)
    env: dict[str, str] | None = None
    editor_settings: dict[str, Any] | None = None


class EnvKey(Params):
    """Parameters of envGet and envDelete."""

    key: str


class EnvKeyValue(EnvKey):
    """Parameters of envSet."""

    value: str

"""Serve the operations on processes: proc.start, proc.exec, proc.attach, proc.signal, proc.wait and so on."""

from __future__ import annotations

import os
import signal

from guest import listeners, reactor, spawn
from guest.call import Call, CallAbandoned
from guest.dial import relay_channel
from guest.process import Process, ProcessRegistry, exited_error
from guest.user import User, lookup_user
from guest.wire import CallError, Frame, parse_json

DEFAULT_USER = "sandbox"
DEFAULT_REPLAY_BYTES = 256 << 10
MAX_REPLAY_BYTES = 16 << 20
_INPUT_BYTES = 128 << 10  # of standard input in one write; suits a widened pipe
_HANG_UP_GRACE_S = 2.0
MAX_ENV, MAX_ENV_BYTES = 1024, 128 << 10
_FIRST_POLL_S, _LAST_POLL_S = 0.02, 0.25  # between two searches for a listening socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.call import Handler


def _strings(value: object, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
        raise CallError("INVALID", f"{what} must be a list of strings without NUL")
    return value


def parse_env(value: object) -> dict[str, str]:
    """Return `value` if it is an environment (execve(2)).

    :raises CallError: a name is empty or has "=" or NUL, or a value is not text or has NUL.
    """
    if not isinstance(value, dict):
        raise CallError("INVALID", "env must be an object")
    for name, text in value.items():
        if not name or "=" in name or "\0" in name or not isinstance(text, str) or "\0" in text:
            raise CallError("INVALID", f"environment variable {name[:100]!r}: the name or value is not valid")
    return value


def _integer(value: object, low: int, high: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CallError("INVALID", f"{what} must be a number from {low} to {high}, not {value!r:.40}")
    return value


def parse_signal(value: object) -> int:
    """Return the number of a signal given as "SIGTERM", "TERM", "15" or 15.

    :raises CallError: there is no such signal.
    """
    text = str(value).upper()
    if text.isdecimal():
        number = int(text) if len(text) < 4 else 0
    else:
        name = text if text.startswith("SIG") else f"SIG{text}"
        number = int(signal.Signals.__members__.get(name, 0))
    if not 1 <= number <= signal.SIGRTMAX:
        raise CallError("INVALID", f"unknown signal {str(value)[:40]!r}; use a name such as SIGTERM or a number")
    return number


def _size(value: object) -> tuple[int, int]:
    size = value if isinstance(value, dict) else {}
    return _integer(size.get("rows"), 1, 65535, "rows"), _integer(size.get("cols"), 1, 65535, "cols")


class ProcessOps:
    """Handlers of the operations on processes. `env` is the environment of the sandbox, set by sys.configure."""

    def __init__(self, registry: ProcessRegistry) -> None:
        self.registry = registry
        self.env: dict[str, str] = {}
        self.ready = False
        self._removed: set[str] = set()  # variables removed by proc.setenv, which may be default ones (PATH, HOME)

    def handlers(self) -> dict[str, Handler]:
        """Return the handler of each operation."""
        return {
            "proc.start": self.start, "proc.exec": self.exec, "proc.attach": self.attach, "proc.signal": self.signal,
            "proc.resize": self.resize, "proc.wait": self.wait, "proc.list": self.list,
            "proc.env": self.environment, "proc.setenv": self.set_environment, "proc.listener": self.listener,
            "proc.channel": self.channel,
        }  # fmt: skip

    def _start(self, req: dict[str, object]) -> Process:
        if not self.ready:
            raise CallError("STATE", "the sandbox is not configured yet", "NOT_CONFIGURED")
        return self.launch(req)

    def launch(self, req: dict[str, object]) -> Process:
        """Start a process with the parameters of a request.

        :raises CallError: a parameter is not valid, or the process cannot be started.
        """
        argv = _strings(req.get("argv"), "argv")
        if not argv or not argv[0]:
            raise CallError("INVALID", "argv must name a program")
        user = lookup_user(str(req.get("user") or DEFAULT_USER))
        cwd = str(req.get("cwd") or user.home)
        env = parse_env(req.get("env") or {})
        if not req.get("clear_env"):
            env = {**self._environment(user), **env}
        replay = _integer(req.get("replay") or DEFAULT_REPLAY_BYTES, 0, MAX_REPLAY_BYTES, "replay")
        tty = req.get("tty")
        if isinstance(tty, dict):
            rows, cols = _size(tty)
            env.setdefault("TERM", str(tty.get("term") or "xterm-256color"))
            stdio = spawn.open_terminal(rows, cols, user)
        else:
            stdio = spawn.open_pipes(stdin=req.get("stdin") == "pipe", channel=bool(req.get("channel")))
        return self.registry.start(argv, env, cwd, user, stdio, replay)

    def _environment(self, user: User) -> dict[str, str]:
        env = {
            "PATH": spawn.DEFAULT_PATH, "HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell,
            "LANG": "C.UTF-8", **self.env,
        }  # fmt: skip
        for name in self._removed:
            env.pop(name, None)
        return env

    async def environment(self, call: Call) -> dict[str, object]:
        """Serve proc.env: return the environment in which processes of a user start."""
        return {"env": self._environment(lookup_user(str(call.req.get("user") or DEFAULT_USER)))}

    async def set_environment(self, call: Call) -> dict[str, object]:
        """Serve proc.setenv {"set": {...}, "remove": [names]}: change the environment of processes that start later."""
        added, removed = parse_env(call.req.get("set") or {}), _strings(call.req.get("remove") or [], "remove")
        env = {name: value for name, value in {**self.env, **added}.items() if name not in removed}
        size = sum(len(name) + len(value) + 2 for name, value in env.items())
        if len(env) > MAX_ENV or size > MAX_ENV_BYTES or len(self._removed) + len(removed) > MAX_ENV:
            raise CallError(
                "EXHAUSTED", f"the environment would be over {MAX_ENV} variables or {MAX_ENV_BYTES} bytes", "E2BIG"
            )
        self.env = env
        self._removed = (self._removed - added.keys()) | set(removed)
        return {}

    async def channel(self, call: Call) -> dict[str, object]:
        """Serve proc.channel: relay bytes to and from descriptor 3 of a process."""
        return await relay_channel(call, self.registry.get(call.req.get("id")).take_channel())

    async def listener(self, call: Call) -> dict[str, object]:
        """Serve proc.listener: wait until a process of the session listens on a TCP port; return {"host", "port"}."""
        process = self.registry.get(call.req.get("id"))
        pause_s = _FIRST_POLL_S
        while process.exit is None:
            found = listeners.listener_of_session(process.pid)
            if found is not None:
                return {"host": found[0], "port": found[1]}
            await reactor.sleep(pause_s)
            pause_s = min(pause_s * 1.3, _LAST_POLL_S)
        raise exited_error(process)

    async def start(self, call: Call) -> dict[str, object]:
        """Serve proc.start: start a process and return its facts."""
        return self._start(call.req).describe()

    async def exec(self, call: Call) -> dict[str, object]:
        """Serve proc.exec: start a process and attach to it; hang it up if the host abandons the call."""
        process = self._start(call.req)
        try:
            return await self._attach(call, process, replay=True)
        except CallAbandoned:
            if not call.req.get("detach") and not call.link_lost and process.exit is None:
                reactor.spawn(_hang_up(process))
            raise
        finally:
            if process.exit is not None and not call.req.get("detach"):
                self.registry.forget(process)

    async def attach(self, call: Call) -> dict[str, object]:
        """Serve proc.attach: replay the output log, then relay output and input until the process exits."""
        return await self._attach(
            call, self.registry.get(call.req.get("id")), replay=call.req.get("replay") is not False
        )

    async def _attach(self, call: Call, process: Process, *, replay: bool) -> dict[str, object]:
        reader, dropped = process.log.open_reader(replay=replay)
        feeder = reactor.spawn(_feed(call, process))
        try:
            await call.send_json(Frame.EVENT, {"process": process.describe(), "dropped": dropped})
            await process.log.follow(reader, call)
            return {"exit": process.exit}
        finally:
            feeder.cancel()
            process.log.close_reader(reader)

    async def signal(self, call: Call) -> dict[str, object]:
        """Serve proc.signal: send a signal to the process group."""
        self.registry.get(call.req.get("id")).kill(parse_signal(call.req.get("signal")))
        return {}

    async def resize(self, call: Call) -> dict[str, object]:
        """Serve proc.resize: set the size of the terminal."""
        self.registry.get(call.req.get("id")).resize(*_size(call.req))
        return {}

    async def wait(self, call: Call) -> dict[str, object]:
        """Serve proc.wait: wait until the process has exited; return {"exit"}."""
        process = self.registry.get(call.req.get("id"))
        while process.exit is None:
            await process.exited.wait()
        return {"exit": process.exit}

    async def list(self, call: Call) -> dict[str, object]:
        """Serve proc.list: send all processes of the registry in pages."""
        processes = [process.describe() for process in self.registry.by_number.values()]
        for start in range(0, len(processes), 64):
            await call.send_json(Frame.EVENT, {"processes": processes[start : start + 64]})
        return {}


async def _feed(call: Call, process: Process) -> None:
    """Apply the host's frames to the process: input, end of input, terminal sizes, signals."""
    ended = False
    while True:
        kind, payload = await call.recv(_INPUT_BYTES)
        if kind == Frame.DATA and not ended:
            await process.write_stdin(payload)
        elif kind == Frame.EOF:
            if not ended:
                ended = True
                await process.end_stdin()
            if call.host_done:
                return
        elif kind == Frame.EVENT:
            _control(process, parse_json(payload))


def _control(process: Process, message: dict[str, object]) -> None:
    """Resize or signal the process. Errors are ignored: the protocol has no answer to these frames."""
    try:
        if "resize" in message:
            process.resize(*_size(message["resize"]))
        if "signal" in message:
            process.kill(parse_signal(message["signal"]))
    except CallError:
        pass


async def _hang_up(process: Process) -> None:
    """End a process whose client has disconnected: SIGHUP to its group, and SIGKILL after a grace time."""
    try:
        process.kill(signal.SIGHUP)
        await reactor.sleep(_HANG_UP_GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    except (CallError, ProcessLookupError):
        pass

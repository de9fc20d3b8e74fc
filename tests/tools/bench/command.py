"""Programs that a comparison runs: what they print, and an end that lets them clean up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_MAX_SAID = 4000
_END_S = 120.0  # a benchmark deletes its sandboxes, an image build its temporary directories


class CompareError(Exception):
    """The comparison cannot be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a program printed. :param said: the end of its standard error."""

    stdout: str
    said: str


def run(
    command: Sequence[str | Path], cwd: Path, env: Mapping[str, str] | None = None, what: str | None = None
) -> Output:
    """Run a program to its end. An exception that is raised meanwhile, such as KeyboardInterrupt, interrupts it first.

    The program has a session of its own: a terminal's Ctrl-C would reach its children, too, before it can end them.

    :param what: how messages call it; its command line if None.
    :raises CompareError: it fails, with its last words.
    """
    name = what or " ".join(map(str, command))
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise CompareError(f"cannot run {name}: {error}") from error
        try:
            stdout, _ = process.communicate()
        except BaseException:
            _interrupt(process, name)
            raise
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _MAX_SAID))
        output = Output(stdout.decode(errors="replace").strip(), stderr.read().decode(errors="replace").strip())
    if process.returncode != 0:
        raise CompareError(f"{name} ended with status {process.returncode}: {output.said}")
    return output


def _interrupt(process: subprocess.Popen[bytes], name: str) -> None:
    """End a program as Ctrl-C does; kill its session if it takes too long, or if there is a second interrupt."""
    print(f"waiting for {name} to clean up, at most {_END_S:.0f} s", file=sys.stderr, flush=True)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.communicate(timeout=_END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

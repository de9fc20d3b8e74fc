"""Carries bytes between two connected sockets without copying them to this process: splice(2), in a thread of its own.

A pipe is taken only for what is under way: an idle connection holds its two sockets and nothing else, and pipes that
the kernel lets one user have (pipe-user-pages-soft) are enough for any number of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable

from agent.egress.transport.sockets import reset

_PIPE_BYTES = 1 << 20
_MAX_IDLE_PIPES = 8
_TURNS = 4  # of one direction before the others have theirs
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_DEFAULT_PIPE_BYTES = 64 << 10


class _Pipe:
    """A pipe and how many bytes are in it."""

    __slots__ = ("buffered", "read", "size", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.buffered = 0
        try:
            self.size = fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # over what one user may have: the size that it was given must do
            self.size = fcntl.fcntl(self.write, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


class _Direction:
    """From one socket to the other."""

    __slots__ = ("done", "ended", "pipe", "source", "target")

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.pipe: _Pipe | None = None
        self.ended = False  # the source has no more
        self.done = False  # and the target was told so


class RelayedPair:
    """One pair of sockets. `done` has a result once both are closed."""

    def __init__(self, relay: SpliceRelay, a: socket.socket, b: socket.socket) -> None:
        self._relay = relay
        self.sockets = (a, b)
        self.numbers = (a.fileno(), b.fileno())
        self.directions = (_Direction(a, b), _Direction(b, a))
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def abort(self) -> None:
        """Ends both connections by resets. Idempotent; `done` follows."""
        self._relay.command(self, "abort")


class SpliceRelay:
    """The thread. All its sockets are its own until their `done`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._commands: deque[tuple[RelayedPair | None, str]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._pairs: dict[int, RelayedPair] = {}
        self._interest: dict[int, int] = {}
        self._pipes: list[_Pipe] = []
        self._thread = threading.Thread(target=self._run, name="splice", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and all that it carries."""
        self.command(None, "stop")
        self._thread.join()
        self._poll.close()
        os.close(self._wake)

    def relay(self, a: socket.socket, b: socket.socket) -> RelayedPair:
        """Carries bytes both ways until both sides have ended, or one broke; takes both sockets over."""
        pair = RelayedPair(self, a, b)
        self.command(pair, "add")
        return pair

    def command(self, pair: RelayedPair | None, what: str) -> None:
        """Has the thread do something."""
        self._commands.append((pair, what))
        os.eventfd_write(self._wake, 1)

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            for number, _ in self._poll.poll():
                if number != self._wake:
                    if (pair := self._pairs.get(number)) is not None:
                        self._advance(pair)
                    continue
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                while self._commands:
                    pair, what = self._commands.popleft()
                    if pair is None:
                        self._end_all()
                        return
                    if what == "add":
                        self._add(pair)
                    elif pair.numbers[0] in self._pairs and self._pairs[pair.numbers[0]] is pair:
                        self._finish(pair, reset)

    def _end_all(self) -> None:
        for pair in set(self._pairs.values()):
            self._finish(pair, reset)
        for pipe in self._pipes:
            pipe.close()

    def _add(self, pair: RelayedPair) -> None:
        for number in pair.numbers:
            self._pairs[number] = pair
            self._interest[number] = 0
        self._advance(pair)

    def _advance(self, pair: RelayedPair) -> None:
        try:
            for direction in pair.directions:
                if not direction.done:
                    self._move(direction)
            if not all(direction.done for direction in pair.directions):
                self._watch(pair)
                return
        except OSError:  # the pair's own, or no descriptors, pipe buffers or epoll watches are left: others go on
            self._finish(pair, reset)
            return
        self._finish(pair, socket.socket.close)

    def _move(self, direction: _Direction) -> None:
        """Moves what there is. Leaves a pipe with the direction only if the target does not take all."""
        source, target = direction.source.fileno(), direction.target.fileno()
        for _ in range(_TURNS):
            pipe = direction.pipe or self._take_pipe()
            direction.pipe = pipe
            if not direction.ended and pipe.buffered == 0:
                count = _splice(source, pipe.write, pipe.size)
                if count == 0:
                    direction.ended = True
                elif count is None:
                    break
                else:
                    pipe.buffered = count
            if pipe.buffered:
                count = _splice(pipe.read, target, pipe.buffered)
                if count is None:
                    return
                pipe.buffered -= count
                if pipe.buffered:
                    return
            if direction.ended:
                with contextlib.suppress(OSError):  # it may have ended the connection already
                    direction.target.shutdown(socket.SHUT_WR)
                direction.done = True
                break
        self._release_pipe(direction)

    def _take_pipe(self) -> _Pipe:
        return self._pipes.pop() if self._pipes else _Pipe()

    def _release_pipe(self, direction: _Direction) -> None:
        pipe, direction.pipe = direction.pipe, None
        if pipe is None:
            return
        if pipe.buffered == 0 and len(self._pipes) < _MAX_IDLE_PIPES and pipe.size >= _DEFAULT_PIPE_BYTES:
            self._pipes.append(pipe)
        else:
            pipe.close()

    def _watch(self, pair: RelayedPair) -> None:
        """Waits for what would let each direction go on, and for nothing else, or the poll would spin."""
        wanted = dict.fromkeys(pair.numbers, 0)
        for direction in pair.directions:
            if direction.pipe is not None:
                wanted[direction.target.fileno()] |= select.EPOLLOUT
            elif not direction.ended:
                wanted[direction.source.fileno()] |= select.EPOLLIN
        for number, events in wanted.items():
            before = self._interest[number]
            if before == events:
                continue
            if before == 0:
                self._poll.register(number, events)
            elif events:
                self._poll.modify(number, events)
            else:  # what has ended both ways would be reported for as long as it is registered
                self._poll.unregister(number)
            self._interest[number] = events  # last: `_finish` unregisters what is registered

    def _finish(self, pair: RelayedPair, close: Callable[[socket.socket], None]) -> None:
        for number in pair.numbers:
            if self._interest.pop(number):
                self._poll.unregister(number)
            del self._pairs[number]
        for direction in pair.directions:
            if direction.pipe is not None and direction.pipe.buffered:
                direction.pipe.close()
                direction.pipe = None
            self._release_pipe(direction)
        for sock in pair.sockets:
            close(sock)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(_set_done, pair.done)


def _splice(source: int, target: int, count: int) -> int | None:
    """Returns how many bytes went over, 0 at the end, None if it would block. :raises OSError: the connection broke."""
    try:
        return os.splice(source, target, count, flags=_FLAGS)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.EINTR:
            return None
        raise


def _set_done(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)

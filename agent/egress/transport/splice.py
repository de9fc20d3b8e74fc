"""Relay between pairs of connected sockets by splice(2), without copies to user space, in one thread for all pairs.

A pair has a pipe only while bytes are in it. An idle pair needs no more than its two sockets, so the kernel's limit of
pipe memory per user (pipe-user-pages-soft) suffices for any number of connections.
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
_TURNS = 4  # splices of one direction before other pairs are served
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_DEFAULT_PIPE_BYTES = 64 << 10


class _Pipe:
    """A pipe; `buffered` is the number of bytes in it."""

    __slots__ = ("buffered", "read", "size", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.buffered = 0
        try:
            self.size = fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # over the user's limit: keep the default size
            self.size = fcntl.fcntl(self.write, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


class _Direction:
    """One direction of a pair."""

    __slots__ = ("done", "ended", "pipe", "source", "target")

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.pipe: _Pipe | None = None
        self.ended = False  # end of stream read from the source
        self.done = False  # and passed on to the target


class RelayedPair:
    """A pair of sockets that is relayed both ways. `done` gets its result once both are closed."""

    def __init__(self, relay: SpliceRelay, a: socket.socket, b: socket.socket) -> None:
        self._relay = relay
        self.sockets = (a, b)
        self.numbers = (a.fileno(), b.fileno())
        self.directions = (_Direction(a, b), _Direction(b, a))
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def abort(self) -> None:
        """Reset both connections in the relay's thread; await `done` for the end. Idempotent."""
        self._relay.command(self, "abort")


class SpliceRelay:
    """Thread that relays all pairs. It owns their sockets from `relay` until `RelayedPair.done`."""

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
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Reset all pairs and end the thread."""
        self.command(None, "stop")
        self._thread.join()
        self._poll.close()
        os.close(self._wake)

    def relay(self, a: socket.socket, b: socket.socket) -> RelayedPair:
        """Relay between two sockets until both sides have ended, or one broke. The relay owns and closes both."""
        pair = RelayedPair(self, a, b)
        self.command(pair, "add")
        return pair

    def command(self, pair: RelayedPair | None, what: str) -> None:
        """Queue a command for the thread: "add" or "abort" a pair, or "stop" without one."""
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
        except OSError:  # it broke, or descriptors, pipe memory or epoll watches are used up
            self._finish(pair, reset)
            return
        self._finish(pair, socket.socket.close)

    def _move(self, direction: _Direction) -> None:
        """Move the available bytes. The direction keeps a pipe only if the target did not accept all of them."""
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
                with contextlib.suppress(OSError):  # the target may have closed the connection already
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
        """Register for the event that each direction waits for, and no other, or epoll would return at once."""
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
            else:  # a socket that ended both ways is reported as long as it is registered
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
        with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no waiter
            self._loop.call_soon_threadsafe(_set_done, pair.done)


def _splice(source: int, target: int, count: int) -> int | None:
    """Return the number of bytes moved, 0 at the end of the stream, None if it would block.

    :raises OSError: the connection broke.
    """
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

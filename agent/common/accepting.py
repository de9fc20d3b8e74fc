"""Accept loop of a listening socket that survives running out of descriptors or memory (accept(2): EMFILE, ENFILE,
ENOBUFS, ENOMEM).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

_BATCH = 64  # connections accepted before other events of the loop are served
_PAUSE_S = 0.1


class Acceptor:
    """Accepts connections and passes each, non-blocking, to `take`, which owns it from then on.

    The listener stays its caller's: close it after `close`. A reader callback, not a task: there is no loop that an
    exception could end.

    :param on_failure: called with the first of consecutive errors of accept.
    """

    def __init__(
        self,
        listener: socket.socket,
        take: Callable[[socket.socket], None],
        on_failure: Callable[[OSError], None],
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._fd = listener.fileno()
        self._take = take
        self._on_failure = on_failure
        self._failing = False
        self._pause: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._resume()

    def close(self) -> None:
        """Stop accepting. Idempotent."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._fd = -1

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._fd, self._accept)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # the client gave up first
                continue
            except OSError as error:
                # The listener stays readable, so the loop would spin until descriptors are free again.
                self._loop.remove_reader(self._fd)
                self._pause = self._loop.call_later(_PAUSE_S, self._resume)
                if not self._failing:
                    self._failing = True
                    self._on_failure(error)
                return
            self._failing = False
            self._hand_over(client)
            if self._fd < 0:  # `take` has closed this acceptor
                return

    def _hand_over(self, client: socket.socket) -> None:
        client.setblocking(False)
        try:
            self._take(client)
        except Exception as error:  # noqa: BLE001  one connection must not cost the others of its batch
            client.close()
            self._loop.call_exception_handler({"message": "taking a connection failed", "exception": error})

"""Connecting to servers on behalf of guests: only to addresses that the policy allows, and never to this host."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from itertools import zip_longest

from agent.common.policy.addresses import Address
from agent.common.policy.policy import Policy
from agent.common.policy.reasons import Reason
from agent.egress.transport.sockets import no_delay, wait_writable

_STAGGER_S = 0.25  # RFC 8305, 5
_MAX_ATTEMPTS = 8
DISCARD_PORT = 9


class DialError(Exception):
    """No connection. `reason` is the policy's denial, None if connecting was allowed and failed."""

    def __init__(self, text: str, reason: Reason | None = None) -> None:
        super().__init__(text)
        self.reason = reason


def is_own(address: Address) -> bool:
    """Return whether the address is one of this host's: the kernel then selects the same address as source."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(address), DISCARD_PORT))  # sends nothing
            return bool(sock.getsockname()[0] == str(address))
        except OSError:
            return False


async def dial(policy: Policy, addresses: Sequence[Address], port: int, timeout_s: float = 10.0) -> socket.socket:
    """Return a connected, non-blocking socket to the first address that answers.

    :raises DialError: the policy forbids all addresses, or none answered within `timeout_s`.
    """
    reason = None
    allowed = []
    for address in addresses:
        why = policy.check_dialled(address, port) or (Reason.BLOCKED_ADDRESS if is_own(address) else None)
        if why is None:
            allowed.append(address)
        reason = reason or why
    if not allowed:
        raise DialError("the policy allows none of its addresses", reason or Reason.BLOCKED_ADDRESS)
    try:
        async with asyncio.timeout(timeout_s):
            if len(allowed) == 1:
                return await _connect(allowed[0], port)
            return await _race(_interleaved(allowed)[:_MAX_ATTEMPTS], port)
    except TimeoutError:
        raise DialError(f"no answer within {timeout_s:g} s") from None
    except OSError as error:
        raise DialError((error.strerror or str(error)).lower()) from error


def _interleaved(addresses: Sequence[Address]) -> list[Address]:
    """Return the addresses with alternating families (RFC 8305, 4), otherwise in the given order."""
    first = [address for address in addresses if address.version == addresses[0].version]
    second = [address for address in addresses if address.version != addresses[0].version]
    return [address for pair in zip_longest(first, second) for address in pair if address is not None]


async def _connect(address: Address, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        no_delay(sock)
        number = sock.connect_ex((str(address), port))
        if number == errno.EINPROGRESS:
            await wait_writable(sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock


async def _race(addresses: Sequence[Address], port: int) -> socket.socket:
    """Start one attempt every 250 ms, or as soon as one fails; return the first socket that connects (RFC 8305, 5)."""
    attempts: list[asyncio.Task[socket.socket]] = []
    pending: set[asyncio.Task[socket.socket]] = set()
    error: BaseException = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
    waiting = list(addresses)
    try:
        while waiting or pending:
            if waiting:
                attempts.append(asyncio.create_task(_connect(waiting.pop(0), port)))
                pending.add(attempts[-1])
            done, pending = await asyncio.wait(
                pending, timeout=_STAGGER_S if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if task.exception() is None:
                    attempts.remove(task)
                    return task.result()
                error = task.exception() or error
    finally:
        for task in attempts:
            task.cancel()
        for result in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(result, socket.socket):
                result.close()
    raise error

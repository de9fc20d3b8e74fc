"""Call the C library, for system calls without a function in Python's standard library."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise the error of the system call that has just returned `result`, if it failed.

    :param what: the call and its object, for the message.
    :raises OSError: `result` is not 0; its number is the calling thread's errno.
    """
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def prctl(option: int, value: int | bytes) -> None:
    """Change an attribute of the process or thread (prctl(2)).

    :raises OSError: the kernel refused.
    """
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    check(libc.prctl(option, argument, 0, 0, 0), f"prctl({option})")

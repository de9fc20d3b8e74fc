"""Runs a program for which KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE succeed without doing anything.

Cloud Hypervisor v53 asks every vCPU for the state of a nested guest, even on a KVM that has none to give (no
KVM_CAP_NESTED_STATE), and then cannot snapshot. A seccomp filter (seccomp(2)) answers in such a KVM's place:

    python no_nested_state.py PROGRAM [ARGUMENT...]
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys

_KVM_CHECK_EXTENSION, _KVM_CAP_NESTED_STATE = 0xAE03, 157
_GET, _SET = 0xC080AEBE, 0x4080AEBF  # linux/kvm.h
_NR_IOCTL = 16
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ERRNO_0, _ALLOW = 0x00050000, 0x7FFF0000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2


def is_needed() -> bool:
    """Whether this host's KVM has no nested state."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(fd, _KVM_CHECK_EXTENSION, _KVM_CAP_NESTED_STATE) <= 0
    finally:
        os.close(fd)


def _install() -> None:
    program = [
        (_LOAD, 0, 0, 0),  # the number of the system call (struct seccomp_data)
        (_EQUAL, 0, 4, _NR_IOCTL),
        (_LOAD, 0, 0, 24),  # the low half of its second argument
        (_EQUAL, 1, 0, _GET),
        (_EQUAL, 0, 1, _SET),
        (_RETURN, 0, 0, _ERRNO_0),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    descriptor = ctypes.create_string_buffer(struct.pack("H6xQ", len(program), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, descriptor, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    _install()
    os.execv(sys.argv[1], sys.argv[1:])

"""A guest without an operating system: a PVH kernel of some hundred bytes, for VMMs on hosts where Linux cannot boot.

Entered in 32-bit protected mode without paging (Xen's PVH boot ABI), it fills a few pages, says so on the serial port,
and counts in memory for ever, reading those pages in every round.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

LOAD_ADDRESS = 0x100000
COUNTER_ADDRESS = 0x300000
FILLED_ADDRESS = 0x400000
FILLED_PAGES = 64
FILLED_BYTE = 0xA5
GREETING = b"BARE GUEST\n"
_PAGE = 4096
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_COM1, _I8042 = 0x3F8, 0x64


def _out(port: int, data: bytes) -> bytes:
    """mov dx, port; then for each byte: mov al, byte; out dx, al."""
    return b"\x66\xba" + struct.pack("<H", port) + b"".join(b"\xb0" + bytes([byte]) + b"\xee" for byte in data)


@dataclass(frozen=True)
class BareGuest:
    """The program: `resets` instead of counting, `chatters` on the console in each round."""

    resets: bool = False
    chatters: bool = False

    def code(self) -> bytes:
        code = b"\xfc"  # cld
        code += b"\xbf" + struct.pack("<I", FILLED_ADDRESS)  # mov edi, FILLED_ADDRESS
        code += b"\xb9" + struct.pack("<I", FILLED_PAGES * _PAGE // 4)  # mov ecx, words
        code += b"\xb8" + bytes([FILLED_BYTE]) * 4 + b"\xf3\xab"  # mov eax, pattern; rep stosd
        code += _out(_COM1, GREETING)
        if self.resets:
            code += _out(_I8042, b"\xfe")  # pulse the CPU's reset line
        start = len(code)
        code += b"\xbe" + struct.pack("<I", FILLED_ADDRESS)  # mov esi, FILLED_ADDRESS
        code += b"\xb9" + struct.pack("<I", FILLED_PAGES)  # mov ecx, pages
        code += b"\x8b\x06\x81\xc6" + struct.pack("<I", _PAGE)  # read: mov eax, [esi]; add esi, page
        code += b"\x49\x75" + struct.pack("b", -11)  # dec ecx; jnz read
        code += b"\xff\x05" + struct.pack("<I", COUNTER_ADDRESS)  # inc dword [counter]
        if self.chatters:
            code += _out(_COM1, b"." * 15 + b"\n")
        return code + b"\xe9" + struct.pack("<i", start - (len(code) + 5))  # jmp start

    def elf(self) -> bytes:
        """Returns an ELF64 file with the note that PVH loaders look for."""
        code = self.code()
        note = struct.pack("<III4sI", 4, 4, _XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", LOAD_ADDRESS)
        header_size, entry_size = 64, 56
        note_at = header_size + 2 * entry_size
        ident = b"\x7fELF\x02\x01\x01" + bytes(9)
        header = ident + struct.pack(
            "<HHIQQQIHHHHHH", 2, 62, 1, LOAD_ADDRESS, header_size, 0, 0, header_size, entry_size, 2, 0, 0, 0
        )
        load = struct.pack("<IIQQQQQQ", 1, 5, _PAGE, LOAD_ADDRESS, LOAD_ADDRESS, len(code), len(code), _PAGE)
        notes = struct.pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
        return (header + load + notes + note).ljust(_PAGE, b"\0") + code

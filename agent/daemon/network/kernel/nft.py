"""nftables by libnftables(3), in this process, since starting nft(8) costs a process for each change.

A context talks to the network namespace of the thread that made it.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Mapping

from agent.common.errors import HostError

_LIBRARY = "libnftables.so.1"
_OUTPUT_JSON = 1 << 4  # NFT_CTX_OUTPUT_JSON of nftables/libnftables.h


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise HostError(
            f"cannot load {_LIBRARY}: {error}; install the package libnftables1", reason="NFTABLES_UNAVAILABLE"
        ) from None
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    for name in ("free", "buffer_output", "buffer_error", "get_output_buffer", "get_error_buffer"):
        getattr(library, f"nft_ctx_{name}").argtypes = [ctypes.c_void_p]
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return library


def run(commands: str, *, as_json: bool = False) -> str:
    """Run commands as one transaction in the calling thread's namespace; return their output.

    :raises HostError: the kernel or the library refused; nothing was changed.
    """
    library = _library()
    context = library.nft_ctx_new(0)
    if not context:
        raise HostError("libnftables gave no context", reason="NFTABLES_FAILED")
    try:
        if as_json:
            library.nft_ctx_output_set_flags(context, _OUTPUT_JSON)
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        if library.nft_run_cmd_from_buffer(context, commands.encode()) != 0:
            text = (library.nft_ctx_get_error_buffer(context) or b"").decode(errors="replace").strip()
            raise HostError(f"nftables refused the rules: {text[:2000]}", reason="NFTABLES_FAILED")
        return (library.nft_ctx_get_output_buffer(context) or b"").decode()
    finally:
        library.nft_ctx_free(context)


def take_counters(*tables: str) -> Mapping[str, int]:
    """Return the packets of all named counters in these tables, such as "netdev guard", and reset them to zero.

    :raises HostError: the kernel refused.
    """
    counts: dict[str, int] = {}
    for table in tables:
        answer = json.loads(run(f"reset counters table {table}", as_json=True) or "{}")
        for entry in answer.get("nftables", ()):
            counter = entry.get("counter")
            if counter is not None:
                counts[counter["name"]] = counts.get(counter["name"], 0) + int(counter["packets"])
    return counts

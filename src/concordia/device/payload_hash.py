"""The payload hash where bytes lie, without the interpreter's lock, floor 2.

Owns: room for the digests of one thread. Promises: the value is that of the xxhash library (held to
it by tests); other threads of the process run meanwhile. Called by whoever reads many records at
once; who reads a few takes journal/record.payload_hash.
"""

from __future__ import annotations

import ctypes
from functools import cache

from concordia import abi
from concordia.device.compiler import HostCompiler
from concordia.device.host import HostLibrary


class PayloadHash:
    """One thread's: `of` uses the same room for every payload."""

    def __init__(self) -> None:
        self._library = _library()
        self._digests = ctypes.create_string_buffer(abi.ROOT_BYTES_MIN)
        self._found = (ctypes.c_uint64 * 2)()

    def of(self, address: int, size: int) -> int:
        """XXH3-128 per leaf and over the digests of the leaves."""
        needed = 16 * -(-size // abi.LEAF_BYTES) + abi.ROOT_BYTES_MIN
        if len(self._digests) < needed:
            self._digests = ctypes.create_string_buffer(needed)
        self._library.hash_payload(
            address, size, ctypes.addressof(self._digests), ctypes.addressof(self._found)
        )
        low, high = self._found
        return int(high << 64 | low)


@cache
def _library() -> HostLibrary:
    return HostLibrary(HostCompiler())

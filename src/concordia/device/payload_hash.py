"""The payload hash where bytes lie, without the interpreter's lock, floor 2.

Owns: room for the digests of one thread. Promises: the value is that of the xxhash library (held to
it by tests); other threads of the process run meanwhile, and `first_other` needs the lock for none
of its payloads. Called by whoever reads many records at once; who reads a few takes
journal/record.payload_hash.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

from concordia import abi
from concordia.device.compiler import HostCompiler
from concordia.device.host import HostLibrary

_PROMISED: Final = struct.Struct("<QQ16s")


class Promised(NamedTuple):
    """Bytes in this process, and the hash that they were committed with."""

    address: int
    size: int
    payload_hash: int


class PayloadHash:
    """One thread's: every payload uses the same room."""

    def __init__(self) -> None:
        self._library = _library()
        self._digests = ctypes.create_string_buffer(abi.ROOT_BYTES_MIN)
        self._found = (ctypes.c_uint64 * 2)()

    def of(self, address: int, size: int) -> int:
        """XXH3-128 per leaf and over the digests of the leaves."""
        self._make_room(size)
        self._library.hash_payload(
            address, size, ctypes.addressof(self._digests), ctypes.addressof(self._found)
        )
        return self._last()

    def first_other(self, promised: Sequence[Promised]) -> tuple[int, int] | None:
        """The first of these that is not what was promised, by its index, and the hash that it has;
        None when all are.
        """
        if not promised:
            return None
        self._make_room(max(one.size for one in promised))
        packed = b"".join(
            _PROMISED.pack(one.address, one.size, one.payload_hash.to_bytes(16, "little"))
            for one in promised
        )
        good = self._library.verify_payloads(
            packed, len(promised), ctypes.addressof(self._digests), ctypes.addressof(self._found)
        )
        return None if good == len(promised) else (int(good), self._last())

    def _make_room(self, size: int) -> None:
        needed = 16 * -(-size // abi.LEAF_BYTES) + abi.ROOT_BYTES_MIN
        if len(self._digests) < needed:
            self._digests = ctypes.create_string_buffer(needed)

    def _last(self) -> int:
        low, high = self._found
        return int(high << 64 | low)


@cache
def _library() -> HostLibrary:
    return HostLibrary(HostCompiler())

"""The string tables of ELF files, floor 3.

Owns: `NameTable`. Promises: nothing is read beyond the table; names may share their ends, so all of
them may be far more than the table holds: their sum is bounded. Called by elf.
"""

from __future__ import annotations

from concordia import config
from concordia.errors import ImageRefused


class NameTable:
    """Names by the byte at which they begin."""

    def __init__(self, data: bytes, offset: int, size: int) -> None:
        self._data, self._begin, self._end = data, offset, offset + size
        self._found: dict[int, str] = {}
        self._left = config.CUBIN_NAMES_BYTES_MAX

    def __getitem__(self, at: int) -> str:
        found = self._found.get(at)
        if found is None:
            found = self._found[at] = self._read(at)
        return found

    def _read(self, at: int) -> str:
        begin = self._begin + at
        end = self._data.find(b"\0", begin, min(self._end, begin + config.KERNEL_NAME_BYTES_MAX))
        if begin >= self._end or end < 0:
            raise ImageRefused(f"a name at {at} of {self._end - self._begin} bytes of names")
        self._left -= end - begin
        if self._left < 0:
            raise ImageRefused(f"names of more than {config.CUBIN_NAMES_BYTES_MAX} bytes")
        return self._data[begin:end].decode(errors="replace")

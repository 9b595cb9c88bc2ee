"""GPU images inside another file: a library, an object, a program, floor 3.

Owns: finding fatbins in a file that is none. Promises: looks for the containers' own headers, so
section names and formats of files do not matter; what lies within one is not found again; bounded
in number. Called by offline. It knows no host file format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.fatbin import CONTAINER_MAGIC, read_entries
from concordia.instrument.image import Image, read_image

_MAGIC: Final = CONTAINER_MAGIC.to_bytes(4, "little")
_HEADER_BYTES: Final = 16
_ALIGNMENT: Final = 8


@dataclass(frozen=True, slots=True)
class FoundImage:
    """A fatbin, and where it begins in its file."""

    offset: int
    image: Image


def images_in(data: bytes) -> tuple[FoundImage, ...]:
    """Every whole fatbin, in the order of the file. Raises ImageRefused for more than the bound."""
    found: list[FoundImage] = []
    for one in _search(data):
        if len(found) == config.LIBRARY_IMAGES_MAX:
            raise ImageRefused(f"more than {config.LIBRARY_IMAGES_MAX} images in one file")
        found.append(one)
    return tuple(found)


def _search(data: bytes) -> Iterator[FoundImage]:
    at, view = data.find(_MAGIC), memoryview(data)
    while at >= 0:
        end = at + _HEADER_BYTES + int.from_bytes(data[at + 8 : at + 16], "little")
        following = at + len(_MAGIC)
        if at % _ALIGNMENT == 0 and end <= len(data):
            try:
                read_entries(view[at:end])  # before anything is copied
                yield FoundImage(at, read_image(data[at:end]))
                following = end
            except ImageRefused:
                pass  # these bytes are in a program for another reason: code that looks for them
        at = data.find(_MAGIC, following)

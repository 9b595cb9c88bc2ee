"""The payload of a KIND_CHECKPOINT record: what belongs to a complete step, floor 3.

Owns: that layout (JSON). Promises: what `parse` returns has every field in its bounds; anything
else raises Corruption. Called by whoever writes a checkpoint and by the replay index. It does not
say where the pages lie: the index knows, for each page its newest record below the marker.

    {"regions": {name: {"region", "pages", "page_bytes", "digest"}}, "state_bytes"}       the step
    is the record's own
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from concordia import abi
from concordia.errors import Corruption
from concordia.journal.record import Record, root_hash

_U32 = 1 << 32


@dataclass(frozen=True, slots=True)
class RegionMark:
    """One page region of a checkpoint: its number in the records, its pages and their size, and the
    table_digest of their hashes, which says of each page which version belongs to the step.
    """

    region: int
    pages: int
    page_bytes: int
    digest: int


@dataclass(frozen=True, slots=True)
class Marker:
    """Every page of these regions and so many bytes of host state belong to the step."""

    regions: Mapping[str, RegionMark]
    state_bytes: int

    def pack(self) -> bytes:
        """The payload."""
        regions = {name: asdict(mark) for name, mark in self.regions.items()}
        return json.dumps({"regions": regions, "state_bytes": self.state_bytes}).encode()

    @staticmethod
    def parse(payload: bytes) -> Marker:
        """The inverse of pack; raises Corruption."""
        try:
            value = json.loads(payload)
            regions = {
                str(name): RegionMark(
                    _number(mark["region"], 1, _U32),
                    _number(mark["pages"], 1, _U32),
                    _number(mark["page_bytes"], abi.LEAF_BYTES, 1 << 40, unit=abi.LEAF_BYTES),
                    _number(mark["digest"], 0, 1 << 128),
                )
                for name, mark in value["regions"].items()
            }
            return Marker(regions, _number(value["state_bytes"], 0, _U32))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corruption(f"a checkpoint marker cannot be read: {error!r}") from error


def marker_of(record: Record, view: memoryview) -> Marker:
    """The marker in this record."""
    at = record.payload_offset
    return Marker.parse(bytes(view[at : at + record.payload_bytes]))


def table_digest(hashes: bytes) -> int:
    """128 bits that name these hashes of all pages, 16 bytes each, in the order of the pages."""
    return root_hash(hashes)


def _number(value: Any, least: int, below: int, *, unit: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < below:
        raise ValueError(f"{value!r} is no integer in [{least}, {below})")
    if value % unit:
        raise ValueError(f"{value} is no multiple of {unit}")
    return value

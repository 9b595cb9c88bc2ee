"""The way back for page regions: a checkpoint's pages and host state, verified, in their place.

Owns: reading the pieces of a Checkpoint out of the pool and writing them to registered regions.
Promises: every record's bytes are copied first and the copy is hashed with the xxhash library, so
what is written is what was verified, whatever happens to the pool meanwhile; no region is touched
before all of the checkpoint is verified; a region is given back only when a scan on its own device
finds no page that differs. What does not fit is LayoutMismatch or Corruption, and nothing is
written. Called by integrations, while nobody else uses the regions. Needs as much host memory as
the regions have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import PageRegion
from concordia.errors import Corruption, LayoutMismatch, RecoveryError
from concordia.journal import record
from concordia.journal.checkpoints import Checkpoint
from concordia.journal.coverage import Piece
from concordia.journal.marker import RegionMark, table_digest

Bytes: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pages:
    """All pages of a region and their hashes, as kernels/page_table.h has them."""

    data: Bytes  # [page, byte]
    hashes: Bytes  # [page, 16]


def read_checkpoint(
    checkpoint: Checkpoint, pool: memoryview, *, rank: int = 0
) -> tuple[dict[str, Pages], bytes]:
    """Pages by name of the region, and the host state, all verified; raises Corruption."""
    if not checkpoint.incarnation:
        raise RecoveryError("the journal has no complete checkpoint of this name")
    pieces = checkpoint.pieces.get(rank, [])
    regions = {mark.region: name for name, mark in checkpoint.regions.items()}
    found = {
        name: _room(name, mark, pieces, len(pool)) for name, mark in checkpoint.regions.items()
    }
    seen = {name: np.zeros(mark.pages, bool) for name, mark in checkpoint.regions.items()}
    state = bytearray()
    for piece in pieces:
        payload, digests = _verified(piece, pool)
        if piece.kind == abi.KIND_STATE and piece.token_start == len(state):
            state += payload
        elif piece.kind == abi.KIND_PAGE and piece.region in regions:
            name = regions[piece.region]
            seen[name][_place(piece, payload, digests, found[name])] = True
        else:
            raise Corruption(f"{_name(piece)} does not belong to step {checkpoint.step}")
    for name, has in seen.items():
        if not has.all():
            raise Corruption(f"page {int(np.argmin(has))} of {name} is in no record")
        if table_digest(found[name].hashes.tobytes()) != checkpoint.regions[name].digest:
            raise Corruption(f"some page of {name} is not as it was at step {checkpoint.step}")
    if len(state) != checkpoint.state_bytes:
        raise Corruption(f"{len(state)} bytes of state, the marker says {checkpoint.state_bytes}")
    return found, bytes(state)


def restore_checkpoint(
    checkpointer: Checkpointer,
    regions: Mapping[str, PageRegion],
    checkpoint: Checkpoint,
    pool: memoryview,
) -> bytes:
    """Write a checkpoint back into regions of the same names and return its host state. A scan of
    them finds nothing afterwards.
    """
    _check_layout(regions, checkpoint)
    found, state = read_checkpoint(checkpoint, pool)
    for name, region in regions.items():
        checkpointer.device.write(region.address, found[name].data.tobytes())
        checkpointer.device.write(region.page_hashes, found[name].hashes.tobytes())
    for name, region in regions.items():
        done = checkpointer.wait(checkpointer.scan_pages(region))
        if not done.is_ok or done.result:
            raise RecoveryError(
                f"region {name} does not hold what was written: status {done.status}, "
                f"{done.result} pages differ"
            )
    return state


def _check_layout(regions: Mapping[str, PageRegion], checkpoint: Checkpoint) -> None:
    if not checkpoint.incarnation:
        return  # said by read_checkpoint
    if regions.keys() != checkpoint.regions.keys():
        raise LayoutMismatch(
            f"the checkpoint has regions {sorted(checkpoint.regions)}, here are {sorted(regions)}"
        )
    layouts = {
        piece.region: piece.layout_hash
        for pieces in checkpoint.pieces.values()
        for piece in pieces
        if piece.kind == abi.KIND_PAGE
    }
    for name, region in regions.items():
        mark = checkpoint.regions[name]
        saved = mark.pages, mark.page_bytes, layouts.get(mark.region)
        if saved != (region.page_count, region.page_bytes, region.layout_hash):
            raise LayoutMismatch(
                f"region {name} was saved as {mark.pages} pages of {mark.page_bytes} bytes, "
                f"layout {saved[2] or 0:x}; here it is {region.page_count} of {region.page_bytes}, "
                f"layout {region.layout_hash:x}"
            )


def _verified(piece: Piece, pool: memoryview) -> tuple[bytes, bytes]:
    """A private copy of a record's payload, which has the committed hash, and its digests."""
    end = piece.pool_offset + piece.payload_bytes
    if min(piece.pool_offset, piece.payload_bytes) < 0 or end > len(pool):
        raise Corruption(f"{_name(piece)} points outside the pool")
    payload = bytes(pool[piece.pool_offset : end])
    digests = record.leaf_digests(payload)
    found = record.root_hash(digests)
    if found != piece.payload_hash:
        raise Corruption(
            f"{_name(piece)}: payload hash {found:032x}, committed {piece.payload_hash:032x}"
        )
    return payload, digests


def _place(piece: Piece, payload: bytes, digests: bytes, target: Pages) -> npt.NDArray[np.uint32]:
    """Put a record's pages and their hashes where they belong; the numbers of the pages."""
    count, page_bytes = piece.token_end, target.data.shape[1]
    if (
        not 0 < count <= abi.LEAF_BYTES // 4
        or len(payload) != abi.LEAF_BYTES + count * page_bytes
        or (numbers := np.frombuffer(payload, "<u4", count)).max() >= len(target.data)
    ):
        raise Corruption(f"{_name(piece)} says {count} pages in {len(payload)} bytes")
    target.data[numbers] = np.frombuffer(payload, np.uint8, offset=abi.LEAF_BYTES).reshape(
        count, page_bytes
    )
    leaves = page_bytes // abi.LEAF_BYTES * 16
    hashes = digests[16:]
    if leaves > 16:  # a page of several leaves has the root over their digests
        roots = [record.root_hash(hashes[i * leaves : (i + 1) * leaves]) for i in range(count)]
        hashes = b"".join(root.to_bytes(16, "little") for root in roots)
    target.hashes[numbers] = np.frombuffer(hashes, np.uint8).reshape(count, 16)
    return numbers


def _room(name: str, mark: RegionMark, pieces: Sequence[Piece], pool_bytes: int) -> Pages:
    """No more of it than the records can fill, whatever the marker says."""
    there = sum(piece.payload_bytes for piece in pieces if piece.region == mark.region)
    if mark.pages * mark.page_bytes > min(there, pool_bytes):
        raise Corruption(
            f"some of {mark.pages} pages of {name}, {mark.page_bytes} bytes each, are in no record"
        )
    shapes = (mark.pages, mark.page_bytes), (mark.pages, 16)
    return Pages(*(np.empty(shape, np.uint8) for shape in shapes))


def _name(piece: Piece) -> str:
    return f"record {piece.sequence} of stream {piece.stream:x} (step {piece.step})"

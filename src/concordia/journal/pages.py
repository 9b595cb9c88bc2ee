"""The payload of a KIND_PAGE record: which pages of an opaque region it has.

Owns: that layout, as kernels/page_scan.cu writes it. Promises: what is returned lies within the
payload; anything else raises Corruption. Called by the replay index. Does not verify hashes:
whoever uses the bytes does.

    payload:  one leaf of page numbers, u32, zero-padded | page | page | ...      the record's
    tokens are [0, number of pages)
"""

from __future__ import annotations

import struct

from concordia import abi
from concordia.errors import Corruption
from concordia.journal.record import Record


def page_numbers(record: Record, view: memoryview) -> list[int]:
    """The pages of this record, in the order of their bytes."""
    count, rest = record.token_end, record.payload_bytes - abi.LEAF_BYTES
    if not 0 < count <= abi.LEAF_BYTES // 4 or rest <= 0 or rest % (count * abi.LEAF_BYTES):
        raise Corruption(
            f"record {record.sequence} says {count} pages in {record.payload_bytes} bytes"
        )
    at = record.payload_offset
    return list(struct.unpack(f"<{count}I", view[at : at + 4 * count]))

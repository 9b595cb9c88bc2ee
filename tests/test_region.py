"""checkpoint/region.py, handler.py: what a region may be, and which code may serve it.

Invariants: elements that overlap or leave their block are no geometry, and geometries that differ have different hashes; a handler that moves
one byte wrongly is refused and named by it, and the one before goes on.
"""

import pytest

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import KvGeometry, Plane
from concordia.device.compiler import HandlerSource
from concordia.device.memory import Buffer
from concordia.errors import HandlerRefused, UsageError
from scratch_stream import ScratchStream

GEOMETRY = KvGeometry(
    2,
    4,
    16,
    16 * 2 * 64,
    1,
    16,
    16,
    2,
    Plane(0, 2048, 64, 2),
    Plane(32, 2048, 64, 2),
    "bf16",
    "any",
)


def test_geometry_is_refused_when_elements_overlap_or_leave_the_block() -> None:
    def changed(**fields: object) -> KvGeometry:
        words = {name: getattr(GEOMETRY, name) for name in KvGeometry.__dataclass_fields__}
        return KvGeometry(**{**words, **fields})

    GEOMETRY.check()
    for wrong in (
        changed(value=GEOMETRY.key),
        changed(value=Plane(34, 2048, 64, 2)),
        changed(key=Plane(-2, 2048, 64, 2)),
        changed(key=Plane(0, 2048, 64, 1)),
        changed(block_bytes=1022),
        changed(layers=0),
        changed(element_bytes=3),
        changed(block_stride=1024),
    ):
        with pytest.raises(UsageError):
            wrong.check()
    assert (
        GEOMETRY.layout_hash()
        == changed(block_count=9).layout_hash()
        == changed(block_stride=4096).layout_hash()
    )
    assert GEOMETRY.layout_hash() != changed(instruction_set="amx").layout_hash()


# Right, but for one byte of long ranges.
WRONG = """#include "journal.h"
#include "kv.h"
HANDLER {
  check_range(call, lane);
  const Range range = range_of(call);
  uint8_t* place = reserve_record(call, lane, range.bytes);
  if (place == nullptr) return;
  move_range<true>(call, lane, range, place);
  grid_sync(call);
  if (lane == 0 && range.tokens > 1) place[70] ^= 1;
  grid_sync(call);
  hash_payload(call, lane, place, range.bytes);
  commit_record(call, lane, {call->task.record_kind, call->task.token_start, call->task.token_end}, range.bytes);
}
"""


def test_append_handler_is_refused_when_it_moves_one_byte_wrongly() -> None:
    stream = ScratchStream()
    memory = [Buffer(4 * GEOMETRY.block_bytes) for _ in range(2)]
    with Checkpointer.open("host", stream.target) as checkpointer:
        region = checkpointer.register_kv(GEOMETRY, [buffer.address for buffer in memory])
        wrong = HandlerSource.of("wrong.cu", GEOMETRY.constants(), text=WRONG)
        with pytest.raises(HandlerRefused, match="byte 70 of"):
            checkpointer.replace_append(region, wrong)
        right = HandlerSource.of(
            "right.cu", GEOMETRY.constants(), text=WRONG.replace("range.tokens > 1", "false")
        )
        operator = checkpointer.replace_append(region, right)
        assert (operator.opcode, operator.digest) != (region.append.opcode, region.append.digest)
        ticket = checkpointer.append_kv(
            region,
            kind=abi.KIND_KV_TAIL,
            key=1,
            incarnation=1,
            token_start=0,
            token_end=3,
            blocks=[1],
            step=1,
        )
        assert checkpointer.wait(ticket).is_ok
    (record,) = stream.records()
    assert record.header["handler_hash"] == operator.digest
    stream.close()

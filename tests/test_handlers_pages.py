"""The page handlers against numpy, bit for bit, on the CPU device, for one lane and for four, in the CPU's shape and in the GPU's.

Invariants: a scan appends just the pages that changed, whichever are named are appended whatever their hash, and pages whose append found no
room stay dirty.
"""

import numpy as np
import pytest

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.device.host import HostDevice
from concordia.device.memory import Buffer
from scratch_stream import ReadRecord, ScratchStream


@pytest.mark.parametrize("page_bytes", [4096, 16384, 131072])
def test_scan_appends_just_the_pages_that_changed(
    shape: tuple[HostDevice, int], page_bytes: int
) -> None:
    pages = 24
    memory = Buffer(pages * page_bytes)
    data = np.frombuffer(memory.view, np.uint8)
    data[:] = np.random.default_rng(1).integers(0, 256, data.size, np.uint8)
    stream = ScratchStream(segments=16)

    def scan(first: int = 0, count: int | None = None) -> int:
        answer = checkpointer.wait(
            checkpointer.scan_pages(region, first=first, count=count, step=3)
        )
        assert answer.is_ok
        return answer.result

    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        region = checkpointer.register_pages(
            memory.address, size=memory.size, page_bytes=page_bytes
        )
        assert scan() == pages
        assert scan() == 0
        data[5 * page_bytes] ^= 1
        data[9 * page_bytes - 1] ^= 128
        data[23 * page_bytes + 77] ^= 4
        assert scan(first=0, count=6) == 1
        assert scan() == 2
        assert scan() == 0
        for first, count in ((pages, 1), (0, pages + 1), (3, 0)):
            assert (
                checkpointer.wait(checkpointer.scan_pages(region, first=first, count=count)).status
                == abi.STATUS_BAD_TASK
            )
    found = [page for record in stream.records() for page in pages_of(record, page_bytes)]
    numbers = [number for number, _ in found]
    assert sorted(numbers[:pages]) == list(range(pages))
    assert [numbers[pages], *sorted(numbers[pages + 1 :])] == [5, 8, 23]
    for number, payload in found[pages:]:
        assert payload == data[number * page_bytes : (number + 1) * page_bytes].tobytes()
    stream.close()


def pages_of(record: ReadRecord, page_bytes: int) -> list[tuple[int, bytes]]:
    """Numbers and bytes of the pages of one record."""
    count = int(record.header["token_end"])
    assert int(record.header["kind"]) == abi.KIND_PAGE
    numbers = np.frombuffer(record.payload[: abi.LEAF_BYTES], "<u4")
    assert not numbers[count:].any()
    assert len(record.payload) == abi.LEAF_BYTES + count * page_bytes
    return [(int(numbers[i]), record.payload[abi.LEAF_BYTES + i * page_bytes :][:page_bytes]) for i in range(count)]


@pytest.mark.parametrize("page_bytes", [4096, 16384])
def test_named_pages_are_appended_whatever_their_hash(shape: tuple[HostDevice, int], page_bytes: int) -> None:
    pages = 40
    memory = Buffer(pages * page_bytes)
    data = np.frombuffer(memory.view, np.uint8)
    data[:] = np.random.default_rng(2).integers(0, 256, data.size, np.uint8)
    stream = ScratchStream(segments=16)
    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        region = checkpointer.register_pages(memory.address, size=memory.size, page_bytes=page_bytes)
        for named in ([7], [3, 39, 0], list(range(5, 37))):
            assert checkpointer.wait(checkpointer.append_pages(region, named)).result == len(named)
        # What was committed is known: a scan (a burst only where there is one) finds just the pages that nobody named.
        assert checkpointer.wait(checkpointer.scan_pages(region, is_burst=True)).result == pages - len({7, 3, 39, 0, *range(5, 37)})
        for wrong in ([pages], [0, 1 << 31], [*range(pages), 0]):
            assert checkpointer.wait(checkpointer.append_pages(region, wrong)).status == abi.STATUS_BAD_TASK
    found = [pages_of(record, page_bytes) for record in stream.records()]
    assert [[number for number, _ in pages] for pages in found[:3]] == [[7], [3, 39, 0], list(range(5, 37))]
    for number, payload in found[1] + found[2]:
        assert payload == data[number * page_bytes : (number + 1) * page_bytes].tobytes()
    stream.close()


def test_dirty_pages_stay_dirty_when_the_journal_is_full(shape: tuple[HostDevice, int]) -> None:
    memory = Buffer(8 * 4096)
    stream = ScratchStream(segments=8, segment_bytes=16384, lend=1)
    with Checkpointer(shape[0], stream.target, lanes=shape[1]) as checkpointer:
        region = checkpointer.register_pages(memory.address, size=memory.size, page_bytes=4096)
        first = checkpointer.wait(checkpointer.scan_pages(region))
        assert (first.status, first.result) == (abi.STATUS_JOURNAL_FULL, 2)
        stream.lend(7)
        second = checkpointer.wait(checkpointer.scan_pages(region))
        assert (second.status, second.result) == (abi.STATUS_OK, 6)
    found = [number for record in stream.records() for number, _ in pages_of(record, 4096)]
    assert sorted(found) == list(range(8))
    stream.close()

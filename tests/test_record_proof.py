"""The self-tests of bytes_append and page_scan, on the CPU device: one lane, four, and in the GPU's shape.

Invariants: our own handlers pass; one that differs from them in a byte, a hash, a name, a page or a check is refused, and the error says in
what; the handler that was installed before stays; no journal but the trial's own is written to.
"""


import numpy as np
import pytest

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.record_proof import proven_bytes, proven_pages
from concordia.device.compiler import KERNELS, HandlerSource
from concordia.device.host import HostDevice
from concordia.device.memory import Buffer
from concordia.errors import HandlerRefused
from scratch_stream import ScratchStream

PAGE_SIZES = [4096, 16384]


def changed(file: str, old: str, new: str, **constants: int) -> HandlerSource:
    """One of our handlers with one thing done differently."""
    text = (KERNELS / file).read_text("utf-8")
    assert old in text, f"{file} has no {old!r} any more"
    return HandlerSource.of(f"changed {file}", constants, text=text.replace(old, new))


def test_our_handlers_pass_when_proven(shape: tuple[HostDevice, int]) -> None:
    device, lanes = shape
    assert proven_bytes(device, lanes=lanes).digest
    assert len({proven_pages(device, size, lanes=lanes).digest for size in (*PAGE_SIZES, 1 << 20)}) == 3


NAMES = "{task->record_kind, task->token_start, task->token_end}"
BYTES = [
    ("swapped names", NAMES, "{task->record_kind, task->token_end, task->token_start}", "is called"),
    ("lost kind", NAMES, "{kKindTokens, task->token_start, task->token_end}", "is called"),
    ("no check", "if (payload == nullptr)", "if (payload == nullptr) payload = reinterpret_cast<const uint8_t*>(task->source);\n  if (payload == nullptr)", "names what is not there"),
    ("too short", "bytes = task->source_bytes", "bytes = task->source_bytes & ~1ull", "no commit word|byte"),
    ("does nothing", "HANDLER {", "HANDLER {\n  if (lane < 64) return;", "answered with record None"),
    ("refuses", "HANDLER {", "HANDLER {\n  if (call->task.source_bytes == 129) return refuse(call, lane, kStatusTooLarge);", "status 3"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "reason"), [case[1:] for case in BYTES], ids=[case[0] for case in BYTES])
def test_bytes_handler_is_refused_when_it_does_one_thing_differently(
    shape: tuple[HostDevice, int], old: str, new: str, reason: str
) -> None:
    device, lanes = shape
    with pytest.raises(HandlerRefused, match=reason):
        proven_bytes(device, lanes=lanes, source=changed("bytes_append.cu", old, new))


def test_handler_is_refused_when_it_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice()
    spin = "HANDLER {\n  const uint64_t since = now_ns();\n  while (now_ns() - since < 500000000) yield_lane();"
    with monkeypatch.context() as patched:
        patched.setattr(config, "WAIT_TASK_S", 0.05)
        patched.setattr(config, "WAIT_PARK_S", 0.05)
        with pytest.raises(HandlerRefused, match=r"bytes_append: no answer within 0\.05 s"):
            proven_bytes(device, lanes=1, source=changed("bytes_append.cu", "HANDLER {", spin))
    device.close()  # once it has ended all the same


LEARN = "  if (lane == 0) call->result += count;"
PAGES = [
    ("misses the last", "const Pages pages = pages_of(region);", "const Pages pages = pages_of(region);\n  Task* late = &call->task;\n  grid_sync(call);\n  if (lane == 0 && !is_named) late->token_end -= 1;\n  grid_sync(call);", "2 pages, expected 3"),
    ("forgets what it appended", LEARN, LEARN + "\n  grid_sync(call);\n  if (lane == 0)\n    for (uint64_t i = 0; i < count; ++i) pages.table[2 * found[i]] ^= 1;", "3 pages, expected 1|3 pages, where none has changed"),
    ("counts wrongly", "call->result += count;", "call->result += count + 1;", "4 pages, expected 3"),
    ("takes any page", "if (page >= page_count) is_bad = true;", "if (page > page_count) is_bad = true;", "names what is not there"),
    ("takes any range", "task->token_end <= region->block_count", "task->token_end <= region->block_count + 1", "names what is not there"),
    ("one byte", "const RecordNames names = {kKindPage, 0, count};", "const RecordNames names = {kKindPage, 0, count};\n  if (lane == 0 && count == 2) *const_cast<uint8_t*>(pages.base_ptr + found[1] * kPageBytes + 9) ^= 1;\n  grid_sync(call);", "byte"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "reason"), [case[1:] for case in PAGES], ids=[case[0] for case in PAGES])
@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_page_handler_is_refused_when_it_does_one_thing_differently(
    shape: tuple[HostDevice, int], page_bytes: int, old: str, new: str, reason: str
) -> None:
    device, lanes = shape
    source = changed("page_scan.cu", old, new, PAGE_BYTES=page_bytes)
    with pytest.raises(HandlerRefused, match=reason):
        proven_pages(device, page_bytes, lanes=lanes, source=source)


def test_old_scan_stays_when_the_new_one_is_refused_and_goes_when_it_is_right() -> None:
    memory = Buffer(4 * 4096)
    np.frombuffer(memory.view, np.uint8)[:] = 7
    stream = ScratchStream()
    with Checkpointer.open("host", stream.target) as checkpointer:
        region = checkpointer.register_pages(memory.address, size=memory.size, page_bytes=4096)
        wrong = changed("page_scan.cu", "call->result += count;", "call->result += count + 1;", PAGE_BYTES=4096)
        with pytest.raises(HandlerRefused, match="page_scan: 4 pages"):
            checkpointer.replace_scan(region, wrong)
        first = checkpointer.wait(checkpointer.scan_pages(region, first=0, count=2))
        assert (first.result, first.generation) == (2, region.scan.generation)
        right = changed("page_scan.cu", "call->result += count;", "call->result = call->result + count;", PAGE_BYTES=4096)
        operator = checkpointer.replace_scan(region, right)
        second = checkpointer.wait(checkpointer.scan_pages(region))
        # The new one goes on from the old one's table.
        assert (second.result, second.generation) == (2, operator.generation)
    # The trials wrote to journals of their own.
    assert [int(record.header["handler_hash"]) for record in stream.records()] == [region.scan.digest, operator.digest]
    assert [int(record.header["kind"]) for record in stream.records()] == [abi.KIND_PAGE] * 2
    stream.close()

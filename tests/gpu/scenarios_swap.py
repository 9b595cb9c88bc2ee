"""Scenarios of own operators, self-tests and the swap storm; each runs in a child and answers plain values."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from concordia.checkpoint.record_proof import proven_bytes, proven_pages
from concordia.device.compiler import KERNELS, HandlerSource
from concordia.device.driver import open_device
from concordia.errors import ConcordiaError, DeviceError, HandlerRefused
from concordia.runtime.executor import Runtime
from concordia.runtime.trial import Trial
from concordia.testing.swap_storm import SwapStorm

# Adds up numbers that came along, times the task's word.
SUM = """#include "call.h"
HANDLER {
  const uint64_t* numbers = reinterpret_cast<const uint64_t*>(payload_of(call));
  if (numbers == nullptr) return refuse(call, lane, kStatusOwn + 3);
  uint64_t sum = 0;
  for_each_lane(call, lane, call->task.source_bytes / 8, [&](uint64_t i) { sum += numbers[i]; });
  add_result(call, sum * call->task.arg * FACTOR);
}
"""
HANGS = SUM.replace(
    "HANDLER {", "HANDLER {\n  const uint64_t since = now_ns();\n  while (now_ns() - since < 7000000000ull) pause_lane();\n  grid_sync(call);"
)


def storm(device: str, *, lanes: int, tasks: int, swaps: int, seed: int, within_s: float) -> dict[str, Any]:
    """Swaps under a flood of tasks; the verdict without each swap's time."""
    opened = open_device(device)
    runtime = Runtime(opened, lanes=lanes)
    verdict = SwapStorm(runtime, tasks=tasks, swaps=swaps, seed=seed, within_s=within_s).run()
    runtime.close()
    opened.close()
    return {**dataclasses.asdict(verdict), "swap_ms": max(verdict.swap_ms)}


def _numbers(count: int) -> bytes:
    return np.arange(count, dtype="<u8").tobytes()


def _sums_right(trial: Trial) -> None:
    at = trial.allocate(80, _numbers(10))
    assert trial.read(at, 80) == _numbers(10), "scratch memory keeps its bytes"
    assert trial.compute(arg=2, payload=_numbers(10)).result == 90, "twice the sum of 0 to 9 is 90"


def own_operator(device: str, lanes: int) -> dict[str, Any]:
    """Registered, run, swapped; refused with reasons by the lint and by its self-test, and the old one stays."""
    opened = open_device(device)
    runtime = Runtime(opened, lanes=lanes)
    operator = runtime.register_operator("sum", SUM, constants={"FACTOR": 1}, self_test=_sums_right)

    def answer(count: int) -> list[int]:
        done = runtime.wait(runtime.submit(operator.task(arg=3, payload=_numbers(count))))
        return [done.status, done.result]

    answers = [answer(count) for count in (0, 1, 1000, 8000)]
    bare = runtime.wait(runtime.submit(operator.task())).status
    said = []
    for text in (
        SUM.replace("uint64_t sum = 0;", "__shared__ uint64_t sum; sum = 0;"),
        SUM.replace("uint64_t sum = 0;", 'uint64_t sum = 0; asm volatile("bar.sync 4;");'),
        SUM.replace("uint64_t sum = 0;", "uint64_t sum = 1;"),
    ):
        try:
            runtime.register_operator("sum", text, constants={"FACTOR": 1}, self_test=_sums_right)
            said.append("was not refused")
        except ConcordiaError as error:
            said.append(str(error))
    after = answer(10)
    swapped = runtime.register_operator("sum", SUM, constants={"FACTOR": 5})
    last = answer(10)
    runtime.close()
    opened.close()
    return {"answers": answers, "bare": bare, "said": said, "after": after, "last": last, "same_opcode": swapped.opcode == operator.opcode}


def hanging_candidate(device: str) -> dict[str, Any]:
    """A candidate that takes seven seconds in its self-test is refused at the bound; the runtime goes on meanwhile, loads nothing beside
    it, and everything again after it.
    """
    opened = open_device(device)
    runtime = Runtime(opened)
    operator = runtime.register_operator("sum", SUM, constants={"FACTOR": 1})
    started = time.monotonic()
    said = ""
    try:
        runtime.register_operator("sum", HANGS, constants={"FACTOR": 1}, self_test=_sums_right)
    except ConcordiaError as error:
        said = f"{type(error).__name__}: {error}"
    refused_after_s = time.monotonic() - started
    meanwhile = runtime.wait(runtime.submit(operator.task(arg=3, payload=_numbers(10)))).result
    beside = ""
    while True:  # what would wait for the whole GPU is refused until the one that hangs has ended
        try:
            again = runtime.register_operator("sum", SUM, constants={"FACTOR": 2})
            break
        except DeviceError as error:
            beside = str(error)
            assert time.monotonic() - started < 30, beside
            time.sleep(0.1)
    after = runtime.wait(runtime.submit(again.task(arg=3, payload=_numbers(10)))).result
    runtime.close()
    opened.close()
    return {"said": said, "refused_after_s": refused_after_s, "meanwhile": meanwhile, "beside": beside, "after": after}


def record_proofs(device: str, lanes: int) -> dict[str, Any]:
    """Our handlers pass their self-tests on this device, and changed ones do not."""
    opened = open_device(device)
    proven = [proven_bytes(opened, lanes=lanes), *(proven_pages(opened, size, lanes=lanes) for size in (4096, 65536))]
    said = []

    def changed(file: str, old: str, new: str, **constants: int) -> HandlerSource:
        text = (KERNELS / file).read_text("utf-8")
        assert old in text
        return HandlerSource.of(f"changed {file}", constants, text=text.replace(old, new))

    names = "{task->record_kind, task->token_start, task->token_end}"
    count = "call->result += count;"
    for prove in (
        lambda: proven_bytes(opened, lanes=lanes, source=changed("bytes_append.cu", names, names.replace("record_kind", "token_end"))),
        lambda: proven_pages(opened, 4096, lanes=lanes, source=changed("page_scan.cu", count, "call->result += count + 1;", PAGE_BYTES=4096)),
    ):
        try:
            prove()
            said.append("was not refused")
        except HandlerRefused as error:
            said.append(str(error))
    opened.close()
    return {"proven": len({image.digest for image in proven}), "said": said}

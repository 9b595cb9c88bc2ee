"""Loops without an interpreter around them, for clocks of microseconds.

Owns: one compiled file: a producer's loops over the ring, a comparison of pages, a loop of the
driver's copies. Promises: what cannot be measured as meant raises, it never becomes a figure.
Called by the GPU benchmarks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from concordia.device.compiler import HandlerSource, HostCompiler
from concordia.errors import DeviceError
from concordia.runtime.ring import Task, Ticket, pack_task

_SOURCE: Final = r"""
#include "ring.h"
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int time_submit(RingHeader* ring, uint64_t count, uint64_t* ns) {
  Task task = {};
  task.kind = kTaskNoop;
  uint64_t position = 0;
  const uint64_t started = now_ns();
  for (uint64_t i = 0; i < count; ++i)
    if (submit(ring, &task, Arguments{}, &position) > kSubmittedNeedsLaunch) return 1;
  *ns = now_ns() - started;
  return 0;
}

EXPORT int time_round_trip(RingHeader* ring, uint64_t count, uint64_t* ns) {
  Task task = {};
  task.kind = kTaskNoop;
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t position = 0;
    Completion found;
    const uint64_t started = now_ns();
    // When the executor has left, its return would be measured as well.
    if (submit(ring, &task, Arguments{}, &position) != kSubmitted) return 1;
    while (read_completion(ring, position, &found) == kPending)
      if (now_ns() - started > 1000000000u) return 2;
    ns[i] = now_ns() - started;
  }
  return 0;
}

EXPORT int time_task(RingHeader* ring, const Task* task, const uint32_t* ids, uint64_t count,
                     uint64_t* position_ptr, uint64_t* ns) {
  Completion found;
  const uint64_t started = now_ns();
  if (submit(ring, task, Arguments{ids, count}, position_ptr) != kSubmitted) return 1;
  while (read_completion(ring, *position_ptr, &found) == kPending)
    if (now_ns() - started > 1000000000u) return 2;
  *ns = now_ns() - started;
  return 0;
}

// One task after the other until *is_over. A result that is not the one before is a swap: the time
// from the answer before it to its own. Who finds the executor out asks for it only where nobody
// else sends it in: a swap does, and so does the end of a lease.
constexpr uint64_t kAskAfterNs = 100000;

EXPORT int time_changes(RingHeader* ring, const Task* task, const uint64_t* is_over,
                        void (*launch)(), uint64_t most, uint64_t* ns, uint64_t* count_ptr) {
  uint64_t last_ns = 0, last = 0, count = 0, position = 0;
  while (load<kAcquire, kSystem>(is_over) == 0) {
    const uint64_t started = now_ns();
    const int said = submit(ring, task, Arguments{}, &position);
    if (said > kSubmittedNeedsLaunch) return 1;
    bool is_asked = said == kSubmitted;
    Completion found;
    while (read_completion(ring, position, &found) == kPending) {
      const uint64_t waited = now_ns() - started;
      if (waited > 1000000000u) return 2;
      if (is_asked || waited < kAskAfterNs) continue;
      launch();
      is_asked = true;
    }
    const uint64_t now = now_ns();
    if (last_ns != 0 && found.result != last) {
      if (count == most) return 3;
      ns[count++] = now - last_ns;
    }
    last_ns = now;
    last = found.result;
  }
  *count_ptr = count;
  return 0;
}

// Numbers of the pages that differ, from `first` on, and the shadow brought up to date: what a
// host that keeps a shadow does.
EXPORT uint64_t take_dirty(const uint8_t* copy, uint8_t* shadow, uint64_t pages,
                           uint64_t page_bytes, uint32_t first, uint32_t* dirty) {
  uint64_t count = 0;
  for (uint64_t i = 0; i < pages; ++i) {
    const uint64_t at = i * page_bytes;
    if (__builtin_memcmp(copy + at, shadow + at, page_bytes) == 0) continue;
    __builtin_memcpy(shadow + at, copy + at, page_bytes);
    dirty[count++] = first + static_cast<uint32_t>(i);
  }
  return count;
}

// cuMemcpy*_v2 and cuMemcpy*Async_v2: the first ones ignore the stream.
typedef int (*Copy)(uint64_t to, uint64_t from, uint64_t bytes, void* stream);

EXPORT int copy_pieces(Copy copy, const uint64_t* to, const uint64_t* from, uint64_t count,
                       uint64_t bytes, void* stream) {
  for (uint64_t i = 0; i < count; ++i)
    if (const int status = copy(to[i], from[i], bytes, stream)) return status;
  return 0;
}
"""

CHANGES_FAILED: Final = (
    "the ring is full", "no answer within a second", "more results than there were swaps"
)  # fmt: skip

Array = np.ndarray[Any, Any]


class Loops:
    """The compiled loops."""

    def __init__(self) -> None:
        path, _ = HostCompiler().compile(HandlerSource.of("bench.cpp", {}, text=_SOURCE))
        self._library = ctypes.CDLL(str(path))
        self._library.take_dirty.restype = ctypes.c_uint64

    def submit_ns(self, ring: int, count: int) -> int:
        """Nanoseconds of `count` submissions in a row; raises DeviceError when the ring is full."""
        spent = ctypes.c_uint64()
        at = ctypes.c_void_p(ring)
        if self._library.time_submit(at, ctypes.c_uint64(count), ctypes.byref(spent)):
            raise DeviceError(f"the ring had no room for {count} tasks")
        return spent.value

    def round_trip_ns(self, ring: int, count: int) -> list[int] | None:
        """Of each of `count` empty tasks; None when the executor left meanwhile."""
        many = (ctypes.c_uint64 * count)()
        status = self._library.time_round_trip(ctypes.c_void_p(ring), ctypes.c_uint64(count), many)
        if status == 2:
            raise DeviceError("an empty task was not answered within a second")
        return None if status else list(many)

    def task_us(self, ring: int, task: Task) -> tuple[float | None, Ticket]:
        """Microseconds from the submission to the answer; None when the executor had left: then it
        must be launched by the caller.
        """
        filled, ids = pack_task(task)
        position, spent = ctypes.c_uint64(), ctypes.c_uint64()
        count = ctypes.c_uint64(len(task.blocks))
        refs = ctypes.byref(position), ctypes.byref(spent)
        status = self._library.time_task(ctypes.c_void_p(ring), filled, ids, count, *refs)
        if status == 2:
            raise DeviceError(f"{task} was not answered within a second")
        return None if status else spent.value / 1000, Ticket(position.value)

    def changes_ns(
        self, ring: int, task: Task, is_over: ctypes.c_uint64, launch: Callable[[], None], most: int
    ) -> list[int]:
        """Nanoseconds from the last answer of one result to the first of the next, of a thread that
        hands in this task again and again until `is_over`; `launch` sends the executor in.
        """
        filled, _ = pack_task(task)
        found, count = (ctypes.c_uint64 * most)(), ctypes.c_uint64()
        status = self._library.time_changes(
            *(ctypes.c_void_p(ring), filled, ctypes.byref(is_over)),
            *(ctypes.CFUNCTYPE(None)(launch), ctypes.c_uint64(most), found, ctypes.byref(count)),
        )
        if status:
            raise DeviceError(CHANGES_FAILED[status - 1])
        return list(found[: count.value])

    def take_dirty(self, copy: Array, shadow: Array, *, page_bytes: int, first: int) -> list[int]:
        """Pages (numbered from `first`) of two uint8 arrays that differ; the shadow then agrees.
        Outside the interpreter's lock.
        """
        pages = len(copy) // page_bytes
        dirty = np.empty(pages, np.uint32)
        count = self._library.take_dirty(
            ctypes.c_void_p(copy.ctypes.data),
            ctypes.c_void_p(shadow.ctypes.data),
            ctypes.c_uint64(pages),
            ctypes.c_uint64(page_bytes),
            ctypes.c_uint32(first),
            ctypes.c_void_p(dirty.ctypes.data),
        )
        return [int(page) for page in dirty[:count]]

    def copy_pieces(
        self, call: Any, targets: Array, sources: Array, size: int, *, stream: int
    ) -> None:
        """The driver's copy `call` for each pair of addresses (uint64 arrays), `size` bytes each;
        this thread is in the context. Raises DeviceError.
        """
        if targets.shape != sources.shape or {targets.dtype, sources.dtype} != {np.dtype("u8")}:
            raise ValueError("as many targets as sources, as uint64")
        status = self._library.copy_pieces(
            ctypes.cast(call, ctypes.c_void_p),
            ctypes.c_void_p(targets.ctypes.data),
            ctypes.c_void_p(sources.ctypes.data),
            ctypes.c_uint64(len(targets)),
            ctypes.c_uint64(size),
            ctypes.c_void_p(stream),
        )
        if status:
            raise DeviceError(f"a copy of {size} bytes: CUDA error {status}")

"""Handlers of tests that only the executor is asked about, and a task that holds it."""

from __future__ import annotations

import numpy as np

from concordia import abi
from concordia.device.compiler import HandlerSource
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task

# Answers which version ran, and adds one to the word whose address the task names: a lost or repeated task shows there.
VERSIONED = """#include "call.h"
HANDLER {
  if (lane != 0) return;
  if (call->task.arg != 0) *reinterpret_cast<uint64_t*>(call->task.arg) += 1;
  call->result = VERSION;
}
"""
# Runs until the word that the task names is not 0, and never longer than ten seconds.
HOLDING = """#include "call.h"
HANDLER {
  const uint64_t started_ns = now_ns();
  while (load<kAcquire, kSystem>(reinterpret_cast<const uint64_t*>(call->task.arg)) == 0 && now_ns() - started_ns < 10000000000u)
    yield_lane();
}
"""


def source(text: str, **constants: int) -> HandlerSource:
    return HandlerSource.of("test.cu", constants, text=text)


class Gate:
    """A task that holds the executor until it is opened."""

    def __init__(self, runtime: Runtime) -> None:
        self.word = np.zeros(1, np.uint64)
        operator = runtime.install("hold", source(HOLDING))
        self.ticket = runtime.submit(
            Task(opcode=operator.opcode, kind=abi.TASK_COMPUTE, arg=self.word.ctypes.data)
        )

    def open(self) -> None:
        self.word[0] = 1

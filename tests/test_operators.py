"""Own operators: CUDA C++ of a caller's, run by compute tasks on the CPU device, at widths 1 and 4.

Invariants: an operator gets its word and its bytes and answers with status and words; a source that does not compile, pass the lint or its
self-test changes nothing, and the error says why; a self-test works on memory of its own; a name is the caller's alone; code is unloaded
only when nobody can be inside it, whatever Python forgets.
"""

import gc
import inspect
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.handler import bytes_source
from concordia.device import host, loader, nvrtc
from concordia.device.host import HostCode, HostDevice, HostImage
from concordia.errors import CompileError, DeviceError, HandlerRefused, UsageError
from concordia.runtime.executor import Runtime
from concordia.runtime.ring import Task
from concordia.runtime.trial import Trial
from scratch_stream import ScratchStream
from waiting import until

# Adds up 64-bit numbers that came along, times the task's word; without any it answers with a status of its own.
SUM = """#include "call.h"
HANDLER {
  const uint64_t* numbers = reinterpret_cast<const uint64_t*>(payload_of(call));
  if (numbers == nullptr) return refuse(call, lane, kStatusOwn + 3);
  const uint64_t count = call->task.source_bytes / 8;
  uint64_t sum = 0;
  for_each_lane(call, lane, count, [&](uint64_t i) { sum += numbers[i]; });
  add_result(call, sum * call->task.arg * FACTOR);
  if (lane == 0) call->payload_hash[0] = count, call->payload_hash[1] = call->task.arg;
}
"""
# Says in the second of the task's words that it runs, and does so until the first is not 0.
HANGS = """#include "call.h"
HANDLER {
  uint64_t* words = reinterpret_cast<uint64_t*>(call->task.arg);
  store<kRelease, kSystem>(words + 1, 1);
  while (load<kAcquire, kSystem>(words) == 0) yield_lane();
  if (lane == 0) call->result = 99;
}
"""


def numbers(*values: int) -> bytes:
    return np.array(values, "<u8").tobytes()


class CountingCode(HostCode):
    """Loaded code that says when it goes."""

    def __init__(self, image: HostImage, log: list[str]) -> None:
        self._log, self._name = log, f"{image.digest:x}"
        super().__init__(image)
        log.append(f"load {self._name}")

    def close(self) -> None:
        if self._is_open:
            self._log.append(f"unload {self._name}")
        super().close()


class CountingDevice(HostDevice):
    """The CPU device, with a log of what was loaded and unloaded."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def load(self, image: HostImage) -> HostCode:
        return CountingCode(image, self.log)

    def count(self, what: str) -> int:
        return sum(line.startswith(what) for line in self.log)


def test_operator_answers_with_words_and_status_when_given_a_word_and_bytes(runtime: Runtime) -> None:
    operator = runtime.register_operator("sum", SUM, constants={"FACTOR": 1})
    answer = runtime.wait(runtime.submit(operator.task(arg=10, payload=numbers(*range(1000)))))
    assert (answer.status, answer.result, answer.payload_hash) == (abi.STATUS_OK, 4_995_000, 10 << 64 | 1000)
    assert (answer.generation, answer.sequence) == (operator.generation, None)
    empty = runtime.wait(runtime.submit(operator.task(arg=10, payload=b"")))
    assert (empty.status, empty.result) == (abi.STATUS_OK, 0)
    nothing = runtime.wait(runtime.submit(operator.task()))
    assert (nothing.status, nothing.is_ok) == (abi.STATUS_OWN + 3, False)


def test_operator_is_swapped_when_its_name_is_registered_again(runtime: Runtime) -> None:
    first = runtime.register_operator("sum", SUM, constants={"FACTOR": 1})
    second = runtime.register_operator("sum", SUM, constants={"FACTOR": 7})
    assert first.opcode == second.opcode
    assert first.generation < second.generation
    # Whoever still has the first runs the second: the generation is read when the task starts.
    answer = runtime.wait(runtime.submit(first.task(arg=1, payload=numbers(5))))
    assert (answer.result, answer.generation) == (35, second.generation)


def test_operator_never_replaces_one_of_ours_when_it_has_its_name(runtime: Runtime) -> None:
    ours = runtime.install("bytes_append", bytes_source())
    own = runtime.register_operator("bytes_append", SUM, constants={"FACTOR": 1})
    assert own.opcode != ours.opcode
    assert runtime.operators.find("bytes_append") == ours
    with pytest.raises(UsageError, match="use letters"):
        runtime.register_operator("kv_append.1", SUM)


def sums_right(trial: Trial) -> None:
    assert trial.compute(arg=2, payload=numbers(3, 4)).result == 14, "3 + 4, twice, is 14"


def raises(trial: Trial) -> None:
    raise KeyError("a mistake of the test's own")


@pytest.mark.parametrize(
    ("text", "self_test", "error", "reason"),
    [
        ("what_is_this;", None, CompileError, "what_is_this"),
        ("int nothing;", None, HandlerRefused, "not a handler"),
        (SUM.replace("HANDLER {", "extern void elsewhere(); HANDLER { if (lane > 1000) elsewhere();"), None, HandlerRefused, "elsewhere"),
        (SUM.replace("sum += numbers[i]", "sum += numbers[i] + 1"), sums_right, HandlerRefused, "its self-test failed: 3 \\+ 4, twice, is 14"),
        (SUM, raises, KeyError, "a mistake"),
    ],
    ids=["syntax", "no handler", "unresolved", "wrong answer", "broken test"],
)  # fmt: skip
def test_old_operator_stays_when_the_new_one_is_refused(
    runtime: Runtime, text: str, self_test: object, error: type[Exception], reason: str
) -> None:
    before = runtime.register_operator("sum", SUM, constants={"FACTOR": 1}, self_test=sums_right)
    with pytest.raises(error, match=reason):
        runtime.register_operator("sum", text, constants={"FACTOR": 1}, self_test=self_test)  # type: ignore[arg-type]
    answer = runtime.wait(runtime.submit(before.task(arg=2, payload=numbers(3, 4))))
    assert (answer.result, answer.generation) == (14, before.generation)


def test_failing_line_is_quoted_when_an_assertion_has_no_words(runtime: Runtime) -> None:
    def wordless(trial: Trial) -> None:
        if trial.compute(arg=1, payload=numbers(1)).result != 8:
            raise AssertionError

    with pytest.raises(HandlerRefused, match="its self-test failed: raise AssertionError"):
        runtime.register_operator("sum", SUM, constants={"FACTOR": 1}, self_test=wordless)


def test_candidate_works_on_scratch_memory_when_it_is_tested(runtime: Runtime) -> None:
    text = """#include "call.h"
    HANDLER { if (lane == 0) { *reinterpret_cast<uint64_t*>(call->task.arg) += 1; call->result = 1; } }
    """
    seen: list[int] = []

    def test(trial: Trial) -> None:
        at = trial.allocate(8, numbers(41))
        trial.compute(arg=at)
        seen.append(int.from_bytes(trial.read(at, 8), "little"))

    done = runtime.stats().done
    runtime.register_operator("bump", text, self_test=test)
    assert seen == [42]
    assert runtime.stats().done - done <= 1  # the runtime itself ran nothing but the swap's empty task


def test_old_operator_stays_and_the_runtime_goes_on_when_the_new_one_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = HostDevice()
    runtime = Runtime(device, slots=64)
    before = runtime.register_operator("sum", SUM, constants={"FACTOR": 1})
    go = np.zeros(2, np.uint64)

    def hangs(trial: Trial) -> None:
        trial.compute(arg=go.ctypes.data)

    with monkeypatch.context() as patched:
        patched.setattr(config, "WAIT_PARK_S", 0.05)
        patched.setattr(config, "WAIT_TASK_S", 0.1)
        with pytest.raises(HandlerRefused, match=r"sum: no answer within 0.1 s in its self-test"):
            runtime.register_operator("sum", HANGS, self_test=hangs)
        gc.collect()
    answer = runtime.wait(runtime.submit(before.task(arg=2, payload=numbers(3, 4))))
    assert (answer.result, answer.generation) == (14, before.generation)
    runtime.close()
    with monkeypatch.context() as patched:
        patched.setattr(config, "WAIT_PARK_S", 0.05)
        # What the hanging one may still touch is kept for as long as it runs.
        with pytest.raises(DeviceError, match="did not leave; nothing was released"):
            device.close()
    go[0] = 1
    device.close()


def test_code_is_unloaded_only_when_its_last_task_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CountingDevice()
    runtime = Runtime(device, slots=64)
    go = np.zeros(2, np.uint64)
    operator = runtime.register_operator("op", HANGS)
    ticket = runtime.submit(operator.task(arg=go.ctypes.data))
    until(lambda: bool(go[1]))
    with monkeypatch.context() as patched:
        patched.setattr(config, "WAIT_TASK_S", 0.05)
        runtime.register_operator("op", SUM, constants={"FACTOR": 1})
    gc.collect()
    assert (device.count("load"), device.count("unload")) == (2, 0)
    go[0] = 1
    assert runtime.wait(ticket, 5.0).result == 99  # by code that was replaced long ago
    runtime.register_operator("op", SUM, constants={"FACTOR": 2})
    assert (device.count("load"), device.count("unload")) == (3, 2)
    assert device.log[2].removeprefix("unload") == device.log[0].removeprefix("load")
    runtime.close()
    assert device.count("load") == device.count("unload")
    device.close()


def test_code_stays_while_tasks_run_when_python_forgets_all_it_can(device: HostDevice) -> None:
    counting = CountingDevice()
    runtime = Runtime(counting, lanes=2)
    stop = threading.Event()
    opcode = runtime.register_operator("sum", SUM, constants={"FACTOR": 1}).opcode
    operator = runtime.operators.find("own.sum")
    assert operator is not None
    found: set[int] = set()

    def produce() -> None:
        while not stop.is_set():
            tickets = [runtime.submit(operator.task(arg=1, payload=numbers(6))) for _ in range(16)]
            found.update(runtime.wait(ticket).result for ticket in tickets)

    def forget() -> None:
        while not stop.is_set():
            gc.collect()

    thresholds = gc.get_threshold()
    gc.freeze()  # what other tests have left is looked at by no collection, of which there are thousands
    gc.set_threshold(1)
    workers = [threading.Thread(target=produce), threading.Thread(target=forget)]
    try:
        for worker in workers:
            worker.start()
        for factor in range(2, 22):
            # No reference to image, code or operator is kept here, and every code has served when it goes.
            assert runtime.register_operator("sum", SUM, constants={"FACTOR": factor % 4 + 1}).opcode == opcode
            assert counting.count("load") - counting.count("unload") <= 2
    finally:
        stop.set()
        for worker in workers:
            worker.join()
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    assert found <= {6, 12, 18, 24}
    assert len(found) > 1
    runtime.close()
    assert counting.count("load") == counting.count("unload") == 21
    counting.close()


def test_code_stays_loaded_when_its_runtime_is_forgotten() -> None:
    device = CountingDevice()
    runtime = Runtime(device)
    operator = runtime.register_operator("sum", SUM, constants={"FACTOR": 1})
    assert runtime.wait(runtime.submit(operator.task(arg=1, payload=numbers(6)))).result == 6
    del runtime, operator
    gc.collect()
    assert (device.count("load"), device.count("unload")) == (1, 0)
    device.close()


def test_device_waits_for_its_executors_when_it_is_closed() -> None:
    device = HostDevice()
    runtime = Runtime(device)
    go = np.zeros(2, np.uint64)
    runtime.submit(runtime.register_operator("op", HANGS).task(arg=go.ctypes.data))
    until(lambda: bool(go[1]))
    opener = threading.Timer(0.1, lambda: go.__setitem__(0, 1))
    opener.start()
    device.close()  # the task is over then, and with it everybody who reads the device's memory
    opener.join()
    assert (runtime.stats().done, runtime.stats().rescues) == (1, 0)
    with pytest.raises(DeviceError, match="host is closed"):
        runtime.submit(Task())


def test_operator_runs_between_appends_when_it_is_registered_beside_protection() -> None:
    stream = ScratchStream()
    with Checkpointer.open("host", stream.target) as checkpointer:
        runtime = checkpointer.runtime
        operator = runtime.register_operator("sum", SUM, constants={"FACTOR": 1})
        appends, sums = [], []
        for step in range(20):
            words = {"kind": abi.KIND_EVENT, "key": 1, "incarnation": 1, "step": step}
            appends.append(checkpointer.append_bytes(b"%d" % step, **words))
            sums.append(runtime.submit(operator.task(arg=step, payload=numbers(step, 1))))
        assert [checkpointer.wait(ticket).sequence for ticket in appends] == list(range(20))
        assert [checkpointer.wait(ticket).result for ticket in sums] == [step * (step + 1) for step in range(20)]
    assert [record.payload for record in stream.records()] == [b"%d" % step for step in range(20)]
    stream.close()


PAGE = (Path(__file__).parents[1] / "docs" / "operators.md").read_text("utf-8")


def test_example_of_the_page_runs_as_it_stands() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "docs/operators.md", "exec"), names)
    assert names["answer"] == "status 1, 3 of 5 ids are 9"
    assert f"`{names['answer']}`" in PAGE


def test_page_names_the_reasons_that_the_lint_gives() -> None:
    table = PAGE.partition("| reason |")[2].partition("\n\n")[0]
    named = [reason for row in table.splitlines()[2:] for reason in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(named) > 10
    code = "".join(inspect.getsource(module) for module in (loader, host, nvrtc))
    code = code.replace("{registers_max}", str(nvrtc.REGISTERS_MAX)).replace("{FRAME_BYTES_MAX}", str(loader.FRAME_BYTES_MAX))
    code = code.replace("{BARRIER_COUNT_MAX}", str(loader.BARRIER_COUNT_MAX))
    assert [reason for reason in named if reason not in code] == []


def test_page_states_the_limits_that_are_kept() -> None:
    from concordia.device import residency

    assert f"{residency.THREADS} lanes a CTA" in PAGE
    assert f"A payload has at most {config.RING_ARENA_BYTES // 2 >> 20} MiB" in PAGE
    assert f"no answer comes within {config.WAIT_TASK_S:.0f} s" in PAGE
    assert f"A task may\nrun for {config.WAIT_TASK_S:.0f} s" in PAGE
    assert f"{abi.OPERATOR_CAPACITY - 1} operators and handlers" in PAGE
    assert f"{abi.STATUS_OWN} and above are yours" in PAGE


def test_payload_is_refused_when_it_exceeds_half_the_arena(device: HostDevice) -> None:
    runtime = Runtime(device)
    operator = runtime.register_operator("sum", SUM, constants={"FACTOR": 1})
    most = config.RING_ARENA_BYTES // 2
    assert runtime.wait(runtime.submit(operator.task(arg=1, payload=bytes(most)))).payload_hash & abi.NOT_SEALED == most // 8
    with pytest.raises(UsageError, match="do not fit half the ring's arena"):
        runtime.submit(operator.task(arg=1, payload=bytes(most + 1)))
    runtime.close()

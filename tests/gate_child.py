"""A program on the fake driver that is paused, one scenario a run; tests/test_shim_gate.py names them."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from concordia.errors import UsageError, WaitTimeout
from concordia.integrations.program import gate
from waiting import until

LAUNCHES = ("cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel", "cuGraphLaunch")


class Program:
    """A context, a stream, a counter on the "device", and every way to launch."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.driver.concordia_held.restype = ctypes.c_uint64
        self.context, self.module, self.function = (ctypes.c_void_p() for _ in range(3))
        self.cell = ctypes.c_uint64()
        self.must("cuInit", 0)
        self.must("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), 0)
        self.must("cuCtxSetCurrent", self.context)
        self.must("cuModuleLoadData", ctypes.byref(self.module), b".version 8.0\n")
        self.must("cuModuleGetFunction", ctypes.byref(self.function), self.module, b"add")
        self.must("cuMemAlloc_v2", ctypes.byref(self.cell), ctypes.c_size_t(64))
        self.one = ctypes.c_uint64(1)
        self.parameters = (ctypes.c_void_p * 2)(ctypes.addressof(self.cell), ctypes.addressof(self.one))

    def must(self, name: str, *arguments: Any) -> None:
        result = getattr(self.driver, name)(*arguments)
        assert result == 0, f"{name} gave {result}"

    def stream(self) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.must("cuStreamCreate", ctypes.byref(made), 1)
        return made

    def launch(self, stream: ctypes.c_void_p | None = None, how: str = "cuLaunchKernel") -> None:
        self.must("cuCtxSetCurrent", self.context)
        if how.startswith("cuGraphLaunch"):
            self.must(how, self.graph(), stream)
        elif how.startswith("cuLaunchKernelEx"):
            self.must(how, (ctypes.c_uint64 * 8)(0, 0, 0, 0, (stream.value if stream else 0) or 0), self.function, self.parameters, None)
        elif how.startswith("cuLaunchCooperative"):
            self.must(how, self.function, 1, 1, 1, 32, 1, 1, 0, stream, self.parameters)
        else:
            self.must(how, self.function, 1, 1, 1, 32, 1, 1, 0, stream, self.parameters, None)

    def graph(self) -> ctypes.c_void_p:
        graph, executable, stream = ctypes.c_void_p(), ctypes.c_void_p(), self.stream()
        self.must("cuStreamBeginCapture_v2", stream, 0)
        self.driver.cuLaunchKernel(self.function, 1, 1, 1, 32, 1, 1, 0, stream, self.parameters, None)
        self.must("cuStreamEndCapture", stream, ctypes.byref(graph))
        self.must("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        return executable

    @property
    def count(self) -> int:
        return int(ctypes.c_uint64.from_address(self.cell.value).value)

    @property
    def held(self) -> int:
        return int(self.driver.concordia_held())

    def in_thread(self, work: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=work)
        thread.start()
        return thread


def refusal(work: Callable[[], object], kind: type[Exception]) -> str:
    """What it says, which must be refused."""
    with pytest.raises(kind) as found:
        work()
    return str(found.value)


def held(program: Program) -> None:
    """Every launch of another thread waits, the pauser's do not; all of them run after the resume."""
    for how in (name + suffix for name in LAUNCHES for suffix in ("", "_ptsz")):
        before = program.count
        with gate.paused() as rest:
            assert rest.latency_ns > 0
            assert gate.is_paused()
            thread = program.in_thread(lambda how=how: program.launch(how=how))
            until(lambda: program.held == 1)
            assert program.count == before, how
            program.launch()
            assert program.count == before + 1
        thread.join(10)
        assert program.count == before + 2, how
        assert not gate.is_paused()


def legacy(program: Program) -> None:
    """The functions of long ago are held, too."""
    submitted = program.driver.fake_submitted
    submitted.restype = ctypes.c_uint64
    listed = (ctypes.c_uint64 * 7)(program.function.value or 0, 0, 0, 0, 0, 0, ctypes.addressof(program.parameters))
    for name, arguments in {
        "cuLaunch": (program.function,),
        "cuLaunchGrid": (program.function, 2, 2),
        "cuLaunchGridAsync": (program.function, 2, 2, program.stream()),
        "cuLaunchCooperativeKernelMultiDevice": (listed, 1, 0),
    }.items():
        before = submitted()
        with gate.paused(5):
            thread = program.in_thread(lambda name=name, arguments=arguments: program.must(name, *arguments))
            until(lambda: program.held == 1)
            assert submitted() == before
        thread.join(10)
        assert submitted() == before + 1
    assert program.count == 1


def waits(program: Program) -> None:
    """A pause returns only once what was launched before is done, on every stream and by a graph."""
    streams = [None, program.stream(), program.stream()]
    for stream in streams:
        for how in ("cuLaunchKernel", "cuGraphLaunch"):
            program.driver.fake_hold(stream)
            program.launch(stream, how)
            found: list[Any] = []
            thread = program.in_thread(lambda found=found: found.append(gate.pause(10)))
            until(lambda: bool(gate.is_paused()))
            assert not found
            program.driver.fake_release(stream)
            thread.join(10)
            assert found[0].streams >= 1
            assert program.driver.cuStreamQuery(stream) == 0
            gate.resume()


def bound(program: Program) -> None:
    """At the bound nothing stays paused, and the error says what was waited for."""
    stream = program.stream()
    for held_stream, text in ((None, "default stream"), (stream, hex(stream.value or 0))):
        program.driver.fake_hold(held_stream)
        program.launch(held_stream)
        begun = time.monotonic()
        assert text in refusal(lambda: gate.pause(0.2), WaitTimeout)
        assert 0.2 <= time.monotonic() - begun < 5
        assert not gate.is_paused()
        thread = program.in_thread(program.launch)
        thread.join(10)
        assert not thread.is_alive()
        program.driver.fake_release(held_stream)
    assert gate.pause(5).latency_ns > 0
    gate.resume()


def hold_bound(program: Program) -> None:
    """A launch that is held for too long goes on, and so does everybody."""
    gate.pause(5)
    begun = time.monotonic()
    threads = [program.in_thread(program.launch) for _ in range(4)]
    for thread in threads:
        thread.join(20)
    assert 0.2 < time.monotonic() - begun < 15
    assert program.count == 4
    assert not gate.is_paused()


def capture(program: Program) -> None:
    """A stream that is being captured is not waited for, its launches are not held, and its graph is whole."""
    stream, graph, executable = program.stream(), ctypes.c_void_p(), ctypes.c_void_p()
    program.launch(stream)
    program.must("cuStreamBeginCapture_v2", stream, 0)
    program.launch(stream)
    rest = gate.pause(5)
    assert (rest.captured, rest.streams) == (1, 0), rest
    thread = program.in_thread(lambda: program.launch(stream))
    thread.join(10)
    assert not thread.is_alive()
    assert program.held == 0
    gate.resume()
    program.must("cuStreamEndCapture", stream, ctypes.byref(graph))
    program.must("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
    assert program.count == 1
    program.must("cuGraphLaunch", executable, None)
    assert program.count == 3


def captures(program: Program) -> None:
    """Captures begin and end beside pauses: no event of a pause becomes part of one."""
    is_over = threading.Event()
    begun = [0]

    def work() -> None:
        stream = program.stream()
        program.launch(stream)
        while not is_over.is_set():
            graph = ctypes.c_void_p()
            program.must("cuStreamBeginCapture_v2", stream, 0)
            time.sleep(0.0003)  # as long as the fake driver takes for an event
            program.must("cuStreamEndCapture", stream, ctypes.byref(graph))
            time.sleep(0.0003)
            begun[0] += 1

    program.driver.fake_events_captured.restype = ctypes.c_uint64
    thread = program.in_thread(work)
    events, end = 0, time.monotonic() + 30
    while events < 200:
        assert time.monotonic() < end, events
        with gate.paused(10) as rest:
            events += rest.streams
    is_over.set()
    thread.join(20)
    assert program.driver.fake_events_captured() == 0


def gone(program: Program) -> None:
    """Streams and contexts that have gone are not touched; a handle that is used again is another stream."""
    for _ in range(3):
        stream = program.stream()
        program.launch(stream)
        program.must("cuStreamDestroy_v2", stream)
        assert gate.pause(5).streams <= 1
        gate.resume()
    context = ctypes.c_void_p()
    program.must("cuCtxCreate_v2", ctypes.byref(context), 0, 0)
    stream = program.stream()
    program.driver.cuLaunchKernel(program.function, 1, 1, 1, 32, 1, 1, 0, stream, program.parameters, None)
    program.must("cuCtxDestroy_v2", context)
    assert gate.pause(5).streams == 0
    gate.resume()
    program.launch()
    assert gate.pause(5).streams == 1
    gate.resume()
    program.must("cuDevicePrimaryCtxReset_v2", 0)
    assert gate.pause(5).streams == 0
    gate.resume()


def opened(program: Program) -> None:
    """A pause whose gate another thread opens has brought nothing to rest."""
    program.driver.fake_hold(None)
    program.launch()
    said: list[str] = []
    thread = program.in_thread(lambda: said.append(refusal(lambda: gate.pause(20), WaitTimeout)))
    until(gate.is_paused)
    gate.resume()
    program.driver.fake_release(None)
    thread.join(30)
    assert "opened meanwhile" in said[0]


def released(program: Program) -> None:
    """A release that is not the last one leaves the streams of the context known."""
    again = ctypes.c_void_p()
    program.must("cuDevicePrimaryCtxRetain", ctypes.byref(again), 0)
    stream = program.stream()
    program.driver.fake_hold(stream)
    program.launch(stream)
    program.must("cuDevicePrimaryCtxRelease_v2", 0)
    refusal(lambda: gate.pause(0.2), WaitTimeout)
    program.driver.fake_release(stream)
    assert gate.pause(5).streams == 1
    gate.resume()
    program.must("cuDevicePrimaryCtxRelease_v2", 0)
    assert gate.pause(5).streams == 0
    gate.resume()


def unasked(program: Program) -> None:
    """A stream that cannot be waited for is not said to be at rest."""
    program.launch()
    assert "says nothing of" in refusal(lambda: gate.pause(5), WaitTimeout)
    assert not gate.is_paused()


def many(program: Program) -> None:
    """Once there were more streams than can be remembered, no end of one of them says that all are known."""
    streams = [program.stream() for _ in range(1025)]
    for stream in streams:
        program.launch(stream)
    program.driver.fake_hold(streams[-1])
    program.launch(streams[-1])
    program.must("cuStreamDestroy_v2", streams[0])
    assert "than can be remembered" in refusal(lambda: gate.pause(2), WaitTimeout)
    program.driver.fake_release(streams[-1])


def storm(program: Program) -> None:
    """Eight threads launch while one pauses again and again: nothing is lost, and nothing runs while it is paused."""
    is_over = threading.Event()
    counts = [0] * 8

    def work(index: int) -> None:
        stream = program.stream()
        while not is_over.is_set():
            program.launch(stream if index % 2 else None, LAUNCHES[index % 3])
            counts[index] += 1

    program.must("cuCtxSetCurrent", program.context)
    threads = [program.in_thread(lambda index=index: work(index)) for index in range(8)]
    submitted = program.driver.fake_submitted
    submitted.restype = ctypes.c_uint64
    for _ in range(100):
        with gate.paused(10):
            before = submitted()
            time.sleep(0.0005)  # the time in which something could be launched
            assert submitted() == before
    is_over.set()
    for thread in threads:
        thread.join(20)
    assert sum(counts) > 0
    assert submitted() == sum(counts)


def misuse(program: Program) -> None:
    """A second pause is refused; a resume of nothing does nothing."""
    gate.resume()
    gate.pause(5)
    assert "paused already" in refusal(lambda: gate.pause(5), UsageError)
    gate.resume()
    gate.resume()


def outside(program: Program) -> None:
    """Launches until its input ends; says how many ran."""
    print("ready", flush=True)
    is_over = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            if line == "count\n":
                print(program.count, flush=True)
        is_over.set()

    thread = program.in_thread(listen)
    while not is_over.is_set():
        program.launch()
    thread.join(10)


def stuck(program: Program) -> None:
    """Has work on the device that does not end."""
    program.driver.fake_hold(None)
    program.launch()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    {function.__name__: function for function in (held, legacy, captures, waits, bound, hold_bound, capture, gone, opened, released, unasked, many, storm, misuse, outside, stuck)}[sys.argv[1]](Program())

"""What a program does with the driver while it is paused, one scenario a run under `concordia run`; test_gpu_shim.py reads the answer."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

BOUND_S = 30.0
PTX = b"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry count(.param .u64 p)
{
  .reg .b64 %rd<3>;
  .reg .b32 %r<3>;
  ld.param.u64 %rd1, [p];
  cvta.to.global.u64 %rd2, %rd1;
  ld.global.u32 %r1, [%rd2];
  add.u32 %r2, %r1, 1;
  st.global.u32 [%rd2], %r2;
  ret;
}
\0"""


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.0002)


def held(shim: Any) -> int:
    return int(shim.concordia_held())


def shim() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.concordia_held.restype = ctypes.c_uint64
    return library


def resolver() -> dict[str, Any]:
    """Which functions the driver's resolver gives that are neither the hook nor a function that has none, here: no addresses are kept."""
    import os

    from concordia.integrations.program.shim_build import NATIVE, hook_names

    driver = ctypes.CDLL("libcuda.so.1")
    real = ctypes.CDLL(os.path.join(os.environ["CONCORDIA_RUN"], "libcuda-real.so"))
    assert driver.cuInit(0) == 0
    address = lambda library, name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value  # noqa: E731 - a word for one line
    others = (NATIVE / "pointer_hooks.def").read_text("utf-8")
    hooks = {address(real, name): address(real if f"HOOK({name}," in others else driver, name) for name in hook_names() if hasattr(real, name)}
    asked, missed = 0, []
    for name in sorted({n.split("_v")[0].removesuffix("_ptsz") for n in hook_names()}):
        for version in (11030, 11040, 12000, 12040, 12050, 13000):
            for flags in (0, 1, 2):
                found, plain, status = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
                wanted = (name.encode(), version, ctypes.c_uint64(flags))
                code = driver.cuGetProcAddress_v2(wanted[0], ctypes.byref(found), *wanted[1:], ctypes.byref(status))
                same = real.cuGetProcAddress_v2(wanted[0], ctypes.byref(plain), *wanted[1:], ctypes.byref(status))
                assert code == same, (name, version, flags, code, same)
                if code or not plain.value:
                    continue
                asked += 1
                if plain.value not in hooks or found.value != hooks[plain.value]:
                    missed.append([name, version, flags])
    return {"asked": asked, "missed": missed, "hooks": len(hooks)}


def rest() -> dict[str, Any]:
    """Pauses while a kernel runs: it is done afterwards, another thread's launch is held, and the sum is right."""
    import torch

    from concordia.integrations.program import gate

    library, total = shim(), torch.zeros(1, device="cuda", dtype=torch.int64)
    side, latencies = torch.cuda.Stream(), []
    torch.cuda.synchronize()
    for turn in range(20):
        stream = side if turn % 2 else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            total += 1
            done = torch.cuda.Event()
            done.record()
        with gate.paused(5.0) as paused:
            assert done.query(), turn
            latencies.append(paused.latency_ns)
            thread = threading.Thread(target=total.add_, args=(1,))
            thread.start()
            until(lambda: held(library) == 1)
            assert thread.is_alive()
        thread.join(BOUND_S)
        torch.cuda.synchronize()
    return {"total": int(total.item()), "latency_ns_max": max(latencies)}


def late() -> dict[str, Any]:
    """A pause that the GPU does not come to: it says so in time, and the program goes on."""
    import torch

    from concordia.errors import WaitTimeout
    from concordia.integrations.program import gate

    total = torch.zeros(1, device="cuda", dtype=torch.int64)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)
    begun, said = time.monotonic(), ""
    try:
        gate.pause(0.2)
    except WaitTimeout as error:
        said = str(error)
    seconds = time.monotonic() - begun
    total += 1
    torch.cuda.synchronize()
    with gate.paused(5.0):
        pass
    return {"said": said, "seconds": seconds, "total": int(total.item())}


def graphs() -> dict[str, Any]:
    """One thread captures and replays, another pauses: every capture is whole, every replay counts, none runs in a pause."""
    import torch

    from concordia.integrations.program import gate

    total = torch.zeros(1, device="cuda", dtype=torch.int64)
    is_over, counts, failures = threading.Event(), {"replays": 0, "captures": 0}, []

    def work() -> None:
        try:
            while not is_over.is_set():
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    total.add_(1)
                counts["captures"] += 1
                for _ in range(50):
                    graph.replay()
                    counts["replays"] += 1
                torch.cuda.synchronize()
        except Exception as error:
            failures.append(repr(error))

    total.add_(0)
    torch.cuda.synchronize()
    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: counts["captures"] > 0)
    captured = 0
    for _ in range(200):
        with gate.paused(5.0) as paused:
            captured += paused.captured
        time.sleep(0.002)
    is_over.set()
    thread.join(BOUND_S)
    torch.cuda.synchronize()
    return {"total": int(total.item()), "failures": failures, "captured": captured, **counts}


def reset() -> dict[str, Any]:
    """A library that outlives its context: what a launch gives before and after the primary context was reset."""
    driver = ctypes.CDLL("libcuda.so.1")
    context, library, kernel, cell = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
    codes: list[int] = [driver.cuInit(0)]
    values = []

    def launch() -> None:
        codes.append(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
        codes.append(driver.cuCtxSetCurrent(context))
        if not library.value:
            codes.append(driver.cuLibraryLoadData(ctypes.byref(library), PTX, None, None, 0, None, None, 0))
            codes.append(driver.cuLibraryGetKernel(ctypes.byref(kernel), library, b"count"))
        codes.append(driver.cuMemAlloc_v2(ctypes.byref(cell), ctypes.c_size_t(4)))
        codes.append(driver.cuMemsetD32_v2(cell, 7, ctypes.c_size_t(1)))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(cell))
        codes.append(driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, None, parameters, None))
        codes.append(driver.cuCtxSynchronize())
        found = ctypes.c_uint32()
        codes.append(driver.cuMemcpyDtoH_v2(ctypes.byref(found), cell, ctypes.c_size_t(4)))
        values.append(found.value)

    launch()
    codes.append(driver.cuDevicePrimaryCtxReset_v2(0))
    launch()
    return {"codes": codes, "values": values}


if __name__ == "__main__":
    scenarios = {function.__name__: function for function in (resolver, rest, late, graphs, reset)}
    print("ANSWER " + json.dumps(scenarios[sys.argv[1]]()), flush=True)

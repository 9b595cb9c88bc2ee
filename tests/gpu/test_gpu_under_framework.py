"""Real programs under `concordia run`, on a GPU.

Invariants: with hooks every kernel of the corpus leaves the bytes it leaves without them: PyTorch, training, CUDA graphs, Triton, NVRTC,
vLLM's operators and FlashAttention 3, NCCL on two GPUs; start after start; vLLM's own processes start and say the same tokens;
torch.profiler and compute-sanitizer work inside; killing the rewriter at any moment changes nothing but coverage; the off switch leaves
nothing of us in the process. real_kernels.py is the program.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from child import HERE, gpu_count

from concordia.testing.model import make_model

ROOT = HERE.parent.parent
PROGRAM = str(HERE / "real_kernels.py")
TIMEOUT_S = 110.0
ENGINE_S = 200.0  # of a cold start, whose images are rewritten for each process
# One kernel that writes where it may, or far beyond.
WRITER = """
import ctypes
from concordia.device.compiler import KERNELS
from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext
from concordia.device.nvrtc import compile_ptx, link_cubin
text = 'extern "C" __global__ void writer(char* at, unsigned long long beyond) {{ at[beyond + threadIdx.x] = 1; }}'
with CudaContext(0).current() as driver:
    ptx = compile_ptx(text, name="writer.cu", architecture="sm_90", include=KERNELS)
    cubin = link_cubin([ptx], name="writer", architecture="sm_90")
    module = checked(driver.cuModuleLoadData(cubin), "load")
    function = checked(driver.cuModuleGetFunction(module, b"writer"), "look up")
    at = checked(driver.cuMemAlloc(4096), "allocate")
    words = ((int(at), {beyond}), (ctypes.c_uint64, ctypes.c_uint64))
    checked(driver.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, 0, words, 0), "launch")
    driver.cuCtxSynchronize()
"""
STARTS = int(os.environ.get("CONCORDIA_TEST_STARTS", "3"))


def environment(cache: pathlib.Path, **more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "CONCORDIA_CACHE": str(cache), **more}


def start(words: list[str], cache: pathlib.Path, *, hooks: str | None, **more: str) -> subprocess.Popen[str]:
    front = [sys.executable, "-m", "concordia.cli", "run", *(["--hooks", hooks] if hooks else []), "--", sys.executable]
    return subprocess.Popen(
        [*(front if hooks is not None else [sys.executable]), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(cache, **more), start_new_session=True,
    )  # fmt: skip


def answer(child: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    try:
        said, complaints = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        said, complaints = child.communicate(timeout=10)
        raise AssertionError(f"no end within {timeout_s} s:\n{said[-2000:]}\n{complaints[-4000:]}") from None
    assert child.returncode == 0, f"ended with {child.returncode}:\n{said[-2000:]}\n{complaints[-4000:]}"
    found: dict[str, Any] = json.loads([line for line in said.splitlines() if line.startswith("{")][-1])  # engines talk there, too
    return found


def modules(cache: pathlib.Path) -> list[dict[str, Any]]:
    """What the last run loaded."""
    done = subprocess.run(
        [sys.executable, "-m", "concordia.cli", "modules", "--json"], capture_output=True, text=True, env=environment(cache), timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    images: list[dict[str, Any]] = json.loads(done.stdout)["images"]
    return images


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def plain(cache: pathlib.Path) -> dict[str, Any]:
    """What the program says without us; twice, for a kernel that repeats nothing proves nothing."""
    first, second = (answer(start([PROGRAM], cache, hooks=None)) for _ in range(2))
    assert first == second, "the corpus does not repeat itself"
    return first


@pytest.mark.parametrize("hooks", ["entry", "entry,exit", "entry,marks"])
def test_every_kernel_leaves_the_same_bytes_with_hooks(plain: dict[str, Any], cache: pathlib.Path, hooks: str) -> None:
    hooked = answer(start([PROGRAM], cache, hooks=hooks))
    wrong = [name for name, digest in plain["digests"].items() if hooked["digests"].get(name) != digest]
    assert not wrong
    assert hooked["missing"] == plain["missing"]
    happened = [module["outcome"] for module in modules(cache)]
    print({outcome: happened.count(outcome) for outcome in set(happened)})
    assert happened.count("rewritten") > 0


@pytest.mark.parametrize("turn", range(STARTS))
def test_program_starts_and_ends_alike_each_time(plain: dict[str, Any], cache: pathlib.Path, turn: int) -> None:
    hooked = answer(start([PROGRAM, "torch", "graphs", "triton"], cache, hooks="entry"))
    assert all(plain["digests"][name] == digest for name, digest in hooked["digests"].items())


def test_profiler_sees_kernels_when_hooks_are_in(cache: pathlib.Path) -> None:
    text = (
        "import json, torch\n"
        "x = torch.randn(1000, 1000, device='cuda')\n"
        "with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:\n"
        "    (x.sin() @ x).sum().item()\n"
        "print(json.dumps({'kernels': sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events())}))\n"
    )
    assert answer(start(["-c", text], cache, hooks="entry"))["kernels"] >= 3


@pytest.mark.parametrize("workers", [1, 2])
def test_engine_with_its_own_processes_says_the_same_tokens_with_hooks(cache: pathlib.Path, tmp_path: pathlib.Path, workers: int) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm for CUDA is not installed")
    if gpu_count() < workers:
        pytest.skip("needs a second GPU")
    make_model(tmp_path, shape="140m")
    words = [str(HERE / "vllm_program.py"), str(tmp_path), str(workers), "1"]
    plain = answer(start(words, cache, hooks=None), timeout_s=ENGINE_S)
    hooked = answer(start(words, cache, hooks="entry"), timeout_s=ENGINE_S)
    assert hooked == plain
    images = modules(cache)
    print("processes", len({image["pid"] for image in images if "pid" in image}))
    assert sum(image["outcome"] == "rewritten" for image in images) > 0


@pytest.mark.parametrize("is_wrong", [False, True])
def test_sanitizer_sees_what_it_sees_without_us_when_hooks_are_in(cache: pathlib.Path, is_wrong: bool) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    sanitizer = importlib.import_module("sanitize").find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not here: install CUDA's toolkit, or set CUDA_HOME")
    source = WRITER.format(beyond=1 << 30 if is_wrong else 0)
    front = [sys.executable, "-m", "concordia.cli", "run", "--hooks", "entry", "--verbose", "--"]
    words = [sanitizer, "--tool", "memcheck", "--error-exitcode", "0", sys.executable, "-c", source]
    for command in ([*front, *words], words):
        done = subprocess.run(command, capture_output=True, text=True, env=environment(cache), timeout=TIMEOUT_S, check=False)
        said = done.stdout + done.stderr
        assert ("ERROR SUMMARY: 0 errors" in said) is not is_wrong, said[-4000:]
        assert ("Invalid __global__ write" in said) is is_wrong, said[-4000:]
        assert command is words or re.search(r": [1-9]\d* hooked", said), said[-4000:]


def test_nothing_but_coverage_changes_when_the_rewriter_is_killed(plain: dict[str, Any], tmp_path: pathlib.Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    child = start([PROGRAM, "torch", "training", "triton"], tmp_path, hooks="entry")  # a cold cache: the rewriter is needed
    own = (b"--launcher", str(child.pid).encode())  # other programs may run beside it, and need theirs
    deadline = time.monotonic() + 20
    killed = 0
    rng = random.Random(seed)
    while child.poll() is None and time.monotonic() < deadline:
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"concordia.instrument.rewriter" in words and own in itertools.pairwise(words):
                os.kill(int(entry.name), signal.SIGKILL)
                killed += 1
        time.sleep(rng.uniform(0.05, 1.5))
    hooked = answer(child)
    assert killed > 0
    assert all(plain["digests"][name] == digest for name, digest in hooked["digests"].items())


def test_nothing_of_us_is_loaded_when_switched_off(cache: pathlib.Path) -> None:
    text = (
        "import json, torch\n"
        "torch.zeros(1, device='cuda')\n"
        "print(json.dumps({'maps': [l.split()[-1] for l in open('/proc/self/maps') if 'libcuda' in l]}))\n"
    )
    off = answer(start(["-c", text], cache, hooks="entry", CONCORDIA_DISABLE="1"))
    on = answer(start(["-c", text], cache, hooks="entry"))
    assert not any("libcuda-real" in path or "concordia" in path for path in off["maps"])
    assert any("concordia" in path or "libcuda.so.1" in path for path in on["maps"])


def test_corpus_has_nccl_when_there_are_two_gpus(plain: dict[str, Any]) -> None:
    if gpu_count() < 2:
        pytest.skip("needs a second GPU")
    assert sum(name.startswith("nccl.") for name in plain["digests"]) == 10

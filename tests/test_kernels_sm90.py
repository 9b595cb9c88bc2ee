"""Every kernel as GPU code, without a GPU: compiled, linked and linted for sm_90 by the pinned compilers.

Invariants: each handler passes the lint it must pass before it may be installed; the executor's launch gives what the lint allows;
whatever could read or write the executor's own memory by mistake is refused with its reason; a compiler's words reach the reader.
"""

from __future__ import annotations

import pathlib
import re
from dataclasses import replace

import pytest

from concordia import abi
from concordia.checkpoint.handler import burst_source, page_source
from concordia.checkpoint.region import KvGeometry, Plane
from concordia.checkpoint.restore_burst import RESTORE_KERNEL
from concordia.device import neighbour, nvrtc
from concordia.device.compiler import KERNELS, HandlerSource
from concordia.device.cubin import initial_word, read_facts
from concordia.device.cuda import CudaCompiler
from concordia.device.executor_code import KERNELS as EXECUTOR_KERNELS
from concordia.device.kernel_cache import KernelCache
from concordia.device.loader import FRAME_BYTES_MAX, lint
from concordia.errors import CompileError, HandlerRefused
from concordia.testing.swap_storm import STORM

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")

PACKED = KvGeometry(
    layers=16, block_count=64, block_tokens=16, block_bytes=65536, heads=8, head_dim_key=128, head_dim_value=128, element_bytes=2,
    key=Plane(0, 512, 4096, 2), value=Plane(256, 512, 4096, 2), dtype="bfloat16", instruction_set="any",
)  # fmt: skip
ROWS = PACKED.constants()
COLUMNS = ROWS | {"KV_KEY_TOKEN_STRIDE": 2, "KV_KEY_ELEMENT_STRIDE": 64, "KV_BLOCK_TOKENS": 32}
TILES = replace(PACKED, key=Plane(0, 8192, 4, 2, 16, 4096, 2, 64)).constants()
LATENT = ROWS | {"KV_HEADS": 1, "KV_KEY_DIM": 576, "KV_VALUE_DIM": 0, "KV_KEY_TOKEN_STRIDE": 1152}
FP8 = ROWS | {"KV_ELEMENT_BYTES": 1, "KV_KEY_ELEMENT_STRIDE": 1, "KV_VALUE_ELEMENT_STRIDE": 1}

HANDLERS = [
    HandlerSource.of("bytes_append.cu"),
    HandlerSource.of("page_scan.cu", {"PAGE_BYTES": 65536}),
    HandlerSource.of("page_scan.cu", {"PAGE_BYTES": 4096}),
    HandlerSource.of("swap_storm", {"VERSION": 1}, text=STORM),
    *(
        HandlerSource.of(file, shape)
        for file in ("kv_append.cu", "kv_apply.cu", "kv_hash.cu")
        for shape in (ROWS, COLUMNS, TILES, LATENT, FP8)
    ),
]

FIBONACCI = """__device__ __noinline__ uint64_t fibonacci(Call* call, uint64_t n) {
  return n < 2 ? n + call->task.step : fibonacci(call, n - 1) + fibonacci(call, n - 2);
}"""
MUTUAL = """__device__ uint64_t odd(Call* call, uint64_t n);
__device__ __noinline__ uint64_t even(Call* call, uint64_t n) { return n == 0 ? call->task.step : odd(call, n - 1) * 3 + odd(call, n / 2); }
__device__ __noinline__ uint64_t odd(Call* call, uint64_t n) { return n == 0 ? call->task.arg : even(call, n - 1) * 5 + even(call, n / 3); }
"""
PLAIN = '#include "call.h"\n{before}\nHANDLER {{ {body} }}\n'


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> CudaCompiler:
    return CudaCompiler("sm_90", KernelCache(tmp_path_factory.mktemp("kernels")))


def handler(name: str, body: str, before: str = "") -> HandlerSource:
    return HandlerSource.of(name, text=PLAIN.format(before=before, body=body))


OWN = """#include "call.h"
HANDLER {
  const uint64_t* numbers = reinterpret_cast<const uint64_t*>(payload_of(call));
  if (numbers == nullptr) return refuse(call, lane, kStatusOwn);
  for_each_lane(call, lane, call->task.source_bytes / 8, [=](uint64_t i) { add_result(call, numbers[i] / call->task.arg); });
}
"""


def test_own_operator_reaches_its_call_wherever_the_executor_keeps_it(compiler: CudaCompiler) -> None:
    source = HandlerSource.of("own", text=OWN)
    compiler.handler(source)
    ptx, _ = compiler._ptx(source)
    # With one CTA a Call lies in shared memory: what adds to its words must not say that it is global.
    assert b"red.relaxed.gpu.add.u64" in ptx
    assert b".global.add" not in ptx


@pytest.mark.parametrize("source", HANDLERS, ids=lambda s: f"{s.file}-{hash(s.constants) & 0xFFF}")
def test_handler_passes_the_lint_when_compiled_for_sm90(
    compiler: CudaCompiler, source: HandlerSource
) -> None:
    image = compiler.handler(source)
    facts = read_facts(image.cubin)
    assert facts.functions == {"concordia_handler"}
    assert facts.dangling_calls == 0
    assert 0 < facts.registers_max <= nvrtc.REGISTERS_MAX
    assert facts.frame_bytes_total <= FRAME_BYTES_MAX
    assert initial_word(image.cubin, "concordia_handler_abi") == abi.ABI_VERSION


def test_burst_fills_a_multiprocessor_when_compiled_for_sm90(compiler: CudaCompiler) -> None:
    facts = read_facts(compiler.kernel(burst_source()).cubin)
    assert facts.registers["concordia_page_burst"] <= nvrtc.REGISTERS_MAX
    assert facts.frame_bytes["concordia_page_burst"] == 0


@pytest.mark.parametrize("shape", [ROWS, COLUMNS, TILES, LATENT, FP8], ids=["rows", "columns", "tiles", "latent", "fp8"])
def test_restore_burst_fills_a_multiprocessor_when_compiled_for_sm90(
    compiler: CudaCompiler, shape: dict[str, int]
) -> None:
    facts = read_facts(compiler.kernel(HandlerSource.of("kv_restore.cu", shape)).cubin)
    assert facts.registers[RESTORE_KERNEL] <= nvrtc.REGISTERS_MAX
    assert facts.frame_bytes[RESTORE_KERNEL] <= 64


def test_probe_leaves_room_for_itself_alone_when_compiled_for_sm90(compiler: CudaCompiler) -> None:
    facts = read_facts(compiler.kernel(neighbour.SOURCE).cubin)
    assert facts.frame_bytes["concordia_probe"] == 0
    assert 8 < facts.registers["concordia_probe"] <= nvrtc.REGISTERS_MAX  # its chains are not optimised away


def test_both_sides_of_the_executor_s_calls_preserve_the_same_registers(compiler: CudaCompiler) -> None:
    for source in (HandlerSource.of("executor.cu"), HandlerSource.of("keep.cu"), page_source(4096)):
        ptx, _ = compiler._ptx(source)
        sides = ptx.count(b".callprototype") + len(re.findall(rb"\.func\s+concordia_", ptx))
        assert sides > 0
        assert ptx.count(nvrtc.PRESERVED) == sides
    with pytest.raises(CompileError, match="unknown way"):
        nvrtc._with_preserved(b".version 9.1\n.func (.param .b64 r) concordia_handler(.param .b64 a)\n;", "x")


def test_executor_launch_gives_what_the_lint_allows_when_linked(compiler: CudaCompiler) -> None:
    facts = read_facts(compiler.executor().cubin)
    for kernel in EXECUTOR_KERNELS:
        assert facts.registers[kernel.decode()] == nvrtc.REGISTERS_MAX
    assert facts.shared_bytes <= 16384 + 128  # a neighbour keeps the rest of the multiprocessor's
    assert FRAME_BYTES_MAX <= facts.frame_bytes["concordia_ballast"] <= 1024
    assert not facts.undefined
    assert facts.constant_banks == {0}  # its own parameters


@pytest.mark.parametrize(
    ("name", "before", "body", "reason"),
    [
        ("static shared", "", "__shared__ uint64_t w[8]; w[threadIdx.x & 7] = lane; __syncthreads(); call->result = w[0];", "static shared memory"),
        ("constant", "__constant__ uint64_t table[8] = {1, 2};", "call->result = table[lane & 7];", "__constant__"),
        ("barrier 5", "", 'asm volatile("bar.sync 5;"); call->result = 1;', "barriers other than 0: 5"),
        ("named barrier", "", 'asm volatile("barrier.sync 3, 64;"); call->result = 1;', "barriers other than 0"),
        ("printf", 'extern "C" __device__ int printf(const char*, ...);', 'if (lane == 7) printf("x");', "vprintf"),
        ("trap", "", "if (call->task.arg == 7) __trap(); call->result = 1;", "do not return: trap"),
        ("exit", "", 'if (lane == 7) asm volatile("exit;"); call->result = 1;', "do not return: exit"),
        ("recursion", FIBONACCI, "if (lane == 0) call->result = fibonacci(call, call->task.arg);", "recursion, whose stack nobody knows: .*fibonacci"),
        ("mutual", MUTUAL, "if (lane == 0) call->result = odd(call, call->task.arg);", "recursion.*odd.*even"),
        ("stack", "", "uint64_t a[200]; for (int i = 0; i < 200; ++i) a[i] = call->scratch[i & 7]; a[lane % 200] += 1; call->result = a[call->task.arg % 200];", "bytes of stack"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 16 else "",
)  # fmt: skip
def test_lint_refuses_with_the_reason_when_a_handler_would_break_the_executor(
    compiler: CudaCompiler, name: str, before: str, body: str, reason: str
) -> None:
    with pytest.raises(HandlerRefused, match=reason):
        compiler.handler(handler(name, body, before))


DEEP = """__device__ __noinline__ uint64_t third(Call* call, uint64_t n) { return n * call->task.step; }
__device__ __noinline__ uint64_t second(Call* call, uint64_t n) { return third(call, n + 1) ^ third(call, n); }
"""


def test_calls_that_end_pass_the_lint(compiler: CudaCompiler) -> None:
    source = handler("deep", "if (lane == 0) call->result = second(call, 3) + third(call, 4) + second(call, 5);", DEEP)
    ptx, _ = compiler._ptx(source)
    assert len(re.findall(rb"\bcall\.uni\b", ptx)) >= 3  # the compiler left them calls
    compiler.handler(source)


DIVIDES = "call->result = call->task.arg / (call->task.step + lane);"


def test_compilers_own_routines_stay_when_a_handler_divides(compiler: CudaCompiler) -> None:
    facts = read_facts(compiler.handler(handler("divides", DIVIDES)).cubin)
    assert any("div_u64" in name for name in facts.functions)
    assert facts.dangling_calls == 0


def test_lint_refuses_when_the_linker_dropped_what_a_handler_calls(compiler: CudaCompiler) -> None:
    source = handler("divides", DIVIDES)
    ptx = nvrtc.compile_ptx(source.code(), name="divides", architecture="sm_90", include=KERNELS)
    cubin = nvrtc.link_cubin([ptx], name="divides", architecture="sm_90")  # without keep.cu
    with pytest.raises(HandlerRefused, match="1 calls to code that the linker dropped"):
        lint("divides", ptx=ptx, cubin=cubin, registers_max=nvrtc.REGISTERS_MAX)


def test_lint_refuses_when_the_abi_differs(compiler: CudaCompiler) -> None:
    text = PLAIN.format(before="", body="call->result = 1;").replace(
        '#include "call.h"', '#include "call.h"\n#define kAbiVersion (kAbiVersion + 1)'
    )
    with pytest.raises(HandlerRefused, match=f"built for ABI {abi.ABI_VERSION + 1}"):
        compiler.handler(HandlerSource.of("other abi", text=text))


def test_lint_refuses_when_the_source_is_no_handler(compiler: CudaCompiler) -> None:
    text = '#include "call.h"\nextern "C" __device__ uint64_t concordia_nothing = 1;\n'
    with pytest.raises(HandlerRefused, match="not a handler"):
        compiler.handler(HandlerSource.of("nothing", text=text))


def test_compile_error_carries_the_compilers_words_when_source_is_wrong(
    compiler: CudaCompiler,
) -> None:
    with pytest.raises(CompileError, match="no_such_thing"):
        compiler.handler(handler("wrong", "call->result = no_such_thing;"))


def test_compile_error_names_the_symbol_when_it_is_unresolved(compiler: CudaCompiler) -> None:
    source = handler(
        "unresolved", "call->result = elsewhere();", 'extern "C" __device__ uint64_t elsewhere();'
    )
    with pytest.raises(CompileError, match="elsewhere"):
        compiler.handler(source)


def test_cubin_is_refused_when_it_is_cut_or_no_cubin(compiler: CudaCompiler) -> None:
    cubin = compiler.handler(handler("plain", "call->result = 1;")).cubin
    for damaged in (b"", b"no cubin at all", cubin[: len(cubin) // 2]):
        with pytest.raises(CompileError, match="not a readable cubin"):
            read_facts(damaged)


def test_cached_code_is_the_same_when_built_again(tmp_path: pathlib.Path) -> None:
    source = handler("cached", "call->result = lane;")
    first = CudaCompiler("sm_90", KernelCache(tmp_path)).handler(source)
    names = sorted(path.name for path in tmp_path.iterdir())
    again = CudaCompiler("sm_90", KernelCache(tmp_path)).handler(source)
    assert again == first
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {pathlib.Path(name).suffix for name in names} == {".cubin", ".ptx"}


def test_digest_differs_when_only_a_constant_does(compiler: CudaCompiler) -> None:
    text = '#include "call.h"\nHANDLER { call->result = VALUE; }\n'
    one, two = (
        compiler.handler(HandlerSource.of("value", {"VALUE": value}, text=text)).digest
        for value in (1, 2)
    )
    assert one != two

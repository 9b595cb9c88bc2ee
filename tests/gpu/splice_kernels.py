"""Kernels whose ways in and out differ, for tests of hooks in machine code.

Owns: their CUDA text, how each is launched, and their compilation without a GPU for both generations of cubins. Each has the signature
`(uint32_t* out, const uint32_t* in, uint32_t count)` and, for the same input, the same output bytes whatever the order of threads.
Called by test_instrument_splice.py and by scenarios_splice.py.
"""

from __future__ import annotations

import functools
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from concordia.device.nvrtc import compile_ptx

SIGNATURE = "(uint32_t* out, const uint32_t* in, uint32_t count)"
HEAD = """typedef unsigned int uint32_t; typedef unsigned long long uint64_t;
#define KERNEL(name) extern "C" __global__ void name(uint32_t* out, const uint32_t* in, uint32_t count)
__device__ __forceinline__ uint32_t place() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __noinline__ uint32_t mix(uint32_t x) { for (int i = 0; i < 3; ++i) x = x * 1664525u + 1013904223u; return x; }
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel; `exit_reason` is part of why it gets no exit hook, empty when it gets one."""

    name: str
    body: str
    grid: tuple[int, int, int] = (150, 1, 1)
    block: tuple[int, int, int] = (256, 1, 1)
    architecture: str = "sm_90"
    attributes: str = ""
    exit_reason: str = ""
    launch: str = ""  # "cooperative", "pdl" or a plain one

    @property
    def cta_count(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def thread_count(self) -> int:
        return self.cta_count * self.block[0] * self.block[1] * self.block[2]

    @property
    def count(self) -> int:
        """Words that the kernel is told of; one of them is launched with more threads."""
        return self.thread_count - 77 * (self.name == "plain")

    @property
    def words(self) -> int:
        """Of its output, and as many of its input."""
        return 2 * self.thread_count + 1024

    def begin(self, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What its output is before: anything, but where the CTAs of a grid count each other. Begun with another number, some wait for ever."""
        found = inputs[::-1].copy()
        found[self.count] = 0
        return found

    @property
    def definition(self) -> str:
        return f'extern "C" __global__ void {self.attributes} {self.name}{SIGNATURE} {{ {self.body} }}\n'


def _asm(text: str) -> str:
    return f'asm volatile("{text}" ::: "memory");'


CLUSTER_WAIT = _asm("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;")

KERNELS = [
    Kernel("plain", "uint32_t i = place(); if (i >= count) return; out[i] = in[i] * 3 + 1;", grid=(151, 1, 1)),
    Kernel("nothing", ""),
    Kernel("one_thread", "if (count) out[blockIdx.x] = in[blockIdx.x] + 7;", block=(1, 1, 1)),
    Kernel(
        "leaves_in_a_loop",
        "uint32_t i = place(), x = in[i]; for (uint32_t k = 0; k < 64; ++k) { if (x % 61 == k) { out[i] = x ^ k; return; } x = x * 3 + k; } out[i] = x;",
    ),
    Kernel(
        "lanes_leave_before_a_barrier",
        "__shared__ uint32_t tile[256]; uint32_t t = threadIdx.x, i = place(); tile[t] = in[i]; __syncthreads(); if (in[i] & 1) { out[i] = tile[t]; return; }"
        " uint32_t alive = __activemask(); uint32_t x = tile[t ^ 1] + __popc(alive) + __shfl_sync(alive, in[i], __ffs(alive) - 1); __syncthreads(); tile[t] = x;"
        " __syncthreads(); out[i] = tile[t] + tile[(t + 32) & 255];",
    ),
    Kernel(
        "warps_leave_before_a_barrier",
        "__shared__ uint32_t tile[256]; uint32_t t = threadIdx.x, i = place(); tile[t] = in[i]; if (t >= 128) return; for (int k = 0; k < 8; ++k) {"
        " __syncthreads(); uint32_t x = tile[(t + 1) & 127]; __syncthreads(); tile[t] = x * 5 + k; } out[i] = tile[t];",
    ),
    Kernel("atomics", "uint32_t i = place(); atomicAdd(&out[in[i] % 97], i); atomicMax(&out[100 + in[i] % 31], in[i]);"),
    Kernel(
        "three_dimensions",
        "uint32_t b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x, t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;"
        " uint32_t i = b * blockDim.x * blockDim.y * blockDim.z + t; out[i] = mix(in[i]) + b;",
        grid=(5, 4, 3),
        block=(7, 3, 5),
    ),
    Kernel(
        "stores_just_before_leaving",
        "uint32_t i = place() % (count / 16); const uint4* s = (const uint4*)in; uint4* d = (uint4*)out; uint4 a = s[4 * i], b = s[4 * i + 1], c = s[4 * i + 2],"
        " e = s[4 * i + 3]; d[4 * i] = b; d[4 * i + 1] = c; d[4 * i + 2] = e; d[4 * i + 3] = a;",
        grid=(1200, 1, 1),
    ),
    Kernel(
        "many_registers",
        "uint32_t i = place(), r[96]; for (int k = 0; k < 96; ++k) r[k] = in[(i + 13 * k) % count]; for (int j = 0; j < 4; ++j)"
        " for (int k = 0; k < 96; ++k) r[k] = r[k] * r[(k + 17) % 96] + r[(k + 5) % 96]; uint32_t x = 0; for (int k = 0; k < 96; ++k) x ^= r[k]; out[i] = x;",
    ),
    Kernel(
        "stack",
        "uint32_t i = place(), r[64]; for (uint32_t k = 0; k < 64; ++k) r[k] = in[(i + k) % count]; uint32_t x = i;"
        " for (int k = 0; k < 50; ++k) { x = r[x % 64] + k; r[(x >> 3) % 64] ^= x; if (x % 1009 == 0) { out[i] = x; return; } } out[i] = x;",
    ),
    Kernel(
        "table_of_branches",
        "uint32_t i = place(), x = in[i]; switch (x & 15) { case 0: x = mix(x); break; case 1: x = x / 7; break; case 2: x = x % 11; break; case 3: x = __brev(x);"
        " break; case 4: out[i] = 4; return; case 5: x = in[(i + 9) % count]; break; case 6: x *= x; break; case 7: x = __popc(x); break; case 8: out[i] = mix(x) + 1;"
        " return; case 9: x = x << 3; break; case 10: x = ~x; break; default: x += 17; } out[i] = x;",
    ),
    Kernel("floats", "uint32_t i = place(); float x = in[i] % 1000; for (int k = 0; k < 9; ++k) { x = sinf(x) + sqrtf(x * x + 1.f) / (x + 3.f); if (x > 2.9f) return; } out[i] = __float_as_uint(x);"),
    Kernel(
        "cluster",
        "__shared__ uint32_t mine; if (threadIdx.x == 0) mine = in[blockIdx.x] + 5;" + CLUSTER_WAIT + " uint32_t rank, peer, x;"
        ' asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)); asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) :'
        ' "r"((uint32_t)__cvta_generic_to_shared(&mine)), "r"(rank ^ 1)); asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(peer) : "memory");'
        + CLUSTER_WAIT + " if (x % 5 == 0) return; out[place()] = x + in[place()];",
        attributes="__cluster_dims__(2, 1, 1)",
    ),
    Kernel(
        "whole_grid_waits",
        "uint32_t i = place(); out[i] = mix(in[i]); __threadfence(); __syncthreads(); if (threadIdx.x == 0) { uint32_t turn = atomicAdd(&out[count], 1) / gridDim.x + 1;"
        " while (*(volatile uint32_t*)&out[count] < turn * gridDim.x) {} } __syncthreads(); __threadfence(); out[count + 1 + i] = out[(i + 4 * blockDim.x) % count] + 1;",
        grid=(132, 1, 1),
        launch="cooperative",
    ),
    Kernel(
        "dependent_launch",
        _asm("griddepcontrol.wait;") + " uint32_t i = place(); if (i % 3 == 0) return; out[i] = out[i] * 5 + in[i];" + _asm("griddepcontrol.launch_dependents;") + " out[i] += 1;",
        launch="pdl",
    ),
    Kernel(
        "fewer_registers_than_before",
        "uint32_t i = place(); __shared__ uint32_t tile[256]; if (threadIdx.x < 128) { " + _asm("setmaxnreg.dec.sync.aligned.u32 24;") + " tile[threadIdx.x] = in[i] + 1;"
        + _asm("bar.sync 1, 256;") + " if (in[i] & 2) return; out[i] = in[i]; } else { " + _asm("setmaxnreg.inc.sync.aligned.u32 152;") + _asm("bar.sync 1, 256;")
        + " uint32_t r[48]; for (int k = 0; k < 48; ++k) r[k] = tile[(threadIdx.x + k) & 127]; for (int k = 0; k < 48; ++k) r[k] = r[k] * r[(k + 7) % 48];"
        " uint32_t x = 0; for (int k = 0; k < 48; ++k) x ^= r[k]; out[i] = x; }",
        architecture="sm_90a",
        attributes="__maxnreg__(88)",
    ),
    Kernel(
        "matrix_product",
        "__shared__ __align__(1024) uint32_t tile[1024]; for (uint32_t k = threadIdx.x; k < 1024; k += 128) tile[k] = (in[(place() + k) % count] & 0x03ff03ff) | 0x38003800;"
        " __syncthreads(); uint64_t at = __cvta_generic_to_shared(tile), d = ((at >> 4) & 0x3fff) | (8ull << 16) | (16ull << 32); float a = 0, b = 0, c = 0, e = 0;"
        + _asm("fence.proxy.async; wgmma.fence.sync.aligned;")
        + ' asm volatile("{ .reg .pred p; setp.ne.u32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0; }"'
        ' : "+f"(a), "+f"(b), "+f"(c), "+f"(e) : "l"(d), "l"(d)); '
        + _asm("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;")
        + ' asm volatile("" : "+f"(a), "+f"(b), "+f"(c), "+f"(e)); out[place()] = __float_as_uint(a) ^ __float_as_uint(b) ^ __float_as_uint(c) ^ __float_as_uint(e);',
        block=(128, 1, 1),
        architecture="sm_90a",
        exit_reason="matrix product",
    ),
]  # fmt: skip
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
# Whose stores are not marked, and why.
LEFT = {
    "many_registers": "marks: 128 registers of 1024 threads: a mark needs 16 more",
    "fewer_registers_than_before": "marks: it changes how many registers its warps have",
}


@functools.cache
def new_cubin(name: str = "") -> bytes:
    """One kernel, or all, in the generation of CUDA 13, as NVRTC makes it for a program."""
    from cuda.bindings import nvrtc

    text, architecture = _text(name)
    status, program = nvrtc.nvrtcCreateProgram((HEAD + text).encode(), b"kernels.cu", 0, [], [])
    assert int(status) == 0, status
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert int(status) == 0, status
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytearray(size)
    (status,) = nvrtc.nvrtcGetCUBIN(program, cubin)
    assert int(status) == 0, status
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


@functools.cache
def old_cubin(name: str = "") -> bytes:
    """The same in the generation of CUDA 12, by the assembler that Triton's wheel has."""
    source, architecture = _text(name)
    text = re.sub(rb"^\.version 9\.\d+", b".version 8.6", compiled(source, architecture), flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        ptx, target = pathlib.Path(folder) / "kernel.ptx", pathlib.Path(folder) / "kernel.cubin"
        ptx.write_bytes(text)
        command = [str(vendor_tool("ptxas")), f"-arch={architecture}", "-o", str(target), str(ptx)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return target.read_bytes()


def compiled(text: str, architecture: str = "sm_90") -> bytes:
    """PTX of any text, by NVRTC, as CUDA 13 writes it."""
    nowhere = pathlib.Path(tempfile.gettempdir())
    return compile_ptx(HEAD + text, name="kernels.cu", architecture=architecture, include=nowhere)


def _text(name: str) -> tuple[str, str]:
    kernels = [BY_NAME[name]] if name else KERNELS
    architecture = max(kernel.architecture for kernel in kernels)
    return "".join(kernel.definition for kernel in kernels), architecture


def vendor_tool(name: str) -> pathlib.Path:
    """ptxas of CUDA 12 or nvdisasm of CUDA 13, out of Triton's wheel."""
    import triton

    return pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name

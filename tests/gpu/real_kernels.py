"""A plain program that runs real kernels of many origins and prints a digest of each one's bytes.

Knows nothing of Concordia: tests run it as it is and under `concordia run`, and compare. Deterministic kernels only, with fixed seeds.
`real_kernels.py GROUP...`; groups that need a package which is missing are named as missing in the answer. The last line is JSON:
{"digests": {name: sha256}, "missing": {group: reason}}.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator

import torch

Results = Iterator[tuple[str, torch.Tensor]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    maker = torch.Generator(device="cuda").manual_seed(1234 + seed)
    return torch.randn(*shape, generator=maker, device="cuda").to(dtype)


def of_torch() -> Results:
    x, half = random(1024, 1030), random(512, 4096, seed=1, dtype=torch.bfloat16)
    yield "randn", x
    yield "elementwise", torch.sin(x) * 3 + torch.exp(-x.abs()).sqrt()
    yield "softmax", torch.softmax(half.float(), dim=-1)
    yield "layer_norm", torch.nn.functional.layer_norm(half, (4096,))
    yield "sum", x.sum(dim=0)
    yield "mean_all", x.mean().reshape(1)
    yield "cumsum", x.cumsum(dim=1)
    yield "sort", x.sort(dim=1).values
    yield "topk", x.topk(17, dim=1).indices
    yield "index", x[torch.arange(1023, -1, -3, device="cuda")]
    yield "scatter", torch.zeros(4096, dtype=torch.int64, device="cuda").scatter_add_(
        0, torch.arange(100000, device="cuda") % 4096, torch.ones(100000, dtype=torch.int64, device="cuda")
    )
    yield "unique", torch.unique((x * 10).long())
    yield "where", torch.where(x > 0, x, -x).clamp(0, 1)
    yield "transpose", x.t().contiguous()
    yield "embedding", torch.nn.functional.embedding(torch.arange(777, device="cuda") % 512, half)
    yield "gelu", torch.nn.functional.gelu(half)
    yield "dropout", _seeded(lambda: torch.nn.functional.dropout(x, 0.3, training=True))
    yield "matmul_bf16", half @ random(4096, 1024, seed=2, dtype=torch.bfloat16)
    yield "matmul_fp32", x @ random(1030, 256, seed=3)
    yield "attention", _attention()
    yield "convolution", torch.nn.functional.conv2d(random(8, 32, 33, 31, seed=4), random(64, 32, 3, 3, seed=5))
    yield "fourier", torch.view_as_real(torch.fft.rfft(x))


def _seeded(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.cuda.manual_seed(99)
    return make()


def _attention() -> torch.Tensor:
    q, k, v = (random(2, 8, 256, 64, seed=s, dtype=torch.bfloat16) for s in (6, 7, 8))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def of_training() -> Results:
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)).cuda()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(8):
        loss = (model(random(128, 256, seed=step)) - random(128, 64, seed=100 + step)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    yield "losses", loss.detach().reshape(1)
    for i, parameter in enumerate(model.parameters()):
        yield f"parameter_{i}", parameter.detach()


def of_graphs() -> Results:
    static = random(1024, 1024, seed=9)
    out = torch.zeros_like(static)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            out.copy_(torch.tanh(static @ static) + out * 0.5)
    torch.cuda.synchronize()
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(torch.tanh(static @ static) + out * 0.5)
    for _ in range(20):
        graph.replay()
    yield "replayed", out


def of_triton() -> Results:
    from triton_kernels import add, matmul, row_softmax

    x, y = random(1 << 20, seed=10), random(1 << 20, seed=11)
    yield "add", add(x, y)
    yield "softmax", row_softmax(random(512, 1000, seed=12))
    yield "matmul", matmul(random(512, 512, seed=13, dtype=torch.float16), random(512, 256, seed=14, dtype=torch.float16))


def of_nvrtc() -> Results:
    import cupy

    source = r"""
    extern "C" __global__ void steps(float* out, const float* in, int n) {
      __shared__ float part[256];
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      part[threadIdx.x] = i < n ? in[i] : 0.f;
      __syncthreads();
      if (i >= n) return;
      float sum = part[threadIdx.x];
      for (int k = 1; k <= (threadIdx.x & 7); ++k) sum += part[(threadIdx.x + k) & 255] * 0.5f;
      if (sum < 0) { out[i] = -sum; return; }
      out[i] = sum;
    }
    """
    kernel = cupy.RawModule(code=source, options=("--std=c++17",)).get_function("steps")
    given = random(100_003, seed=15)
    out = torch.zeros_like(given)
    pointers = [cupy.ndarray(given.shape, cupy.float32, memptr=_pointer(cupy, tensor)) for tensor in (out, given)]
    torch.cuda.synchronize()
    kernel(((100_003 + 255) // 256,), (256,), (*pointers, cupy.int32(100_003)))
    cupy.cuda.runtime.deviceSynchronize()
    yield "steps", out


def _pointer(cupy: object, tensor: torch.Tensor) -> object:
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), tensor.numel() * 4, tensor)  # type: ignore[attr-defined]
    return cupy.cuda.MemoryPointer(memory, 0)  # type: ignore[attr-defined]


def of_vllm() -> Results:
    import vllm._custom_ops as ops
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    x, weight = random(129, 2048, seed=16, dtype=torch.bfloat16), random(2048, seed=17, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    ops.rms_norm(out, x, weight, 1e-6)
    yield "rms_norm", out
    a, b = x.clone(), random(129, 2048, seed=18, dtype=torch.bfloat16)
    ops.fused_add_rms_norm(a, b, weight, 1e-6)
    yield "fused_add_rms_norm", a
    yield "residual", b
    gated = torch.empty(129, 1024, dtype=torch.bfloat16, device="cuda")
    torch.ops._C.silu_and_mul(gated, x)
    yield "silu_and_mul", gated
    q, k = random(129, 32 * 64, seed=19, dtype=torch.bfloat16), random(129, 8 * 64, seed=20, dtype=torch.bfloat16)
    ops.rotary_embedding(torch.arange(129, device="cuda"), q, k, 64, random(4096, 64, seed=21, dtype=torch.bfloat16), True)
    yield "rotary_q", q
    yield "rotary_k", k
    cache = torch.zeros(2, 64, 16, 8, 64, dtype=torch.bfloat16, device="cuda")
    one = torch.ones(1, device="cuda")
    slots = torch.arange(129, device="cuda") * 5 % (64 * 16)
    ops.reshape_and_cache_flash(k.view(129, 8, 64), k.view(129, 8, 64) * 2, cache[0], cache[1], slots, "auto", one, one)
    yield "cache", cache
    lengths = torch.tensor([0, 100, 129], dtype=torch.int32, device="cuda")
    answer = flash_attn_varlen_func(
        q.view(129, 32, 64), k.view(129, 8, 64), k.view(129, 8, 64) * 0.5, max_seqlen_q=100, cu_seqlens_q=lengths,
        max_seqlen_k=100, cu_seqlens_k=lengths, causal=True, fa_version=3,
    )  # fmt: skip
    yield "flash_attention_3", answer[0] if isinstance(answer, tuple) else answer


def of_nccl() -> Results:
    import torch.multiprocessing

    if torch.cuda.device_count() < 2:
        raise ModuleNotFoundError("a second GPU")
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    children = [context.Process(target=_rank, args=(rank, queue)) for rank in range(2)]
    for child in children:
        child.start()
    said = dict(queue.get() for _ in children)
    for child in children:
        child.join(60)
        if child.exitcode != 0:
            raise RuntimeError(f"a rank ended with {child.exitcode}")
    for rank in sorted(said):
        for i, digest in enumerate(said[rank]):
            yield f"rank_{rank}_{i}", torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)


def _rank(rank: int, queue: object) -> None:
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29677", NCCL_NVLS_ENABLE="0")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2)
    digests = []
    for size in (7, 4096, 1 << 20, (1 << 22) + 3):
        values = torch.arange(size, device="cuda", dtype=torch.float32) * (rank + 1) / 7
        dist.all_reduce(values)
        digests.append(digest_of(values))
    parts = [torch.empty(1000, device="cuda") for _ in range(2)]
    dist.all_gather(parts, torch.full((1000,), float(rank), device="cuda"))
    digests.append(digest_of(torch.cat(parts)))
    queue.put((rank, digests))  # type: ignore[attr-defined]
    dist.destroy_process_group()


def digest_of(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


GROUPS: dict[str, Callable[[], Results]] = {
    "torch": of_torch, "training": of_training, "graphs": of_graphs, "triton": of_triton, "nvrtc": of_nvrtc, "vllm": of_vllm, "nccl": of_nccl,
}  # fmt: skip


def main(groups: list[str]) -> int:
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    digests: dict[str, str] = {}
    missing: dict[str, str] = {}
    for group in groups or list(GROUPS):
        try:
            for name, tensor in GROUPS[group]():
                digests[f"{group}.{name}"] = digest_of(tensor)
        except ImportError as error:
            missing[group] = str(error)
    print(json.dumps({"digests": digests, "missing": missing}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

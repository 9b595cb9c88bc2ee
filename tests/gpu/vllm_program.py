"""A vLLM program that knows nothing of us: `vllm_program.py MODEL_FOLDER WORKERS PROCESSES [ROUNDS [BACKEND]]`; one line of JSON with what it generated.

PROCESSES 1: the engine and its workers are processes of their own, as `vllm serve` has them; 0: all of it is this one. ROUNDS: how often it
answers eight prompts, each time others. BACKEND: of its attention, by vLLM's name for it; without, vLLM chooses. It is run under `concordia run` and without by test_gpu_program_vllm.py and
test_gpu_under_framework.py.
"""

from __future__ import annotations

import json
import os
import sys
import time

from scenarios_vllm import QUICK, SETTINGS

LAYERS = 12  # of the shape that tests use
# A layer's KV is one tensor, and gets memory of its own and of this size when nothing that is cached is as large: what PyTorch caches of the
# profile run is 20 MiB at most when steps are as short as this (else a layer's KV lies in the memory of what an MLP left).
KV_LAYER_BYTES = 22 << 20
STEP_TOKENS = 512


def prompts_of(turn: int) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": [(37 * i + 5 * j * (i + 1) + 11 * turn) % 256 for j in range(40 + 16 * (i % 3))]} for i in range(8)]


def main(folder: str, workers: int, processes: int, rounds: int, backend: str | None) -> int:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(processes),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    settings = SETTINGS | {"kv_cache_memory_bytes": LAYERS * KV_LAYER_BYTES, "max_num_batched_tokens": STEP_TOKENS, "compilation_config": QUICK}
    settings |= {"attention_backend": backend} if backend else {}
    engine = LLM(folder, seed=7, tensor_parallel_size=workers, **settings)
    asked = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0)
    tokens = []
    started = time.monotonic()
    for turn in range(rounds):
        answers = engine.generate(prompts_of(turn), asked, use_tqdm=False)
        tokens += [list(answer.outputs[0].token_ids) for answer in answers]
    print(f"{rounds} rounds took {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps({"tokens": tokens}), flush=True)
    return 0


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(given.get(4, 1)), given.get(5)))

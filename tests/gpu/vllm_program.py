"""A vLLM program that knows nothing of us: `vllm_program.py MODEL_FOLDER WORKERS PROCESSES`; one line of JSON with what it generated.

PROCESSES 1: the engine and its workers are processes of their own, as `vllm serve` has them; 0: all of it is this one. It is run under
`concordia run` and without by test_gpu_program_vllm.py and test_gpu_under_framework.py.
"""

from __future__ import annotations

import json
import os
import sys

from scenarios_vllm import QUICK, SETTINGS

KV_BYTES = 192 << 20


def main(folder: str, workers: int, processes: int) -> int:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(processes),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    settings = SETTINGS | {"kv_cache_memory_bytes": KV_BYTES, "compilation_config": QUICK}
    engine = LLM(folder, seed=7, tensor_parallel_size=workers, **settings)
    prompts = [
        {"prompt_token_ids": [(37 * i + 5 * j * (i + 1)) % 256 for j in range(40 + 16 * (i % 3))]}
        for i in range(8)
    ]
    answers = engine.generate(
        prompts, SamplingParams(max_tokens=400, ignore_eos=True, temperature=0), use_tqdm=False
    )
    print(
        json.dumps({"tokens": [list(answer.outputs[0].token_ids) for answer in answers]}),
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))

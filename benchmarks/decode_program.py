"""A plain vLLM program for benchmarks/program_cost.py: it decodes, and says how fast.

`decode_program.py MODEL_FOLDER TOKENS`: one engine in this process, dummy weights, 32 requests of
128 tokens. Says {"start_s"} once it is warm; then, for each line that it is given, decodes and says
{"tokens_per_s", "digest"}; ends with its input. Knows nothing of Concordia, so that it can be run
under `concordia run` and without.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

REQUESTS = 32
PROMPT_TOKENS = 128


def main(folder: str, tokens: int) -> int:
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, dtype="bfloat16", load_format="dummy", max_model_len=4096, max_num_seqs=64,
        # two of these live on one GPU, and vLLM wants this part of it free before it starts
        gpu_memory_utilization=0.3, kv_cache_memory_bytes=4 << 30,
        enable_prefix_caching=False, disable_log_stats=True, seed=7,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )  # fmt: skip
    ready_s = time.perf_counter() - started
    prompts = [
        {"prompt_token_ids": [(7 * i + 3 * j * (i + 1)) % 256 for j in range(PROMPT_TOKENS)]}
        for i in range(REQUESTS)
    ]
    parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)

    def window() -> dict[str, Any]:
        begun = time.perf_counter()
        answers = engine.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - begun
        said = str([list(answer.outputs[0].token_ids) for answer in answers])
        digest = hashlib.sha256(said.encode()).hexdigest()
        return {"tokens_per_s": REQUESTS * tokens / seconds, "digest": digest}

    window()
    print(json.dumps({"start_s": ready_s}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(window()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

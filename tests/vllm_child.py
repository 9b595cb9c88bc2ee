"""One vLLM engine in a process of its own, driven by a script of steps; prints one JSON line per step.

Called by tests/test_vllm_engine.py as `python vllm_child.py SCRIPT.json`. The engine runs in this very process (no core process), so that
a batch is formed the same way every time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Threads of one OpenMP team spin for each other: with more of them than idle cores a step takes a hundred times as long.
os.environ["OMP_NUM_THREADS"] = "1"


def say(**facts: Any) -> None:
    print("CHILD " + json.dumps(facts), flush=True)


def generate(llm: Any, step: dict[str, Any]) -> None:
    from vllm import SamplingParams

    prompts, parameters = [], []
    for asked in step["requests"]:
        extra = {"kv_transfer_params": {"concordia": asked["concordia"]}} if "concordia" in asked else None
        prompts.append({"prompt_token_ids": asked["prompt"]})
        parameters.append(
            SamplingParams(
                temperature=0,
                logprobs=0,
                max_tokens=asked["count"],
                ignore_eos=True,
                extra_args=extra,
            )
        )
    began = time.perf_counter()
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    say(
        seconds=time.perf_counter() - began,
        answers=[
            {
                "tokens": list(o.outputs[0].token_ids),
                "logprobs": [next(iter(d.values())).logprob for d in o.outputs[0].logprobs],
                "cached": o.num_cached_tokens,
            }
            for o in outputs
        ],
    )


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        script = json.load(file)
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from concordia.integrations.vllm.compat import allow_tiles

    allow_tiles()  # the connector asks where there is one; here there need not be
    transfer = script.pop("transfer", None)
    llm = LLM(
        **script["engine"],
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
        enforce_eager=True,
        disable_log_stats=True,
    )
    say(started=True)
    for step in script["steps"]:
        generate(llm, step)
    llm.llm_engine.engine_core.shutdown()
    say(ended=True)


if __name__ == "__main__":
    main()

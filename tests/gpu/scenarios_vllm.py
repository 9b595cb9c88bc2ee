"""Scenarios of a real vLLM engine on a GPU whose decode runs in full graphs, in the process that asks."""

from __future__ import annotations

import os
import time
from typing import Any

SETTINGS = {
    "dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 8, "block_size": 16, "kv_cache_memory_bytes": 64 << 20,
    # an engine refuses to start where less of the GPU is free than this, whatever it takes: others may be on it
    "gpu_memory_utilization": 0.05,
    "enable_prefix_caching": False, "disable_log_stats": True,
}  # fmt: skip
# without torch.compile an engine starts in seconds; with it the graphs are made in the same way
QUICK = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
_STARTED = time.monotonic()


def _say(words: str) -> None:
    """How far it has come, for whoever reads why it ended."""
    print(f"SCENARIO {time.monotonic() - _STARTED:.1f} s: {words}", flush=True)


class _Counted:
    """What becomes of steps and places, counted beside what the connector does."""

    def __init__(self) -> None:
        from concordia.integrations.vllm.graph_places import GraphPlaces
        from concordia.runtime.stream_tasks import StreamTasks

        self.replayed = self.launched = self.captured = self.enqueued = 0
        end_step, enqueue = GraphPlaces.end_step, StreamTasks.enqueue

        def counted_step(places: Any) -> bool:
            self.launched += places._is_handed and places._is_layered
            self.replayed += places._is_handed and not places._is_layered
            return end_step(places)

        def counted_place(tasks: Any, captured: int | None = None) -> None:
            self.captured += captured is not None
            self.enqueued += captured is None
            enqueue(tasks, captured)

        GraphPlaces.end_step = counted_step  # type: ignore[method-assign]
        StreamTasks.enqueue = counted_place  # type: ignore[method-assign]


def engine(
    *, device: str, journal: str, model: str, residency: str, rounds: list[list[dict[str, Any]]], replica: int, quick: bool = True
) -> dict[str, Any]:
    """Answers of an engine that is asked round by round, where its appends ran, and why."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
    counted = _Counted()
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    _say(f"vllm is imported; an engine with residency {residency} starts")
    extra = {"journal": journal, "replica": replica, "device": device, "residency": residency, "prefix_restore": False}
    llm = LLM(
        model=model,
        **SETTINGS,
        compilation_config=QUICK if quick else {},
        kv_transfer_config=KVTransferConfig(
            kv_connector="ConcordiaConnector",
            kv_connector_module_path="concordia.integrations.vllm.connector",
            kv_role="kv_both",
            kv_connector_extra_config=extra,
        ),
    )
    _say("it has started")
    connector = get_kv_transfer_group()
    places = connector._worker._places
    answers, seconds = [], []
    for requests in rounds:
        started = time.monotonic()
        outputs = llm.generate(
            [{"prompt_token_ids": asked["prompt"]} for asked in requests],
            [
                SamplingParams(
                    temperature=0, logprobs=0, max_tokens=asked["count"], ignore_eos=True,
                    extra_args={"kv_transfer_params": {"concordia": asked["concordia"]}},
                )
                for asked in requests
            ],
            use_tqdm=False,
        )  # fmt: skip
        seconds.append(time.monotonic() - started)
        _say(f"round {len(seconds)} of {len(rounds)} took {seconds[-1]:.1f} s; door: {connector._door.reason}")
        answers.append(
            [
                {
                    "tokens": list(out.outputs[0].token_ids),
                    "logprobs": [next(iter(d.values())).logprob for d in out.outputs[0].logprobs],
                }
                for out in outputs
            ]
        )
    found: dict[str, Any] = {
        "answers": answers, "seconds": seconds, "door": connector._door.reason,
        "places": places.count if places else 0, "why_not": places.why_not if places else "there are none",
        "replayed": counted.replayed, "launched": counted.launched, "captured": counted.captured, "enqueued": counted.enqueued,
    }  # fmt: skip
    if found["door"] is None:
        found["residency"] = connector._worker._checkpointer.runtime.stats().residency
        found["pending"] = places._tasks.pending_count if places else 0
    llm.llm_engine.engine_core.shutdown()
    _say("it has ended")
    return found


def shut(device: str, journal: str, model: str, replica: int) -> dict[str, Any]:
    """The door shuts while graphs hold our places: the engine goes on with the same tokens."""
    from concordia.integrations.vllm.worker_side import WorkerSide

    prompts = [[(7 * i + j) % 256 for j in range(40)] for i in range(4)]
    asked = [{"prompt": prompt, "count": 40, "concordia": {"request": f"shut-{replica}-{i}"}} for i, prompt in enumerate(prompts)]
    before_step = WorkerSide.before_step
    steps = 0

    def failing(side: Any, meta: Any) -> None:
        nonlocal steps
        steps += 1
        before_step(side, meta)
        if steps == 25:
            raise RuntimeError("as planned")

    WorkerSide.before_step = failing  # type: ignore[method-assign]
    rounds = [asked, [dict(one, concordia=False) for one in asked], [dict(one, concordia=False) for one in asked]]
    return engine(device=device, journal=journal, model=model, residency="stream", rounds=rounds, replica=replica)

"""A logits processor that hangs when told to: a forward that never ends inside a real engine, without a signal that /proc would show.

Given to vLLM by `--logits-processors hanging_processor:HangingProcessor`; HANG_FILE names a file that holds the session which shall hang.
"""

from __future__ import annotations

import os
import pathlib
import time
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor


class HangingProcessor(LogitsProcessor):
    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.trigger = pathlib.Path(os.environ["HANG_FILE"])

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        return None

    def apply(self, logits: Any) -> Any:
        while self.trigger.exists() and self.trigger.read_text() == str(os.getsid(0)):
            time.sleep(0.05)
        return logits

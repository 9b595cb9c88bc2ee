"""A logits processor that raises when told to: a forward that fails inside a real engine.

Owns: `RaisingProcessor`, given to vLLM by `--logits-processors
concordia.testing.raising:RaisingProcessor`. Promises: without the trigger file named by
CONCORDIA_TEST_RAISE_FILE it changes nothing. It never touches a logit.
"""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor

from concordia.testing.fault_plan import RAISE_FILE_ENV

if TYPE_CHECKING:
    import torch


class RaisingProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM ships no types here
    """Raises RuntimeError once, in the session whose id the trigger file holds."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        path = os.environ.get(RAISE_FILE_ENV)
        self.trigger = pathlib.Path(path) if path else None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        return None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.trigger is not None and self.trigger.exists():
            wanted = self.trigger.read_text(encoding="utf-8").strip()
            if wanted == str(os.getsid(0)):
                self.trigger.unlink(missing_ok=True)
                raise RuntimeError("forward raised on purpose")
        return logits

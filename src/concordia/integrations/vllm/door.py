"""The guest door: where our errors stop.

Owns: the one `except Exception` between Concordia and the engine it lives in. Promises: nothing
that goes wrong behind the door reaches the engine, unless going on could change KV bytes
(RestoreUnfinished); the first time it does, protection goes off for this side of this engine, with
one log line that says where and why, and stays off. Called by the connector around every entry
point. It does not decide what the engine is told instead: the caller names that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from concordia.errors import RestoreUnfinished

# below vLLM's root, so that its handlers and levels apply
logger = logging.getLogger("vllm.concordia")

P = ParamSpec("P")
T = TypeVar("T")


class GuestDoor:
    """Stays open until something behind it fails."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.reason: str | None = None
        self._on_shut: list[Callable[[str], None]] = []

    @property
    def is_open(self) -> bool:
        return self.reason is None

    def on_shut(self, action: Callable[[str], None]) -> None:
        """What to do, once, when the door shuts; its own failures are ignored."""
        self._on_shut.append(action)

    def call(
        self, entry: str, otherwise: T, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`action`'s answer, or `otherwise` when the door is shut or shuts now; lets
        RestoreUnfinished through, for then no other answer is right.
        """
        if self.reason is not None:
            return otherwise
        try:
            return action(*args, **kwargs)
        except Exception as error:
            self.shut(f"{entry}: {type(error).__name__}: {error}", cause=error)
            if isinstance(error, RestoreUnfinished):
                raise
            return otherwise

    def leave(self, entry: str, action: Callable[[], None]) -> None:
        """Give back what is held, also behind a shut door."""
        try:
            action()
        except Exception as error:
            logger.warning(
                "Concordia: %s of %s failed: %s: %s", entry, self.label, type(error).__name__, error
            )

    def shut(self, reason: str, *, cause: BaseException | None = None) -> None:
        """Switch protection off for good, and say so."""
        if self.reason is not None:
            return
        self.reason = reason
        logger.error(
            "Concordia protection is OFF for %s from here: %s. The engine %s.",
            self.label,
            reason,
            "ends" if isinstance(cause, RestoreUnfinished) else "goes on without it",
            exc_info=cause,
        )
        for action in self._on_shut:
            try:
                action(reason)
            except Exception:
                logger.exception(
                    "Concordia could not record that protection is off for %s", self.label
                )

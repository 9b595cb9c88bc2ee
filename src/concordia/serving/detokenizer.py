"""Token ids of one answer to its text, and where a stop string ends it.

Owns: the text of one answer. Promises: the text depends on prompt and ids alone, never on how they
were cut into chunks or on which replica made them; half a character is never given out; what is
given out is never taken back, so text that could become a stop string is held until it is known.
Called by a flight for every chunk. Does not know what a fault is: a seam is one more boundary
between chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from tokenizers.decoders import DecodeStream

from concordia.serving.tokenizer import Tokenizer

_INVALID_PREFIX: Final = "Invalid prefix encountered"
log = logging.getLogger(__name__)


class Detokenizer:
    """The growing text of one answer; `text` is all of it, `take` gives what has become certain
    since the last call.
    """

    __slots__ = (
        "_given",
        "_held",
        "_is_after_special",
        "_joins_special",
        "_min_tokens",
        "_skips_special",
        "_stop",
        "_stream",
        "_tokenizer",
        "count",
        "includes_stop",
        "text",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        skips_special: bool = True,
        has_spaces: bool = True,
        stop: tuple[str, ...] = (),
        includes_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.text = ""
        self.count = 0  # ids pushed so far
        self.includes_stop = includes_stop
        self._tokenizer = tokenizer
        self._skips_special = skips_special
        self._stream = tokenizer.stream(prompt, skips_special=skips_special)
        self._joins_special = not (skips_special or has_spaces) and bool(tokenizer.added)
        self._is_after_special = False
        self._stop = stop
        self._min_tokens = min_tokens
        # A stop string that is to be left out must not have been given out in part.
        self._held = max(map(len, stop)) - 1 if stop and not includes_stop else 0
        self._given = 0

    def push(self, ids: Sequence[int], *, is_stopped: bool) -> tuple[int, str | None]:
        """Take the next ids; `is_stopped` says that the last one ended the answer by itself.

        Returns how many of them belong to the answer (fewer than given only after a stop string)
        and the stop string, if one was met.
        """
        hidden = len(ids) - 1 if is_stopped and not self.includes_stop else len(ids)
        for index, token in enumerate(ids):
            self.count += 1
            if index >= hidden:
                continue
            piece = self._step(token)
            self.text += piece
            if self._stop and piece and self.count > self._min_tokens:
                met = self._find_stop(len(piece))
                if met is not None:
                    return index + 1, met
        return len(ids), None

    def take(self, *, is_finished: bool) -> str:
        """The text that has become certain since the last call."""
        end = len(self.text) if is_finished else len(self.text) - self._held
        if end <= self._given:
            return ""
        piece = self.text[self._given : end]
        self._given = end
        return piece

    def _find_stop(self, fresh: int) -> str | None:
        """The stop string that ends first within the last `fresh` characters; cuts the text
        there.
        """
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = self.text.find(stop, max(0, len(self.text) - fresh - len(stop) + 1))
            end = start + len(stop)
            if start >= 0 and (best is None or end < best[1]):
                best = (start, end, stop)
        if best is None:
            return None
        self.text = self.text[: best[1] if self.includes_stop else best[0]]
        return best[2]

    def _step(self, token: int) -> str:
        try:
            piece = self._stream.step(self._tokenizer.backend, token)
        except (OverflowError, TypeError):
            log.warning("token id %r is not one that the tokenizer knows", token)
            piece = None
        except Exception as error:  # the library raises nothing narrower for this one case
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            # Bytes that are no text at all leave the library's decoder without a valid prefix:
            # start it anew, as the engine does.
            self._stream = DecodeStream(skip_special_tokens=self._skips_special)
            piece = self._stream.step(self._tokenizer.backend, token)
        if self._joins_special:
            special = self._tokenizer.added.get(token)
            if special is not None and self._is_after_special:
                piece = special
            self._is_after_special = special is not None
        return piece or ""

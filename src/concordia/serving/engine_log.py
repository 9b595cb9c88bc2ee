"""What an engine says while it runs, floor 6.

Owns: one engine's log file, and the search for the line that says why it failed. Promises: only the
end of the file is read; what cannot be read has said nothing. Called by Replica and the replica
keeper. Does not write: the engine does.
"""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass
from typing import Final

from concordia import config

_FAILURE: Final = re.compile(r"(?:error: |\b\w*(?:Error|Exception|Exit): ).*")
_CONSEQUENCE: Final = "Engine core initialization failed"


@dataclass(frozen=True, slots=True)
class EngineLog:
    """The output of one engine's processes."""

    path: pathlib.Path

    def last_lines(self, count: int = config.LOG_LINES_SHOWN) -> list[str]:
        """Its end; nothing where it cannot be read."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self.path.stat().st_size - config.LOG_TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-count:]

    def last_words(self) -> str:
        """The line that says why the engine failed, as well as that can be told."""
        lines = self.last_lines(config.LOG_LINES_SEARCHED)
        causes = [
            m[0] for line in lines if (m := _FAILURE.search(line)) and _CONSEQUENCE not in line
        ]
        if causes:
            return str(causes[-1]).removeprefix("error: ")
        return lines[-1] if lines else "it said nothing"

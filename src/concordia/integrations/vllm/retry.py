"""When a request whose appends failed may try again.

Owns: the waits between tries. Promises: each failure doubles the wait, up to a bound, so that a
full journal is not made fuller; a request counts as protected again only after it went without a
failure for a while. Called by the scheduler side. Appends nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from concordia import config


@dataclass(slots=True)
class _Wait:
    until: float
    delay: float
    is_resting: bool = True


class Retries:
    """Requests that lost protection for the moment."""

    def __init__(self) -> None:
        self._waits: dict[str, _Wait] = {}

    def miss(self, request: str, *, now: float) -> None:
        """An append failed: rest, longer than the last time."""
        wait = self._waits.get(request)
        if wait is None:
            self._waits[request] = _Wait(now + config.APPEND_RETRY_S, config.APPEND_RETRY_S)
        elif not wait.is_resting:
            wait.delay = min(2 * wait.delay, config.APPEND_RETRY_S_MAX)
            wait.until, wait.is_resting = now + wait.delay, True

    def take_due(self, *, now: float) -> list[str]:
        """Requests that may try again now."""
        due = [name for name, wait in self._waits.items() if wait.is_resting and now >= wait.until]
        for name in due:
            wait = self._waits[name]
            wait.until, wait.is_resting = now + max(wait.delay, config.APPEND_PROVEN_S), False
        return due

    def take_recovered(self, *, now: float) -> list[str]:
        """Requests that tried again and have not failed since."""
        good = [
            name for name, wait in self._waits.items() if not wait.is_resting and now >= wait.until
        ]
        for name in good:
            del self._waits[name]
        return good

    def forget(self, request: str) -> None:
        self._waits.pop(request, None)

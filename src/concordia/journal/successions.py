"""Requests that were started again, and which of their lives may go, floor 3.

Owns: the names of requests with more than one incarnation. Promises: an older life goes as soon as
a newer one has committed as much; before that only when there is no room, first where least is lost
by it, and only where the newer one has more than it lacks. Called by replay for every new life,
by the owner and the cleaner. It frees nothing itself: blocks of a life that went age like others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from concordia.journal.keys import Group
from concordia.journal.life import Incarnation, Request


class Successions:
    """Every request with an older and a newer life."""

    def __init__(
        self,
        requests: Mapping[int, Request],
        *,
        reach: Callable[[Incarnation, Group], int],
        drop: Callable[[Request, Iterable[int]], None],
    ) -> None:
        self._requests = requests
        self._reach = reach
        self._drop = drop
        self._keys: set[int] = set()

    def note(self, key: int) -> None:
        """The request has one more life."""
        self._keys.add(key)

    def drop_superseded(self) -> None:
        """Let go of every life that a newer one has caught up with."""
        for lack, request, number, _, _ in self._older():
            if lack <= 0:
                self._drop(request, [number])

    def give_one_up(self) -> tuple[int, int] | None:
        """Let go of the life whose successor lacks least; the request's key and the tokens that
        would have to be computed again, None when there is no such life.
        """
        found = [life for life in self._older() if life[4] > life[0]]
        if not found:
            return None
        lack, request, number, key, _ = min(found, key=lambda life: life[0])
        self._drop(request, [number])
        return key, max(0, lack)

    def _older(self) -> list[tuple[int, Request, int, int, int]]:
        """Older lives: what the newest lacks, request, incarnation, key, what the newest has."""
        found = []
        for key in list(self._keys):
            request = self._requests.get(key)
            if request is None or len(request.incarnations) < 2:
                self._keys.discard(key)
                continue
            newest = max(request.incarnations)
            life = request.incarnations[newest]
            for number, older in request.incarnations.items():
                if number == newest:
                    continue
                has = [(self._reach(life, g), self._reach(older, g)) for g in older.covered]
                lack = max((old - new for new, old in has), default=0)
                found.append((lack, request, number, key, min((n for n, _ in has), default=0)))
        return found

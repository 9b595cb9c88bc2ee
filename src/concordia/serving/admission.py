"""Which replica new work may use, and who waits for one.

Owns: the choice among active replicas, the replicas closed to new work, and the count of those who
wait. Promises: a failed replica takes nothing more; one that was promoted takes nothing but its
cohort until that has moved, also while the fault is still on its way to us; waiting is bounded in
time and number; a full house is an error with a Retry-After, never a silent wait. Called by the
router and by requests that are passed through.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from concordia import config
from concordia.errors import RequestRefused
from concordia.serving.flight import ReplicaLike

# asked at each look: who was held may wish for what has just been chosen for another
Wish = Callable[[], ReplicaLike | None]


class Admission:
    """`active` gives the replica set's present view, `load` how much a replica has to do."""

    def __init__(
        self,
        *,
        active: Callable[[], Sequence[ReplicaLike]],
        load: Callable[[ReplicaLike], int],
        wait_s: float,
        held_max: int,
    ) -> None:
        self.is_draining = False
        self.held_count = 0
        self._active = active
        self._load = load
        self._wait_s = wait_s
        self._held_max = held_max
        self._failed: set[int] = set()
        # Who took new work before the failovers that now run.
        self._known: dict[int, ReplicaLike] = {}
        self._moving = 0  # failovers that run
        self._passing: dict[int, int] = {}
        self._opened = asyncio.Event()

    def check(self) -> None:
        """Raise RequestRefused when a new request must not come in."""
        if self.is_draining:
            raise unavailable("the server is draining", retry_after_s=config.RETRY_AFTER_S)
        if self.held_count >= self._held_max:
            raise unavailable(
                f"{self.held_count} requests already wait for an engine",
                retry_after_s=config.RETRY_AFTER_S,
            )

    def choose(self, wished: ReplicaLike | None = None) -> ReplicaLike | None:
        """The replica that is wished for if it takes new work, else the least loaded that does."""
        active = [r for r in self._active() if r.incarnation not in self._failed]
        if self._moving or self._misses(active):
            active = [r for r in active if r.incarnation in self._known]
        else:
            self._known = {r.incarnation: r for r in active}
        if wished is not None and any(r.incarnation == wished.incarnation for r in active):
            return wished
        return min(active, key=self._total_load, default=None)

    async def acquire(self, wish: Wish = lambda: None) -> ReplicaLike:
        """The replica for a new request; waits until there is one. Raises RequestRefused at the
        bound.
        """
        replica = self.choose(wish())
        if replica is not None:
            return replica
        bound = time.monotonic() + self._wait_s
        self.held_count += 1
        try:
            while (replica := self.choose(wish())) is None:
                left = bound - time.monotonic()
                if left <= 0:
                    raise unavailable("no engine was there within the recovery timeout")
                self._opened.clear()
                # A replica may also appear without a failover, and nobody tells: look again now and
                # then.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._opened.wait(), min(left, config.ADMISSION_POLL_S))
        finally:
            self.held_count -= 1
        return replica

    def close(self, incarnation: int) -> None:
        """A replica has failed; its failover begins."""
        if not self._moving:
            self.choose()  # notes who takes new work now
        self._failed.add(incarnation)
        self._moving += 1

    def exclude(self, incarnation: int) -> None:
        """A replica has failed; nobody waits for it or for what comes in its place."""
        self._failed.add(incarnation)

    def open(self, replica: ReplicaLike | None) -> None:
        """A failover has ended, on this replica if it found one."""
        self._moving -= 1
        if replica is not None:
            self._known[replica.incarnation] = replica
        self._opened.set()

    def known(self, incarnation: int) -> ReplicaLike | None:
        """A replica that takes, or took, new work; None for a standby."""
        return self._known.get(incarnation)

    @contextlib.contextmanager
    def passing(self, replica: ReplicaLike) -> Iterator[None]:
        """Count a request that is passed through."""
        key = replica.incarnation
        self._passing[key] = self._passing.get(key, 0) + 1
        try:
            yield
        finally:
            self._passing[key] -= 1
            if not self._passing[key]:
                del self._passing[key]

    @property
    def is_open(self) -> bool:
        """True while a new request would be served, at once or after a failover."""
        if self.is_draining:
            return False
        return self._moving > 0 or self._misses(self._active()) or self.choose() is not None

    def _misses(self, active: Sequence[ReplicaLike]) -> bool:
        """Whether one that took new work is gone though we know of no fault: another thread may
        have replaced it already.
        """
        return not self._known.keys() <= {r.incarnation for r in active} | self._failed

    def _total_load(self, replica: ReplicaLike) -> int:
        return self._load(replica) + self._passing.get(replica.incarnation, 0)


class Turnstile:
    """Keeps the members of a client's closed cohort in the order in which they came.

    A batch's rows lie in the order of arrival, and its arithmetic depends on it; rendering prompts
    side by side would mix them up.
    """

    def __init__(self) -> None:
        self._queues: dict[str, list[asyncio.Event]] = {}

    @contextlib.contextmanager
    def enter(self, name: str | None) -> Iterator[asyncio.Event]:
        """Take a place in the queue of this name; the event is set once all who came before have
        left.
        """
        turn = asyncio.Event()
        if name is None:
            turn.set()
            yield turn
            return
        queue = self._queues.setdefault(name, [])
        queue.append(turn)
        queue[0].set()
        try:
            yield turn
        finally:
            queue.remove(turn)
            if queue:
                queue[0].set()
            else:
                del self._queues[name]


def unavailable(message: str, *, retry_after_s: int | None = None) -> RequestRefused:
    """A 503 in OpenAI's form."""
    return RequestRefused(
        message, status=503, kind="ServiceUnavailableError", retry_after_s=retry_after_s
    )

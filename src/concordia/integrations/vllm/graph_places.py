"""Where a rank's appends run inside the engine's own CUDA graphs.

Owns: the stream tasks of the engine's stream, in which captured graphs they have a place, and what
of a step was handed in for it. Promises: a place comes after the last layer that writes KV in its
graph, by the engine's own word, so tasks that were handed in before a step see all of it; a graph
of which that is not sure makes us rely on none; what was handed in for a step that turns out to
have no place gets one behind its last kernel. Called by the worker side; used where the residency
is stream. It does not capture or replay: the engine does.

  start    | capture of a full graph: layer ... layer, last layer, our place, rest |    per graph
  step     hand_in | replay: ... last layer, tasks run, rest |                          no host
  step     hand_in | layers, launched one by one | our place, enqueued by end_step      prefill
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from concordia import config
from concordia.errors import ConcordiaError
from concordia.integrations.vllm import compat
from concordia.integrations.vllm.door import logger
from concordia.runtime.ring import Completion, Task, Ticket

if TYPE_CHECKING:
    from concordia.checkpoint.checkpointer import Checkpointer
    from concordia.runtime.executor import Runtime


class Placed(NamedTuple):
    """A ticket of tasks in the engine's stream, to be told from the executor's own."""

    ticket: Ticket


class GraphPlaces:
    """The places of one rank. `current` gives the stream that the engine's thread works in."""

    def __init__(
        self, runtime: Runtime, *, layers: Iterable[str], stream: int, current: Callable[[], int]
    ) -> None:
        self._tasks = runtime.stream_tasks(stream)
        self._stream, self._current = stream, current
        self._layers = frozenset(layers)
        self.count = 0  # graphs that have one
        self._why_not: str | None = None
        self._capture: tuple[int, int] | None = None  # its number, and the stream of its layers
        self._seen: set[str] = set()
        self._is_said = False
        self._is_handed = self._is_layered = False
        self._missed_count = 0
        self.step_count = 0  # steps whose appends ran in a graph

    # --- while the engine captures

    def layer_captured(self, name: str) -> None:
        """The engine has put a layer into a graph, its KV included; behind the last of them goes
        our place. What fails here costs the places, not protection.
        """
        try:
            self._follow_capture(name)
        except ConcordiaError as error:
            self._rely_not(str(error))

    def _follow_capture(self, name: str) -> None:
        stream = self._current()
        number = self._tasks.capture_of(stream)
        if number is None:
            return
        if self._capture is None or self._capture[0] != number:
            self._end_capture()
            self._capture, self._seen = (number, stream), set()
        elif self._capture[1] != stream or name in self._seen:
            # layers in several streams, or several times: which is the last is not known
            self._rely_not(f"layer {name} is not once in one stream of its graph")
        self._seen.add(name)
        if self._why_not is None and self._seen == self._layers:
            self._tasks.enqueue(captured=stream)
            self.count += 1

    def _end_capture(self) -> None:
        if self._capture is not None and self._seen != self._layers:
            lacking = len(self._layers - self._seen)
            self._rely_not(f"a graph holds no KV of {lacking} of {len(self._layers)} layers")
        self._capture = None

    # --- in a step

    @property
    def why_not(self) -> str | None:
        """Why no step's appends run in a graph; None when they may."""
        self._end_capture()
        if self._why_not is None and not self.count:
            return "no full graph was captured"
        return self._why_not

    def begin_step(self, rank: int) -> None:
        """Nothing of this step is launched yet."""
        self._is_handed = self._is_layered = False
        if self._current() != self._stream:
            self._rely_not("steps run in another stream than the one of the engine's start")
        why_not = self.why_not
        if not self._is_said:
            self._is_said = True
            if why_not is None:
                logger.info("Concordia: rank %d appends in %d captured graphs", rank, self.count)
            else:
                logger.warning(
                    "Concordia: rank %d appends by launches of its own, not in graphs: %s",
                    *(rank, why_not),
                )
        if self._tasks.pending_count >= config.PLACES_BEHIND_MAX:
            self.flush()
            self._missed_count += 1
            if self._missed_count >= config.PLACES_MISSED_MAX:
                self._rely_not("replays of a graph had no place")

    def takes(self, count: int) -> bool:
        """Whether so many tasks may be handed in for the step that begins."""
        return self.why_not is None and count <= self._tasks.room

    def hand_in(self, tasks: Sequence[Task]) -> list[Placed]:
        """Let these run at the place of the step that begins; `takes` has said so. Empty when they
        could not be handed in: then none of them will run here, and none after them.
        """
        try:
            tickets = self._tasks.hand_in(tasks)
        except ConcordiaError as error:
            self._rely_not(str(error))
            return []
        self._is_handed = True
        return [Placed(ticket) for ticket in tickets]

    def layer_launched(self) -> None:
        """This step's layers are launched one by one, not replayed."""
        self._is_layered = True

    def end_step(self) -> bool:
        """All of the step is launched; whether its appends were handed in before."""
        if self._is_handed:
            if self._is_layered:
                self._tasks.enqueue()
            else:
                self.step_count += 1
        return self._is_handed

    def flush(self) -> None:
        """What was handed in and has not met its place runs behind what is launched now."""
        if self._tasks.pending_count:
            self._tasks.enqueue()

    def _rely_not(self, reason: str) -> None:
        if self._why_not is None:
            self._why_not = reason
            if self._is_said:
                logger.warning("Concordia appends in graphs no more: %s", reason)

    # --- answers

    @property
    def busy_ns(self) -> int:
        """Time spent in handlers so far."""
        return self._tasks.busy_ns

    def result(self, ticket: Ticket) -> Completion | None:
        return self._tasks.result(ticket)

    def wait(self, ticket: Ticket, timeout_s: float) -> Completion:
        return self._tasks.wait(ticket, timeout_s)


def open_places(
    runtime: Runtime, vllm_config: Any, *, layers: Iterable[str]
) -> GraphPlaces | None:
    """Those of a rank that has its KV memory and no graph yet; only under a policy whose launches
    take turns with those of the engine's own streams.
    """
    if runtime.stats().residency != "stream":
        return None
    why_not = compat.why_no_places(vllm_config)
    if why_not is not None:
        logger.warning("Concordia puts no appends into graphs: %s", why_not)
        return None

    def current() -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    return GraphPlaces(runtime, layers=layers, stream=current(), current=current)


class RankTickets:
    """What the pump and the audit ask a rank's tasks by, wherever these run."""

    def __init__(self, checkpointer: Checkpointer, places: GraphPlaces | None) -> None:
        self._checkpointer, self._places = checkpointer, places
        self.submit_many = checkpointer.submit_many
        self.hash_kv = checkpointer.hash_kv

    def result(self, ticket: Any) -> Completion | None:
        """None while its task has not run."""
        if isinstance(ticket, Placed):
            assert self._places is not None
            return self._places.result(ticket.ticket)
        return self._checkpointer.result(ticket)

    def wait(self, ticket: Any, timeout_s: float) -> Completion:
        """The same, waited for; raises WaitTimeout."""
        if isinstance(ticket, Placed):
            assert self._places is not None
            return self._places.wait(ticket.ticket, timeout_s)
        return self._checkpointer.wait(ticket, timeout_s)

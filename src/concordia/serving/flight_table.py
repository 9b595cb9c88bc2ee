"""The answers that are being made.

Owns: every flight by its name, and how many each replica carries. Promises: a flight is here from
before its first submission until it has landed; the counts are of now. Used by the router alone, on
its event loop. Moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from concordia.serving.flight import Flight, ReplicaLike


class FlightTable:
    """May be iterated while flights come and land."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._flights.values()))

    def add(self, flight: Flight) -> None:
        self._flights[flight.name] = flight

    def discard(self, flight: Flight) -> bool:
        """Let it go; False when it was gone."""
        return self._flights.pop(flight.name, None) is not None

    def carried_by(self, replica: ReplicaLike) -> int:
        """Answers that sit on this replica."""
        return sum(flight.replica is replica for flight in self)

    def owed_by(self, replica: ReplicaLike) -> int:
        """Answers that this replica owes their first event, for the detector; later ones it sees by
        the engine's steps.

        An answer that waits for a slow client is none of them: its engine may have ended it long
        ago.
        """
        return sum(
            f.replica is replica and f.stream is not None and f.stream.is_silent for f in self
        )

    def shared_replica(self, flight: Flight) -> ReplicaLike | None:
        """Where the first of its client's cohort sits: members on two replicas would wait for each
        other in vain.
        """
        others = [
            f for f in self if f is not flight and f.replica is not None and f.shares_cohort(flight)
        ]
        return min(others, key=lambda other: other.order).replica if others else None

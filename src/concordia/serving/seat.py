"""The stream that an answer is read from, and the wait for the next one.

Owns: which stream that is. Promises: a reader gets the newest stream, never one that was taken away
before it ran; an error given here is what it gets; a reader that is cancelled takes nothing with
it. Called by the flight. Does not open streams and knows no deadline.
"""

from __future__ import annotations

import asyncio

from concordia.serving.upstream import EventStream


class Seat:
    """Empty, taken by a stream, or holding an error."""

    def __init__(self) -> None:
        self.stream: EventStream | None = None
        self._next: asyncio.Future[EventStream] = asyncio.get_running_loop().create_future()

    def give(self, stream: EventStream) -> None:
        """Read from this one."""
        self._renew()
        self.stream = stream
        self._next.set_result(stream)

    def clear(self, reason: str) -> None:
        """Break the stream off; the reader waits for the next one."""
        self._renew()
        self._break_off(reason)

    def fail(self, error: Exception) -> None:
        """Let the reader end with this error at its next look."""
        self._renew()
        self._next.set_exception(error)
        self._next.exception()  # marks it as seen: a reader that has gone never looks
        self._break_off(str(error))

    async def next(self) -> EventStream:
        """The stream to read; waits for it as long as its caller lets it. Raises what `fail` was
        given.
        """
        while True:
            waited = self._next
            # Not awaited directly: a reader that is cancelled must not cancel it for the next.
            await asyncio.wait({waited})
            if waited is self._next:  # else it was taken away again before this reader ran
                return waited.result()

    def _renew(self) -> None:
        if self._next.done():
            self._next = asyncio.get_running_loop().create_future()

    def _break_off(self, reason: str) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.break_off(reason)

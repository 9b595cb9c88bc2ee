"""Which requests have lost protection, for good or for a while.

Owns: what was said of whom, and when who may try again. Promises: a loss is named once, with its
reason, in the log and in the journal, and so is its end; what may pass is appended again a little
later, what may not never is. Called by the scheduler side. It does not decide what is a loss.
"""

from __future__ import annotations

import time

from concordia.integrations.vllm.door import logger
from concordia.integrations.vllm.identity import Identity
from concordia.integrations.vllm.retry import Retries
from concordia.integrations.vllm.scribe import Scribe
from concordia.integrations.vllm.write_set import WriteSet


class Losses:
    """Those of one engine."""

    def __init__(self, writes: WriteSet, scribe: Scribe) -> None:
        self._writes, self._scribe = writes, scribe
        self._said: set[str] = set()  # requests whose loss of protection was said
        self._retries = Retries()

    def miss(self, name: str, token: int, reason: str) -> None:
        """From this token on it is not saved; nothing is lost of it yet, so it is appended again a
        little later.
        """
        track = self._writes.tracks.get(name)
        if track is None or not track.is_protected:
            return
        self._writes.rewind(name, token)
        track.is_resting = True
        self._retries.miss(name, now=time.monotonic())
        self.say(name, track.identity, reason)

    def lose(self, name: str, reason: str) -> None:
        """It is not saved any more."""
        track = self._writes.tracks.get(name)
        if track is not None:
            self._writes.lose(name)
            self._retries.forget(name)
            self.say(name, track.identity, reason)

    def try_again(self) -> None:
        """Those whose time has come."""
        now = time.monotonic()
        for name in self._retries.take_recovered(now=now):
            self._said.discard(name)
            identity = self._writes.tracks[name].identity
            logger.info("Concordia: %s is protected again", identity.name)
            self._scribe.event({"event": "protected", "request": identity.name})
        for name in self._retries.take_due(now=now):
            self._writes.tracks[name].is_resting = False

    def say(self, name: str, identity: Identity, reason: str) -> None:
        """The request is not protected, and why."""
        if name in self._said:
            return
        self._said.add(name)
        logger.warning("Concordia: %s is unprotected: %s", identity.name, reason)
        self._scribe.unprotected()
        self._scribe.event({"event": "unprotected", "request": identity.name, "reason": reason})

    def forget(self, name: str) -> None:
        """The request has ended."""
        self._said.discard(name)
        self._retries.forget(name)

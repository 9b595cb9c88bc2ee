"""The whole error tree, floor 0.

Owns: every exception that Concordia raises on purpose. Promises: each carries the facts a reader
needs to act (which request, which segment, expected, found) in its message; `exit_code` is what the
command line returns for it. Imports nothing of ours.
"""

from __future__ import annotations


class ConcordiaError(Exception):
    """Root of every error that Concordia raises on purpose."""

    exit_code = 1


class UsageError(ConcordiaError):
    """A person asked for something that cannot be done; the message says what to do instead."""

    exit_code = 2


class EnvironmentRefused(UsageError):
    """The machine lacks something that is needed: a compiler, shared memory, a package."""


class ImageRefused(UsageError):
    """A GPU image is malformed, or of a form that is not known: it stays as it is."""


class DeviceError(ConcordiaError):
    """A device call failed."""


class CompileError(DeviceError):
    """A kernel did not compile or link; carries the compiler's own words."""


class HandlerRefused(DeviceError):
    """A handler did not pass the lint or its self-test; the region stays on the one before."""


class RingFull(DeviceError):
    """The ring has no free slot: the caller decides, nothing waits silently."""


class AnswerForgotten(DeviceError):
    """A task was done so long ago that its answer is no longer kept."""


class RestoreUnfinished(DeviceError):
    """A restore failed, and what it handed in may still write blocks: whoever computes into them
    would be written over, so the engine must not go on.
    """


class WaitTimeout(ConcordiaError):
    """A bounded wait reached its bound; the message says who waited for what and how long."""


class JournalError(ConcordiaError):
    """The journal cannot be used as asked."""


class JournalRefused(JournalError, UsageError):
    """The journal belongs to another user, has wrong permissions or does not fit where it is
    put.
    """

    exit_code = 2


class JournalFull(JournalError):
    """No segment is left for this stream: its requests are unprotected from here."""


class Corruption(JournalError):
    """A record is damaged and it is provably not the tail that a crash leaves."""

    exit_code = 3


class LayoutMismatch(ConcordiaError):
    """State of one layout was offered to a region of another: a cold start, never a guess."""


class RecoveryError(ConcordiaError):
    """A request could not go on within its bound."""


class ReplicaError(ConcordiaError):
    """A replica could not be started, or is not usable."""

    @classmethod
    def of(cls, error: Exception) -> ConcordiaError:
        """The error as one of ours: what the operating system said of a replica is a failure of
        that replica.
        """
        return error if isinstance(error, ConcordiaError) else cls(str(error))


class RequestRefused(ConcordiaError):
    """A client's request cannot be served as asked; `status` is the HTTP status, `param` the field
    at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "BadRequestError",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s


class UpstreamBroken(ConcordiaError):
    """The connection to a replica ended, or said that its engine failed, before the answer was
    complete.
    """

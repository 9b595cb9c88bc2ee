"""Who a request is, and which chained hash each of its blocks has.

Owns: reading `kv_transfer_params["concordia"]`, which names were used, and the chain of block keys.
Promises: what a client sends is checked before use; two requests get the same key for a block only
when model, layout, adapter, salt and every token up to the block's end are the same; a private key
is met by nobody but the request that made it. Called by the scheduler side. Knows no vLLM type.
"""

from __future__ import annotations

import array
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import xxhash

from concordia import config
from concordia.errors import UsageError
from concordia.journal.record import request_key

PARAMS_NAME: Final = "concordia"
# record incarnation = router's incarnation x this + lives within the engine
INCARNATION_STRIDE: Final = 1000
INCARNATION_MAX: Final = (2**63 - 1) // INCARNATION_STRIDE - 1
COHORT_SIZE_MAX: Final = 65536
MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class CohortTicket:
    """Which cohort a request resumes with, how many belong to it, and how long it may wait for
    them.
    """

    name: str
    size: int
    deadline_s: float

    @property
    def is_recovery(self) -> bool:
        """Whether the router made it of a failed replica's requests, and not a client of its
        own.
        """
        return not self.name.startswith(config.CLIENT_COHORT_PREFIX)


@dataclass(frozen=True, slots=True)
class Identity:
    """A request as the journal knows it."""

    name: str
    incarnation: int = 1
    tokens_known: int | None = None
    is_restore: bool = False
    is_routed: bool = False  # a router of ours owns the request, and says when it has ended
    is_disabled: bool = False
    cohort: CohortTicket | None = None
    # earlier incarnation -> tokens of it that its client knew
    bounds: Mapping[int, int] = field(default_factory=dict)

    @property
    def key(self) -> int:
        """The 128-bit request key."""
        return request_key(self.name)


def parse_identity(params: Mapping[str, Any] | None, *, fallback: str) -> Identity:
    """The identity in `params`, or one made from `fallback`; raises UsageError for what no router
    of ours sends.
    """
    own = (params or {}).get(PARAMS_NAME)
    if own is None:
        return Identity(name=fallback)
    if own is False:
        return Identity(name=fallback, is_disabled=True)
    if not isinstance(own, Mapping):
        raise UsageError(f"kv_transfer_params.{PARAMS_NAME} is {type(own).__name__}, not an object")
    name = own.get("request", fallback)
    if not isinstance(name, str) or not 0 < len(name.encode()) <= config.REQUEST_NAME_BYTES_MAX:
        raise UsageError(
            f"concordia.request must be 1 to {config.REQUEST_NAME_BYTES_MAX} bytes of text"
        )
    return Identity(
        name=name,
        incarnation=_count(own, "incarnation", default=1, most=INCARNATION_MAX),
        tokens_known=_count(own, "tokens", default=0, most=2**31) or None,
        is_restore=_truth(own, "restore"),
        is_routed="request" in own,
        is_disabled=_truth(own, "disabled"),
        cohort=_cohort(own.get("cohort")),
        bounds=_bounds(own.get("bounds")),
    )


def seed_bytes(parts: Mapping[str, Any]) -> bytes:
    """What a chain starts from: the same parts give the same bytes in every process."""
    return json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str).encode("utf-8")


def model_hash(seed: bytes) -> int:
    """What a record of KV says of its maker: 64 bits of the seed that its keys start from; never 0,
    which says nothing.
    """
    return xxhash.xxh3_64_intdigest(seed) or 1


class Roll:
    """Every name and incarnation that an engine has had: two requests under one would mix their
    records, even one after the other.
    """

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], None] = {}  # in order of arrival

    def enter(self, identity: Identity) -> None:
        """Raises UsageError for all but the first of its name and incarnation; the oldest of very
        many are forgotten.
        """
        name = identity.key, identity.incarnation
        if name in self._names:
            raise UsageError("a request of its name and incarnation was here before")
        self._names[name] = None
        if len(self._names) > config.NAMES_REMEMBERED:
            del self._names[next(iter(self._names))]


class KeyChain:
    """Chained keys of the full blocks of one request, computed as its token ids become known."""

    def __init__(self, seed: bytes, *, block_tokens: int) -> None:
        self.keys: list[int] = []
        self._block_tokens = block_tokens
        self._last = xxhash.xxh3_128_intdigest(seed)

    def extend(self, tokens: Sequence[int], *, limit: int) -> None:
        """Add the keys of all full blocks of tokens[0:limit]."""
        size = self._block_tokens
        while (len(self.keys) + 1) * size <= limit:
            start = len(self.keys) * size
            block = array.array("I", tokens[start : start + size])
            if sys.byteorder == "big":
                block.byteswap()
            data = self._last.to_bytes(16, "little") + block.tobytes()
            self._last = xxhash.xxh3_128_intdigest(data)
            self.keys.append(self._last)


def private_key(shared: int, *, request: int, incarnation: int) -> int:
    """A key for a block whose tokens others computed too, but whose bytes are this request's own.

    Two engines, or one engine in two batches, may compute different bytes for the same tokens. The
    first author has the shared key; every other copy gets a key of its own, so that a reference
    always leads to the very bytes that the request had.
    """
    data = b"private" + shared.to_bytes(16, "little") + request.to_bytes(16, "little")
    return xxhash.xxh3_128_intdigest(data + incarnation.to_bytes(8, "little"))


def _count(own: Mapping[str, Any], name: str, *, default: int, most: int) -> int:
    value = own.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise UsageError(f"concordia.{name} must be a whole number from 0 to {most}, not {value!r}")
    return value


def _truth(own: Mapping[str, Any], name: str) -> bool:
    value = own.get(name, False)
    if not isinstance(value, bool):
        raise UsageError(f"concordia.{name} must be true or false, not {value!r}")
    return value


def _bounds(value: object) -> dict[int, int]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError("concordia.bounds must be an object")
    try:
        found = {int(number): int(tokens) for number, tokens in value.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"concordia.bounds must map numbers to numbers: {error}") from error
    if any(number < 0 or tokens < 0 for number, tokens in found.items()):
        raise UsageError("concordia.bounds must not be negative")
    return found


def _cohort(value: object) -> CohortTicket | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not isinstance(value.get("id"), str) or not value["id"]:
        raise UsageError("concordia.cohort must be an object with an id")
    deadline = value.get("deadline_s", config.RESTORE_WAIT_S)
    if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not deadline >= 0:
        raise UsageError(f"concordia.cohort.deadline_s must be seconds, not {deadline!r}")
    size = _count(value, "size", default=1, most=COHORT_SIZE_MAX)
    return CohortTicket(
        name=value["id"], size=max(1, size), deadline_s=min(float(deadline), config.RESTORE_WAIT_S)
    )

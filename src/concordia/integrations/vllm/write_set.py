"""What a step writes into the KV cache, and what of it the journal must be given.

Owns: the engine's block tables as the journal sees them. Promises: after a step, every token below
`covered` of a protected request has its bytes appended, or a key that names them; `covered` never
passes a token that may still be rejected; a block's key is forgotten the moment the block is given
to somebody else; KV that was computed anew never shares a record incarnation with the KV before it.
Called by the scheduler side once per step. Knows no vLLM type and does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from concordia import config
from concordia.integrations.vllm.identity import (
    INCARNATION_STRIDE,
    Identity,
    KeyChain,
    private_key,
)


class Scheduled(NamedTuple):
    """One request of one step, as compat.py read it from the scheduler's output (a tuple, as others
    here that are made for every request in every step: a frozen dataclass takes 2 us to make).

    blocks:  the request's block ids (replaces) or those added to them
    start    first token computed in this step; everything below is in the cache
    end      start + tokens of this step, drafts included
    """

    request: str
    blocks: Sequence[int]
    replaces: bool
    start: int
    end: int
    drafts: int = 0
    # with `replaces`: tokens found in the engine's own prefix cache, whole blocks; the rest is
    # newly given
    hit: int = 0
    # block index -> key of the record it is filled from
    loaded_keys: Mapping[int, int] = MappingProxyType({})


class Write(NamedTuple):
    """What one request appends in one step: full blocks as (index, block id), then the partial last
    block.
    """

    request: str
    key: int
    incarnation: int
    full: tuple[tuple[int, int], ...]
    tail: tuple[int, int, int] | None  # (first token, end, block id)
    model_hash: int = 0

    @property
    def blocks(self) -> list[int]:
        """Block ids that are appended from."""
        return [block for _, block in self.full] + ([self.tail[2]] if self.tail else [])


def runs_of(
    full: Sequence[tuple[int, int]], most: int = config.APPEND_BLOCKS
) -> list[tuple[int, tuple[int, ...]]]:
    """Full blocks, (index, block id), as (first index, ids) of those that follow each other, at
    most so many together.
    """
    runs: list[tuple[int, list[int]]] = []
    for index, block in full:
        if runs and runs[-1][0] + len(runs[-1][1]) == index and len(runs[-1][1]) < most:
            runs[-1][1].append(block)
        else:
            runs.append((index, [block]))
    return [(first, tuple(blocks)) for first, blocks in runs]


@dataclass(frozen=True, slots=True)
class KeyNote:
    """Keys of blocks of one request, for KIND_BLOCK_KEY: (block index, key)."""

    request: str
    key: int
    incarnation: int
    entries: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class StepWrites:
    """All that one step asks of the workers and of the scheduler's own stream."""

    writes: list[Write] = field(default_factory=list)
    notes: list[KeyNote] = field(default_factory=list)
    # blocks given out in this step: nothing may still read their old bytes
    reused: list[int] = field(default_factory=list)
    # (request, why it is unprotected from here)
    lost: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class Track:
    """One request that the engine holds."""

    identity: Identity
    # None: its tokens alone do not determine its KV, so its blocks are nobody else's
    chain: KeyChain | None
    tokens: Sequence[int]  # the engine's own list: grows as ids become known
    model_hash: int = 0  # what computes its KV, for its records and for whoever restores them
    lives: int = 0
    blocks: list[int] = field(default_factory=list)
    covered: int = 0
    named: int = 0  # blocks whose key has been noted
    is_started: bool = False
    is_protected: bool = True
    is_resting: bool = False  # its appends failed a moment ago: try again a little later

    @property
    def incarnation(self) -> int:
        return self.identity.incarnation * INCARNATION_STRIDE + min(
            self.lives, INCARNATION_STRIDE - 1
        )

    def renew(self) -> None:
        """From here the request's KV is computed anew; nothing written before may be mixed with
        it.
        """
        self.lives += 1
        self.covered = 0
        self.named = 0
        self.is_protected = self.is_protected and self.lives < INCARNATION_STRIDE


class WriteSet:
    """The tracks of one engine and the keys of the blocks that its cache holds."""

    def __init__(self, *, block_tokens: int) -> None:
        self.tracks: dict[str, Track] = {}
        self.foreign: set[int] = set()  # keys of block records that other engines wrote
        self.authored: dict[int, int] = {}  # shared keys that this engine wrote first -> step
        self._block_tokens = block_tokens
        # block id -> (key of the record with its bytes, step it was named)
        self._resident: dict[int, tuple[int, int]] = {}

    def step(
        self, scheduled: Iterable[Scheduled], *, step: int, given: Iterable[int] = ()
    ) -> StepWrites:
        """The writes of one step; `given` are blocks that the engine handed out, copies into or
        zeroes beside those scheduled.
        """
        result = StepWrites()
        self._release(given, result)
        for item in scheduled:
            track = self.tracks.get(item.request)
            if track is None:
                self._release(item.blocks[item.hit // self._block_tokens :], result)
                continue
            self._take_blocks(track, item, step, result)
            if not track.is_protected or track.is_resting:
                continue
            if len(track.blocks) * self._block_tokens < item.end - item.drafts:
                self.lose(item.request)
                result.lost.append(
                    (item.request, f"{len(track.blocks)} blocks known for {item.end} tokens")
                )
                continue
            self._append(track, item, step, result)
        return result

    def finish(self, request: str, *, step: int) -> StepWrites:
        """Name what can still be named and let the request go; its blocks stay known as long as the
        engine keeps them.
        """
        result = StepWrites()
        track = self.tracks.pop(request, None)
        if track is not None and track.is_protected and track.chain is not None:
            track.chain.extend(track.tokens, limit=min(track.covered, len(track.tokens)))
            self._name(request, track, step, result)
        return result

    def lose(self, request: str) -> None:
        """The worker cannot append for this request: what its blocks hold is not (all) in the
        journal.
        """
        track = self.tracks.get(request)
        if track is not None:
            track.is_protected = False
            self._unname(track.blocks)

    def disown(self, blocks: Sequence[int]) -> None:
        """What these blocks hold is not what their records say: whoever relies on their keys must
        append them too.
        """
        self._unname(blocks)

    def rewind(self, request: str, token: int) -> None:
        """From this token on the request's KV is not in the journal; it lies in the cache as before
        and is appended again.
        """
        track = self.tracks.get(request)
        if track is None or token >= track.covered:
            return
        first = token // self._block_tokens
        track.covered = first * self._block_tokens
        track.named = min(track.named, first)
        self._unname(track.blocks[first:])

    def _unname(self, blocks: Sequence[int]) -> None:
        """Perhaps no record has these blocks' bytes; whoever relied on their keys must append them
        too.

        Perhaps one has: so a shared key stays taken, and never gets to name other bytes.
        """
        gone = {block for block in blocks if self._resident.pop(block, None) is not None}
        if not gone:
            return
        for track in self.tracks.values():
            first = next(
                (i for i, block in enumerate(track.blocks[: track.named]) if block in gone), None
            )
            if first is not None:
                track.covered = min(track.covered, first * self._block_tokens)
                track.named = first

    def learn(self, known: set[int], *, before_step: int) -> None:
        """Take the journal's own list of keys; what is missing there, and not new, has been cleaned
        away.
        """
        for key in [
            k for k, step in self.authored.items() if step < before_step and k not in known
        ]:
            del self.authored[key]
        # whoever relied on such a block must append it, too
        self._unname(
            [
                block
                for block, (key, step) in self._resident.items()
                if step < before_step and key not in known
            ]
        )
        self.foreign = known.difference(self.authored)

    def forget_blocks(self, model_hash: int) -> None:
        """Name nothing by what was computed so far; requests that run go on under names of their
        own, and as another model's.
        """
        self._resident.clear()
        self.authored.clear()
        self.foreign.clear()
        for track in self.tracks.values():
            track.chain = None
            track.model_hash = model_hash

    def is_journaled(self, key: int) -> bool:
        return key in self.authored or key in self.foreign

    def is_from_journal(self, block: int, key: int) -> bool:
        """Whether the block was filled from a record of this key, and holds it still; what was
        computed here is not from there.
        """
        return (
            bool(key) and key not in self.authored and self._resident.get(block, (0, 0))[0] == key
        )

    def _take_blocks(self, track: Track, item: Scheduled, step: int, result: StepWrites) -> None:
        size = self._block_tokens
        if item.replaces:
            if track.is_started:
                track.renew()
            track.blocks = list(item.blocks)
            self._release(track.blocks[item.hit // size :], result)
            for index, key in item.loaded_keys.items():
                # A key that two engines gave to different bytes names ours only if we did not write
                # it too.
                if key not in self.authored:
                    self._resident[track.blocks[index]] = (key, step)
                    self.foreign.add(key)
        else:
            self._release(item.blocks, result)
            track.blocks.extend(item.blocks)
            if item.start < track.covered:
                self._release(track.blocks[item.start // size :], result)
                track.renew()
        track.is_started = True

    def _append(self, track: Track, item: Scheduled, step: int, result: StepWrites) -> None:
        size = self._block_tokens
        sure_end = item.end - item.drafts
        if sure_end <= track.covered:
            return
        full: list[tuple[int, int]] = []
        for index in range(track.covered // size, sure_end // size):
            block = track.blocks[index]
            # A block that was complete before this step, and whose bytes a record has: its key is
            # enough.
            if (
                (index + 1) * size > item.start
                or block not in self._resident
                or track.chain is None
            ):
                self._resident.pop(block, None)
                full.append((index, block))
        tail_start = max(track.covered, sure_end // size * size)
        tail = None
        if tail_start < sure_end:
            tail = (tail_start, sure_end, track.blocks[tail_start // size])
        if full or tail:
            result.writes.append(
                Write(
                    item.request,
                    track.identity.key,
                    track.incarnation,
                    tuple(full),
                    tail,
                    track.model_hash,
                )
            )
        track.covered = sure_end
        if track.chain is not None and track.named < sure_end // size:
            track.chain.extend(track.tokens, limit=min(sure_end, len(track.tokens)))
            self._name(item.request, track, step, result)

    def _name(self, request: str, track: Track, step: int, result: StepWrites) -> None:
        """Note the keys of covered blocks, as far as their token ids are known."""
        assert track.chain is not None
        entries: list[tuple[int, int]] = []
        for index in range(
            track.named, min(len(track.chain.keys), track.covered // self._block_tokens)
        ):
            block = track.blocks[index]
            key, _ = self._resident.get(block, (0, 0))
            if not key:
                key = track.chain.keys[index]
                if self.is_journaled(key):
                    key = private_key(
                        key, request=track.identity.key, incarnation=track.incarnation
                    )
                else:
                    self.authored[key] = step
                self._resident[block] = (key, step)
            entries.append((index, key))
        if entries:
            track.named += len(entries)
            result.notes.append(
                KeyNote(request, track.identity.key, track.incarnation, tuple(entries))
            )

    def _release(self, blocks: Iterable[int], result: StepWrites) -> None:
        for block in blocks:
            self._resident.pop(block, None)
            result.reused.append(block)

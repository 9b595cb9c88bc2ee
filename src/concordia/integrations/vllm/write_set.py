"""What a step writes into the KV cache, and what of it the journal must be given.

Owns: the engine's block tables as the journal sees them. Promises: after a step, every token below
`covered` of a protected request has its bytes appended, or a key that names them; `covered` never
passes a token that may still be rejected; a block's key is forgotten the moment the block is given
to somebody else; KV that was computed anew never shares a record incarnation with the KV before it.
Called by the scheduler side once per step. Knows no vLLM type and does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from concordia.integrations.vllm.identity import private_key
from concordia.integrations.vllm.late_blocks import Late, LateBlocks
from concordia.integrations.vllm.named_blocks import NamedBlocks
from concordia.integrations.vllm.step_writes import KeyNote, Scheduled, StepWrites, Write
from concordia.integrations.vllm.track import Track


class WriteSet:
    """The tracks of one engine and the keys of the blocks that its cache holds."""

    def __init__(self, *, block_tokens: int) -> None:
        self.tracks: dict[str, Track] = {}
        self._block_tokens = block_tokens
        self._named = NamedBlocks()
        self._lapsed: set[int] = set()  # blocks whose keys went; who relied on them is not told yet
        self._late = LateBlocks(block_tokens=block_tokens)

    def spread(self, is_on: bool) -> None:
        """Whether single tokens are appended as rows: then blocks that decode fills may follow a
        few steps later.
        """
        self._late.is_on = is_on

    def step(
        self, scheduled: Iterable[Scheduled], *, step: int, given: Iterable[int] = ()
    ) -> StepWrites:
        """The writes of one step; `given` are blocks that the engine handed out, copies into or
        zeroes beside those scheduled.
        """
        result = StepWrites()
        self._forget(self._named.take_away())
        self._release(given, result)
        self._late.begin()
        running: set[str] = set()
        for item in scheduled:
            track = self.tracks.get(item.request)
            running.add(item.request)
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
        self._append_late(running, step, result)
        return result

    def finish(self, request: str, *, step: int) -> StepWrites:
        """Name what can still be named and let the request go; its blocks stay known as long as the
        engine keeps them.
        """
        result = StepWrites()
        track = self.tracks.pop(request, None)
        if track is not None and track.is_protected:
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
        track.late = [index for index in track.late if index < first]
        self._unname(track.blocks[first:])

    def _unname(self, blocks: Sequence[int]) -> None:
        """Perhaps no record has these blocks' bytes; whoever relied on their keys must append them
        too.

        Perhaps one has: so a shared key stays taken, and never gets to name other bytes.
        """
        self._rely_no_more({block for block in blocks if self._named.drop(block)})

    def _forget(self, lapsed: Iterable[int]) -> None:
        """The same for what the journal let go of, once all of an answer is taken away: to look
        through all requests costs as much as a step has to spare.
        """
        self._lapsed.update(block for block in lapsed if self._named.drop(block))
        if not self._named.has_missing:
            gone, self._lapsed = self._lapsed, set()
            self._rely_no_more(gone)

    def _rely_no_more(self, gone: set[int]) -> None:
        if not gone:
            return
        for track in self.tracks.values():
            named = track.blocks[: track.named]
            if gone.isdisjoint(named):
                continue
            first = next(i for i, block in enumerate(named) if block in gone)
            track.covered = min(track.covered, first * self._block_tokens)
            track.named = first
            track.late = [index for index in track.late if index < first]

    def learn(self, known: set[int], *, before_step: int) -> None:
        """Take the journal's own list of keys; what is missing there, and not new, has been cleaned
        away, and whoever relied on such a block must append it, too.
        """
        self._named.learn_all(known, before_step=before_step)

    def learn_news(self, come: Sequence[int], gone: Sequence[int], *, before_step: int) -> None:
        """The same from what changed in that list since it was taken last."""
        self._named.learn(come, gone, before_step=before_step)

    def forget_blocks(self, model_hash: int) -> None:
        """Name nothing by what was computed so far; requests that run go on under names of their
        own, and as another model's.
        """
        self._named.clear()
        self._lapsed.clear()
        for track in self.tracks.values():
            track.chain = None
            track.model_hash = model_hash
            track.late.clear()  # their tails say what computed them

    def is_journaled(self, key: int) -> bool:
        """Whether some record has this key."""
        return self._named.is_journaled(key)

    def is_from_journal(self, block: int, key: int) -> bool:
        """NamedBlocks.is_from_journal."""
        return self._named.is_from_journal(block, key)

    def _take_blocks(self, track: Track, item: Scheduled, step: int, result: StepWrites) -> None:
        size = self._block_tokens
        if item.replaces:
            if track.is_started:
                track.renew()
            track.blocks = list(item.blocks)
            self._release(track.blocks[item.hit // size :], result)
            for index, key in item.loaded_keys.items():
                self._named.fill(track.blocks[index], key, step=step)
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
        first = track.covered // size
        # what is covered of its block is so by tails, and one more makes it whole
        is_tail_enough = sure_end == (first + 1) * size and track.covered > first * size
        if is_tail_enough and self._late.takes_more():
            self._put_off(track, item.request, first)
            tail_start = track.covered
        else:
            tail_start = max(track.covered, sure_end // size * size)
            full = self._full_blocks(track, item, first, sure_end // size)
        tail = None
        if tail_start < sure_end:
            tail = (tail_start, sure_end, track.blocks[tail_start // size])
        if full or tail:
            result.writes.append(self._write(track, item.request, tuple(full), tail))
        track.covered = sure_end
        self._name(item.request, track, step, result)

    def _put_off(self, track: Track, request: str, index: int) -> None:
        block = track.blocks[index]
        self._named.drop(block)
        track.late.append(index)
        self._late.put(Late(request, track.incarnation, index, block))

    def _append_late(self, running: set[str], step: int, result: StepWrites) -> None:
        """Blocks that were put off and are due. Only a request that is running holds its blocks for
        sure; one that was preempted may come back to none of them.
        """
        for late in self._late.due():
            track = self.tracks.get(late.request)
            if (
                track is None
                or track.incarnation != late.incarnation
                or late.at not in track.late
                or track.blocks[late.at] != late.block
                or not track.is_protected
            ):
                continue
            if late.request not in running or track.is_resting:
                self._late.put(late)
                continue
            track.late.remove(late.at)
            if late.block not in self._named or track.chain is None:
                self._named.drop(late.block)
                full = ((late.at, late.block),)
                result.writes.append(self._write(track, late.request, full, None))
            self._name(late.request, track, step, result)

    def _full_blocks(
        self, track: Track, item: Scheduled, first: int, end: int
    ) -> list[tuple[int, int]]:
        """Those of blocks [first, end) that no record has."""
        full: list[tuple[int, int]] = []
        size = self._block_tokens
        for index in range(first, end):
            block = track.blocks[index]
            # A block that was complete before this step, and whose bytes a record has: its key is
            # enough.
            if (index + 1) * size > item.start or block not in self._named or track.chain is None:
                self._named.drop(block)
                full.append((index, block))
        return full

    def _write(
        self,
        track: Track,
        request: str,
        full: tuple[tuple[int, int], ...],
        tail: tuple[int, int, int] | None,
    ) -> Write:
        key, incarnation = track.identity.key, track.incarnation
        return Write(request, key, incarnation, full, tail, track.model_hash)

    def _name(self, request: str, track: Track, step: int, result: StepWrites) -> None:
        """Note the keys of covered blocks, as far as their token ids are known and there is a
        record of the whole block for the key to name.
        """
        end = track.late[0] if track.late else track.covered // self._block_tokens
        if track.chain is None or track.named >= end:
            return
        track.chain.extend(track.tokens, limit=min(track.covered, len(track.tokens)))
        entries: list[tuple[int, int]] = []
        for index in range(track.named, min(len(track.chain.keys), end)):
            block = track.blocks[index]
            key = self._named.key_of(block)
            if not key:
                key = track.chain.keys[index]
                is_shared = not self.is_journaled(key)
                if not is_shared:
                    key = private_key(
                        key, request=track.identity.key, incarnation=track.incarnation
                    )
                self._named.author(block, key, step=step, is_shared=is_shared)
            entries.append((index, key))
        if entries:
            track.named += len(entries)
            result.notes.append(
                KeyNote(request, track.identity.key, track.incarnation, tuple(entries))
            )

    def _release(self, blocks: Iterable[int], result: StepWrites) -> None:
        for block in blocks:
            self._named.drop(block)
            result.reused.append(block)

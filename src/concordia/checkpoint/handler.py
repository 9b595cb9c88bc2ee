"""Which code serves a region, and the proof that it does, floor 4.

Owns: the handler sources for a geometry, and the self-test that every KV handler passes before an
operator names it. Promises: a handler that moves one byte wrongly on a scratch cache of this very
geometry is refused with the first byte that differs; nothing of the engine or its journal is
touched by a test. Called by checkpointer.py. Does not install anything.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from concordia import abi, config
from concordia.checkpoint.expected import KvRange, compare, expected_bytes, written_bytes
from concordia.checkpoint.region import KvGeometry, Region, RegionEntry
from concordia.checkpoint.restore_burst import RESTORE_KERNEL, RestoreBurst
from concordia.checkpoint.restore_tasks import KvPiece
from concordia.checkpoint.scratch_journal import ScratchJournal
from concordia.device.compiler import HandlerSource
from concordia.device.driver import Device, Image
from concordia.errors import HandlerRefused
from concordia.journal.record import payload_hash
from concordia.runtime.executor import Runtime
from concordia.runtime.op_table import Operator
from concordia.runtime.ring import Completion, Task
from concordia.runtime.trial import TRIAL_SLOTS, Trial

KV_HANDLERS = ("kv_append", "kv_apply", "kv_hash")
# of the scratch cache: two that a range spans, in an order that is not theirs, and one to stay
# untouched
BLOCKS = 3
TOKENS_BESIDE = 2  # tokens of the range on each side of a block boundary


def kv_source(name: str, geometry: KvGeometry) -> HandlerSource:
    """kv_append, kv_apply, kv_hash or kv_restore for one geometry."""
    return HandlerSource.of(f"{name}.cu", geometry.constants())


def bytes_source() -> HandlerSource:
    """bytes_append."""
    return HandlerSource.of("bytes_append.cu")


def page_source(page_bytes: int) -> HandlerSource:
    """page_scan for one page size."""
    return HandlerSource.of("page_scan.cu", {"PAGE_BYTES": page_bytes})


def burst_source() -> HandlerSource:
    """The scan by all multiprocessors, for pages of one leaf."""
    return HandlerSource.of("page_burst.cu")


@dataclass(frozen=True, slots=True)
class KvCode:
    """What serves a KV region: a handler each of KV_HANDLERS, and the burst that restores, where
    the device has bursts.
    """

    handlers: dict[str, Image]
    restore: Image | None


def proven_code(device: Device, geometry: KvGeometry, *, lanes: int) -> KvCode:
    """All of it for one geometry, compiled side by side and tested."""
    with ThreadPoolExecutor(len(KV_HANDLERS) + 1) as pool:
        restore = pool.submit(device.build_burst, kv_source("kv_restore", geometry))
        built = list(pool.map(lambda name: device.build(kv_source(name, geometry)), KV_HANDLERS))
    code = KvCode(dict(zip(KV_HANDLERS, built, strict=True)), restore.result())
    with closing(KvProof(device, geometry, lanes=lanes)) as proof:
        proof.test_append(code.handlers["kv_append"])
        proof.test_apply(code.handlers["kv_apply"])
        proof.test_hash(code.handlers["kv_hash"])
        if code.restore is not None:
            proof.test_restore(code.restore)
    return code


def proven_append(
    device: Device, geometry: KvGeometry, source: HandlerSource, *, lanes: int
) -> Image:
    """Another append handler for this geometry, compiled and tested."""
    image = device.build(source)
    with closing(KvProof(device, geometry, lanes=lanes)) as proof:
        proof.test_append(image)
    return image


class KvProof:
    """A scratch cache with random bytes, a scratch journal of one segment, and a test per
    handler.
    """

    def __init__(self, device: Device, geometry: KvGeometry, *, lanes: int = 1) -> None:
        self._device = device
        self._geometry = geometry
        size = geometry.block_tokens
        span = min(TOKENS_BESIDE, size)
        self._ranges = (
            KvRange(abi.KIND_KV_TAIL, size - span, size + span, (2, 0)),
            KvRange(abi.KIND_KV_BLOCK, 0, size, (2,)),
        )
        random = np.random.default_rng(
            secrets.randbits(64)
        )  # a handler cannot have been made for these bytes
        self._layers = [random.bytes(BLOCKS * geometry.stride) for _ in range(geometry.layers)]
        self._expected = [expected_bytes(geometry, self._layers, wanted) for wanted in self._ranges]
        journal = ScratchJournal([len(payload) for payload in self._expected])
        self._journal = journal
        target = journal.target
        self._runtime = Runtime(device, target=target, lanes=lanes, slots=TRIAL_SLOTS)
        self._trial = Trial(self._runtime)
        self._trial.hold(journal)
        self._addresses = [self._trial.allocate(len(layer), layer) for layer in self._layers]
        self._entry = RegionEntry(
            device,
            number=1,
            bases=self._addresses,
            block_count=BLOCKS,
            layout_hash=geometry.layout_hash(),
        )
        self._trial.hold(self._entry)

    def close(self) -> None:
        self._trial.close()

    def test_append(self, image: Image) -> None:
        """Both kinds of record, against bytes picked out of the scratch cache by index. Once per
        proof: records stay.
        """
        for index, (wanted, expected) in enumerate(zip(self._ranges, self._expected, strict=True)):
            done = self._run("append", image, wanted)
            if done.is_ok:  # the first byte that differs says more than a hash
                compare("kv_append", expected, self._journal.payload(index))
            self._judge("kv_append", done, expected)

    def test_hash(self, image: Image) -> None:
        """The hash that an append of the same range commits."""
        for wanted, expected in zip(self._ranges, self._expected, strict=True):
            self._judge("kv_hash", self._run("hash", image, wanted), expected)

    def test_apply(self, image: Image) -> None:
        """Exactly the range is written, all else keeps its bytes; and nothing is written when the
        hash is not the record's.
        """
        zeros = [bytes(len(layer)) for layer in self._layers]
        for wanted, expected in zip(self._ranges, self._expected, strict=True):
            self._journal.pool.view[: len(expected)] = expected
            for promised, after in (
                (payload_hash(expected) ^ 1, zeros),
                (payload_hash(expected), self._applied(wanted)),
            ):
                self._fill(zeros)
                done = self._run("apply", image, wanted, key=promised, source_bytes=len(expected))
                for layer, (address, want) in enumerate(zip(self._addresses, after, strict=True)):
                    compare(f"kv_apply, layer {layer}", want, self._trial.read(address, len(want)))
                if done.is_ok != (promised == payload_hash(expected)):
                    raise HandlerRefused(
                        f"kv_apply: status {done.status} for a payload whose hash "
                        f"is{'' if after is not zeros else ' not'} right"
                    )
        self._fill(self._layers)

    def test_restore(self, image: Image) -> None:
        """The burst writes exactly the range too, and says so when the hash is not the record's.
        After the handlers were tested.
        """
        append, apply, look = (self._found(name) for name in ("append", "apply", "hash"))
        layout = self._geometry.layout_hash()
        region = Region(1, self._geometry, layout, self._entry, append, apply, look)
        with self._runtime.parked():
            burst = self._device.burst(image, RESTORE_KERNEL)
        zeros = [bytes(len(layer)) for layer in self._layers]
        with closing(RestoreBurst(self._device, burst, region)) as restore:
            for wanted, expected in zip(self._ranges, self._expected, strict=True):
                self._journal.pool.view[: len(expected)] = expected
                self._fill(zeros)
                right = KvPiece(
                    *(wanted.kind, wanted.token_start, wanted.token_end, wanted.blocks),
                    *(self._journal.pool.address, len(expected), payload_hash(expected)),
                )
                wrong = right._replace(payload_hash=right.payload_hash ^ 1)
                said = restore.restore(
                    self._runtime, self._journal.target, [wrong, right], config.WAIT_TASK_S
                )
                if said != [abi.STATUS_HASH_MISMATCH, abi.STATUS_OK]:
                    raise HandlerRefused(
                        f"kv_restore: statuses {said} for a wrong and a right hash"
                    )
                for layer, (address, want) in enumerate(
                    zip(self._addresses, self._applied(wanted), strict=True)
                ):
                    found = self._trial.read(address, len(want))
                    compare(f"kv_restore, layer {layer}", want, found)
        self._fill(self._layers)

    def _applied(self, wanted: KvRange) -> list[bytes]:
        """The scratch cache if only this range had been restored into zeroes."""
        is_written = written_bytes(self._geometry, wanted, block_count=BLOCKS)
        return [(np.frombuffer(layer, np.uint8) * is_written).tobytes() for layer in self._layers]

    def _found(self, name: str) -> Operator:
        operator = self._runtime.operators.find(name)
        assert operator is not None, "its handler was not tested"
        return operator

    def _run(
        self, name: str, image: Image, wanted: KvRange, *, key: int = 0, source_bytes: int = 0
    ) -> Completion:
        self._trial.adopt(name, image, region_address=self._entry.address)
        return self._trial.run(
            Task(
                kind=abi.TASK_CHECKPOINT,
                record_kind=wanted.kind,
                token_start=wanted.token_start,
                token_end=wanted.token_end,
                blocks=wanted.blocks,
                source=self._journal.pool.address,
                key=key,
                source_bytes=source_bytes,
            )
        )

    def _judge(self, name: str, done: Completion, expected: bytes) -> None:
        if not done.is_ok:
            raise HandlerRefused(f"{name}: status {done.status} in its self-test")
        if done.payload_hash != payload_hash(expected):
            raise HandlerRefused(
                f"{name}: payload hash {done.payload_hash:#x}, expected {payload_hash(expected):#x}"
            )

    def _fill(self, layers: Sequence[bytes]) -> None:
        for address, layer in zip(self._addresses, layers, strict=True):
            self._trial.write(address, layer)

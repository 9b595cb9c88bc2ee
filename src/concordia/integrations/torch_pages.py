"""Tensors that a step changes, saved as it goes on: adapters, optimiser moments, anything in torch.

Owns: `TorchPages`: a stage for each named group of tensors, registered as a page region, and one
series of checkpoints of them. Promises: tensors are never moved and may be of any shape and stride;
a checkpoint is one consistent cut of all groups and the caller's bytes: a step copies them into the
stages, in the order of the current CUDA stream, and only stages are scanned, so training may write
the tensors again at once; what `save` or `commit` returned is there after SIGKILL; `restore` gives
back the same bits, or raises. One thread at a time. Costs as much device memory as the tensors
have. Called by training loops. It opens no model and pickles nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import torch
import xxhash

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.cut import Committed, CutWriter
from concordia.checkpoint.region import PageRegion
from concordia.checkpoint.series import open_sole
from concordia.errors import UsageError
from concordia.journal.checkpoints import series_key
from concordia.journal.client import JournalClient
from concordia.journal.spawn import spawn_owner
from concordia.recovery.pages import restore_checkpoint

PAGE_BYTES = abi.LEAF_BYTES  # the size that a whole GPU can scan in one burst
_ALIGNMENT = 64  # of a tensor in its stage: whole words of every type

Tensors: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Restored:
    """What came back beside the tensors: the step that was saved, and the caller's bytes."""

    step: int
    extra: bytes


class Stage:
    """Tensors side by side in whole pages: what was saved last."""

    def __init__(self, name: str, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.views: list[torch.Tensor] = []
        for tensor in self.tensors:
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.numel() == 0:
                raise UsageError(
                    f"{name}: a tensor of shape {tuple(tensor.shape)} is empty, sparse or quantized"
                )
        places = [0]
        for tensor in self.tensors:
            size = tensor.numel() * tensor.element_size()
            places.append(-(-(places[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
        self.size = -(-places[-1] // PAGE_BYTES) * PAGE_BYTES
        self._memory = torch.zeros(self.size, dtype=torch.uint8, device=device)
        for at, tensor in zip(places, self.tensors, strict=False):
            size = tensor.numel() * tensor.element_size()
            view = self._memory[at : at + size].view(tensor.dtype).view(tensor.shape)
            self.views.append(view)

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self._memory.data_ptr())

    def layout_hash(self) -> int:
        """64 bits that name what the bytes mean: types and shapes in their order."""
        facts = [[str(tensor.dtype), list(tensor.shape)] for tensor in self.tensors]
        return xxhash.xxh3_64_intdigest(json.dumps(facts).encode())


class TorchPages:
    """Saves and restores named groups of tensors; `open` makes one."""

    def __init__(
        self,
        stages: Mapping[str, Stage],
        device: torch.device,
        *,
        name: str,
        client: JournalClient,
    ) -> None:
        self._stages = dict(stages)
        self._device = device
        self._client = client
        self._key = series_key(name)
        self._is_begun = False
        self._stream = open_sole(client, name)
        try:
            self._checkpoint = client.checkpoint(self._key)
            ours = "host" if device.type == "cpu" else f"cuda:{device.index}"
            self.checkpointer = Checkpointer.open(ours, self._stream.target)
        except BaseException:
            self._stream.close()
            raise
        try:
            self._regions: dict[str, PageRegion] = {
                name: self.checkpointer.register_pages(
                    stage.address, size=stage.size, page_bytes=PAGE_BYTES,
                    layout_hash=stage.layout_hash(),
                )
                for name, stage in self._stages.items()
            }  # fmt: skip
        except BaseException:
            self._close_stream()
            raise
        # Later lives have larger numbers, those that never saved anything included.
        incarnation = max(self._checkpoint.newest + 1, time.time_ns())
        self.writer = CutWriter(
            self.checkpointer, self._regions, key=self._key, incarnation=incarnation
        )

    @classmethod
    def open(
        cls,
        tensors: Mapping[str, Tensors],
        *,
        name: str,
        journal: Path,
        journal_bytes: int | None = None,
        linger_s: float = config.OWNER_LINGER_S,
    ) -> Self:
        """Protect these tensors, by name of their group, as the series `name` of this journal.

        A journal that nobody owns gets an owner: it takes `journal_bytes` (four times the tensors
        is ample) and keeps them for `linger_s` after the last process that uses it. Raises
        UsageError for tensors that cannot be saved, JournalError while another process writes the
        series.
        """
        groups = {
            group: [found] if isinstance(found, torch.Tensor) else list(found)
            for group, found in tensors.items()
        }
        if not groups or not all(groups.values()):
            raise UsageError("no tensors to protect: give at least one in each group")
        if len(name.encode()) > abi.LINE_BYTES:
            raise UsageError(f"{name[:40]!r}...: at most {abi.LINE_BYTES} bytes of name")
        device = _device_of([tensor for found in groups.values() for tensor in found])
        stages = {group: Stage(group, found, device) for group, found in groups.items()}
        spawn_owner(journal, size_bytes=journal_bytes, linger_s=linger_s)
        client = JournalClient.connect(journal)
        try:
            return cls(stages, device, name=name, client=client)
        except BaseException:
            client.close()
            raise

    def save(self, step: int, extra: bytes = b"") -> Committed:
        """Save the tensors as they are now, and these bytes, as this step; returns once all of it
        is committed. Steps only grow.
        """
        self.stage(step, extra)
        return self.commit()

    def stage(self, step: int, extra: bytes = b"") -> None:
        """The first half of `save`, without waiting for the journal: the tensors may change again.
        What was staged before is committed first.
        """
        if self._is_begun:
            self.commit()
        for stage in self._stages.values():
            _copy(stage.views, stage.tensors)
        if self._device.type == "cuda":
            self.checkpointer.order_after(torch.cuda.current_stream(self._device).cuda_stream)
        self.writer.begin(step, extra)
        self._is_begun = True

    def commit(self) -> Committed:
        """The second half: wait for what was staged. Raises JournalFull or WaitTimeout; then the
        step before is what a restore gives.
        """
        self._is_begun = False
        return self.writer.commit()

    def restore(self) -> Restored | None:
        """Write the newest step that an earlier process saved into the tensors; None when there is
        none. Raises Corruption or LayoutMismatch, and then no tensor was touched.
        """
        if not self._checkpoint.incarnation:
            return None
        if self._device.type == "cuda":  # what the stages were made with comes first
            torch.cuda.current_stream(self._device).synchronize()
        pool, _ = self._client.map()
        self._checkpoint = self._client.checkpoint(self._key)  # the places as they are now
        extra = restore_checkpoint(self.checkpointer, self._regions, self._checkpoint, pool.view)
        with torch.no_grad():
            for stage in self._stages.values():
                _copy(stage.tensors, stage.views)
        return Restored(self._checkpoint.step, extra)

    def finish(self) -> None:
        """The work is done: nothing of this series is kept."""
        self._client.finish(self._key)

    def close(self) -> None:
        """Give everything back; what was committed stays in the journal."""
        self._close_stream()
        self._client.close()

    def _close_stream(self) -> None:
        try:
            self.checkpointer.close()
        finally:
            self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _device_of(tensors: Sequence[torch.Tensor]) -> torch.device:
    """Where stages lie: the GPU of the tensors, if any is on one (some optimisers keep their count
    of steps on the CPU), else the CPU.
    """
    devices = {tensor.device for tensor in tensors}
    others = {device for device in devices if device.type != "cpu"}
    if len(others) > 1 or any(device.type != "cuda" for device in others):
        raise UsageError(f"tensors on {sorted(map(str, devices))}: use one GPU, or the CPU")
    return next(iter(others), torch.device("cpu"))


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """All of them by one launch where they lie on one device."""
    if len({tensor.device for tensor in [*targets, *sources]}) == 1:
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)

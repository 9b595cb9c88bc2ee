"""One rank's stream in the journal, its executor, and its KV memory as a region of it.

Owns: what is opened for one KV memory, in order, and given back in the opposite one. Promises: a
rank that cannot be opened leaves nothing open; `say` never raises for want of room. Made by the
worker side, once per KV memory. It appends and restores nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import Region
from concordia.device.policy import AUTO, DEFAULT
from concordia.errors import ConcordiaError
from concordia.integrations.vllm import compat
from concordia.integrations.vllm.door import logger
from concordia.integrations.vllm.graph_places import GraphPlaces, RankTickets, open_places
from concordia.integrations.vllm.layout import Layout, in_words
from concordia.journal.client import JournalClient, StreamAttachment
from concordia.journal.mapped_ahead import MappedAhead
from concordia.journal.record import request_key

if TYPE_CHECKING:
    from concordia.integrations.vllm.settings import Settings


class Rank:
    """Open from its making until `close`."""

    def __init__(
        self, settings: Settings, vllm_config: Any, layout: Layout, *, layers: Iterable[str]
    ) -> None:
        self.number = compat.worker_rank(vllm_config)
        self.is_cuda = layout.rows[0].device.type == "cuda"
        device = settings.device
        if device == "auto":
            device = f"cuda:{layout.rows[0].device.index or 0}" if self.is_cuda else "host"
        with ExitStack() as opened:
            self._attachment = self._open_stream(settings, vllm_config, layout, opened)
            if not self.is_cuda:  # a GPU's driver maps what it registers
                opened.callback(MappedAhead(self._attachment.pool.mapping).close)
            self.checkpointer = Checkpointer.open(
                device,
                self._attachment.target,
                lanes=settings.executor_ctas if self.is_cuda else 1,
                residency=self._residency(settings.residency, device),
            )
            opened.callback(self.checkpointer.close)
            self.region: Region = self.checkpointer.register_kv(layout.geometry, layout.addresses)
            runtime = self.checkpointer.runtime
            self.places: GraphPlaces | None = open_places(runtime, vllm_config, layers=layers)
            self._opened = opened.pop_all()
        self.tickets = RankTickets(self.checkpointer, self.places)
        logger.info(
            "Concordia protects rank %d: %s, %s, %s",
            *(self.number, device, runtime.stats().residency, in_words(layout.geometry)),
        )

    @property
    def pool_address(self) -> int:
        return self._attachment.target.pool_address

    def committed_count(self) -> int:
        """Records that the stream has."""
        return self._attachment.board.control(self._attachment.slot).committed_count

    def busy_ns(self) -> int:
        """Time that handlers have run so far."""
        placed = self.places.busy_ns if self.places is not None else 0
        return self.checkpointer.runtime.busy_ns() + placed

    def say(self, facts: dict[str, Any], count: Callable[[int], None]) -> None:
        """An event in this rank's stream. `count` is told of the record before it is handed in,
        and with -1 when it was refused.
        """
        count(1)
        try:
            self.checkpointer.append_bytes(
                json.dumps(facts).encode(),
                kind=abi.KIND_EVENT,
                key=request_key(str(facts.get("request", ""))),
                incarnation=0,
            )
        except ConcordiaError as error:
            logger.warning("Concordia could not record %s: %s", facts, error)
            count(-1)

    def close(self) -> None:
        """End the stream; nothing of it is under way."""
        self._opened.close()

    def _open_stream(
        self, settings: Settings, vllm_config: Any, layout: Layout, opened: ExitStack
    ) -> StreamAttachment:
        client = JournalClient.connect(settings.journal)
        opened.callback(client.close)
        attachment = client.open_stream(
            writer_kind=abi.WRITER_RANK,
            rank=self.number,
            world=compat.world_size(vllm_config),
            replica=settings.replica,
            layout_hash=layout.geometry.layout_hash(),
            label=f"vllm rank {self.number}",
            node=compat.device_node(layout.rows[0].device),
        )
        opened.callback(attachment.close)
        return attachment

    def _residency(self, wanted: str, device: str) -> str:
        """What was asked for; on a CPU, which has one, that."""
        if device == "host" and wanted not in (DEFAULT, AUTO):
            logger.warning(
                "Concordia: a CPU has no residency %s; rank %d goes on with %s",
                *(wanted, self.number, DEFAULT),
            )
            return DEFAULT
        return wanted

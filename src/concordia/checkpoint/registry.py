"""Registered regions of one writer, with the handlers that serve them, floor 4.

Owns: registration, hot swap of a region's handler, bursts that were loaded for regions, and giving
all of it back. Promises: a region is served only by handlers that passed the lint and a self-test
on its own geometry; a registration that fails leaves nothing behind; numbers are never used again.
Any thread may call. Called by checkpointer.py. It hands in no tasks of regions.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack

from concordia import abi
from concordia.checkpoint.handler import burst_source, proven_append, proven_code
from concordia.checkpoint.page_tasks import PageTasks
from concordia.checkpoint.record_proof import proven_pages
from concordia.checkpoint.region import BASE_ALIGNMENT, KvGeometry, PageRegion, Region, RegionEntry
from concordia.checkpoint.restore_burst import RESTORE_KERNEL, RestoreBurst
from concordia.device.compiler import HandlerSource
from concordia.device.driver import Burst, Device, Image
from concordia.errors import UsageError
from concordia.runtime.executor import Runtime
from concordia.runtime.op_table import Operator


class Registry:
    """The regions of one runtime; `close` after the runtime's end."""

    def __init__(self, device: Device, runtime: Runtime, *, lanes: int) -> None:
        self._device, self._runtime, self._lanes = device, runtime, lanes
        self._lock = threading.Lock()
        self._regions: list[Region | PageRegion] = []
        self.pages: dict[int, PageTasks] = {}  # of page regions
        self.restores: dict[int, RestoreBurst] = {}  # of KV regions, where the device has bursts
        self._burst: Burst | None = None  # for all page regions, once the first is there

    def add_kv(self, geometry: KvGeometry, layer_addresses: Sequence[int]) -> Region:
        """Make a paged KV cache known: compiles, proves and installs its handlers. Seconds at
        first, milliseconds from the cache.
        """
        geometry.check()
        if len(layer_addresses) != geometry.layers:
            raise UsageError(f"{len(layer_addresses)} addresses for {geometry.layers} layers")
        for address in layer_addresses:
            if address % BASE_ALIGNMENT:
                raise UsageError(
                    f"a layer at {address:#x} is not aligned to {BASE_ALIGNMENT} bytes"
                )
            self._device.check_range(
                address, (geometry.block_count - 1) * geometry.stride + geometry.block_bytes
            )
        code = proven_code(self._device, geometry, lanes=self._lanes)
        with self._lock, ExitStack() as undo:
            number = len(self._regions) + 1
            entry = RegionEntry(
                self._device,
                number=number,
                bases=layer_addresses,
                block_count=geometry.block_count,
                layout_hash=geometry.layout_hash(),
            )
            undo.callback(entry.close)
            operators = [
                self._runtime.adopt(f"{name}.{number}", image, region_address=entry.address)
                for name, image in code.handlers.items()
            ]
            region = Region(number, geometry, geometry.layout_hash(), entry, *operators)
            burst = self._load_burst(code.restore, RESTORE_KERNEL)
            if burst is not None:
                self.restores[number] = RestoreBurst(self._device, burst, region)
            self._regions.append(region)
            undo.pop_all()
        return region

    def _load_burst(self, image: Image | None, name: str) -> Burst | None:
        if image is None:
            return None
        with self._runtime.parked():
            return self._device.burst(image, name)

    def add_pages(
        self, address: int, *, size: int, page_bytes: int, layout_hash: int
    ) -> PageRegion:
        """Make opaque memory known, to be found dirty by hash; at first all of it is. Its records
        carry `layout_hash`: what the bytes mean.
        """
        if (
            page_bytes < 1
            or page_bytes % abi.LEAF_BYTES
            or size < 1
            or size % page_bytes
            or address % BASE_ALIGNMENT
        ):
            raise UsageError(
                f"{size} bytes at {address:#x} in pages of {page_bytes}: want whole pages of "
                f"whole {abi.LEAF_BYTES}-byte leaves"
            )
        self._device.check_range(address, size)
        pages = size // page_bytes
        image = proven_pages(self._device, page_bytes, lanes=self._lanes)
        page_burst = self._device.build_burst(burst_source())
        with self._lock, ExitStack() as undo:
            number = len(self._regions) + 1
            hashes = self._device.allocate(PageRegion.table_bytes(pages))
            undo.callback(self._device.free, hashes)
            entry = RegionEntry(
                self._device, number=number, bases=[address], block_count=pages,
                layout_hash=layout_hash, page_hashes=hashes,
            )  # fmt: skip
            undo.callback(entry.close)
            operator = self._runtime.adopt(
                f"page_scan.{number}", image, region_address=entry.address
            )
            if page_bytes == abi.LEAF_BYTES and self._burst is None:
                self._burst = self._load_burst(page_burst, "concordia_page_burst")
            burst = self._burst if page_bytes == abi.LEAF_BYTES else None
            region = PageRegion(
                number, address, page_bytes, pages, layout_hash, entry, hashes, operator, burst
            )
            self.pages[number] = PageTasks(self._runtime, region)
            self._regions.append(region)
            undo.pop_all()
        return region

    def replace_append(self, region: Region, source: HandlerSource) -> Operator:
        """Hot swap of a region's append handler; raises HandlerRefused or CompileError and leaves
        the old one in place.
        """
        image = proven_append(self._device, region.geometry, source, lanes=self._lanes)
        return self._runtime.adopt(region.append.name, image, region_address=region.entry.address)

    def replace_scan(self, region: PageRegion, source: HandlerSource) -> Operator:
        """The same for the scan handler of an opaque region."""
        image = proven_pages(self._device, region.page_bytes, lanes=self._lanes, source=source)
        return self._runtime.adopt(region.scan.name, image, region_address=region.entry.address)

    def close(self) -> None:
        """Give back what regions have on the device."""
        with self._lock:
            for restore in self.restores.values():
                restore.close()
            for region in self._regions:
                region.entry.close()
                if isinstance(region, PageRegion):
                    self._device.free(region.page_hashes)
            self._regions.clear()
            self.restores.clear()

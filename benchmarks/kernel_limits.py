"""What plain kernels reach on the work of a page scan and of an append, each alone.

Owns: 256 MiB scanned in pages of 4 KiB, and 512 MiB stored to shared memory of the host, by the
kernels of kernel_limits.cu and the copy engine. Promises: who hashes runs page_hash.h and stream.h
as they stand; a kernel that read, found or stored anything else than it should ends the run; no
wait for one is without a bound. Run by `make kernel-limits`, on the first GPU, from sm_90 on.
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xxhash

from concordia import abi
from concordia.device.compiler import HandlerSource
from concordia.device.cuda import CudaCompiler
from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext, CudaMemory
from concordia.device.memory import SharedFile
from concordia.errors import DeviceError, EnvironmentRefused, WaitTimeout
from concordia.testing.command import Parser, count, file_in_folder, run_command
from concordia.testing.machine import machine

SOURCE: Final = pathlib.Path(__file__).with_suffix(".cu")
RESULT: Final = SOURCE.parent / "results" / "kernel_limits_h200.json"
LEAF: Final = abi.LEAF_BYTES
REGION_BYTES: Final = 256 << 20
REGIONS: Final = 2  # scanned in turn: a cache has nothing of what comes next
ALL_BYTES: Final = REGIONS * REGION_BYTES
PAGES: Final = REGION_BYTES // LEAF
LEAVES: Final = ALL_BYTES // LEAF
RING_BYTES: Final = 16 * 2 * (LEAF + 8)  # of shared memory: leaves of 16 warps, and barriers
FOUND_AT: Final = 16 * PAGES  # in a table, behind two words a page: how many were found, and which
SCAN_CTAS: Final = (1, 4, 8)
STORE_CTAS: Final = (1, 4, 8, 16)
WARM_UP: Final = 20
WAIT_S: Final = 10.0  # the slowest kernel takes 20 ms
NOT_YET: Final = "CUDA_ERROR_NOT_READY"
SAMPLE: Final = 64  # hashes that the xxhash library checks
SEED: Final = 4
WHAT: Final = (
    "what plain kernels of 512 threads reach, each alone: 256 MiB scanned in pages of 4 KiB (us), "
    "and 512 MiB stored to shared memory of the host (GB/s, 10^9 bytes)"
)
Words = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel of kernel_limits.cu, and how it is launched."""

    name: str
    kernel: str
    threads: int = 512
    shared_bytes: int = 0
    is_hash: bool = False
    is_read: bool = True


SCANS: Final = (
    Row("read, in the order of page_hash.h", "read_as_page_hash"),
    Row("read and hashed by page_hash.h", "hash_as_page_hash", is_hash=True),
    Row("read, 4 KiB a warp, 1024 threads", "read_leaves", threads=1024),
    Row("read by bulk copies into 128 KiB of shared memory", "read_copies", 512, RING_BYTES),
    Row("the same, hashed from there", "hash_copies", 512, RING_BYTES, is_hash=True),
)
HASH_AND_STORE: Final = Row("hash_whole_leaf of stream.h", "hash_and_store", is_hash=True)
STORES: Final = (
    Row("constants stored", "store_constants", is_read=False),
    Row("read and stored", "read_and_store"),
    HASH_AND_STORE,
)


class Bench:
    """The first GPU: its stream, the bytes that are scanned and stored, and their hashes."""

    def __init__(self) -> None:
        context = CudaContext(0)
        driver = self._driver = context.driver
        architecture = context.architecture()
        if int(architecture.removeprefix("sm_")) < 90:
            raise EnvironmentRefused(f"a GPU of {architecture}: these kernels are for sm_90 on")
        checked(driver.cuCtxSetCurrent(context.handle), "enter the context")
        self._memory = CudaMemory(context)
        path = pathlib.Path("/dev/shm") / f"concordia-bench-{os.getpid()}-limits"
        self._file = SharedFile.create(path, ALL_BYTES)
        path.unlink()
        self.target = self._memory.share(self._file.address, ALL_BYTES)
        self.stored = np.frombuffer(self._file.view, np.uint64)
        source = HandlerSource.of(SOURCE.name, text=SOURCE.read_text(encoding="utf-8"))
        cubin = CudaCompiler(architecture).kernel(source).cubin
        self._module = checked(driver.cuModuleLoadData(cubin), "load the kernels")
        self._stream = checked(driver.cuStreamCreate(1), "create a stream")
        self._events = [checked(driver.cuEventCreate(0), "create an event") for _ in range(2)]
        self.data = np.random.default_rng(SEED).integers(0, 1 << 64, ALL_BYTES // 8, np.uint64)
        self.source = self._memory.allocate(ALL_BYTES)
        self._memory.write(self.source, self.data.tobytes())
        self.answer = self._memory.allocate(16)
        self.digests = self._memory.allocate(16 * LEAVES)
        self.tables = [self._memory.allocate(FOUND_AT + 8 + 4 * PAGES) for _ in range(REGIONS)]
        self.bases = [self.source + i * REGION_BYTES for i in range(REGIONS)]
        self.regions = [[self._region(base, table) for table in self.tables] for base in self.bases]
        self.hashes = self._make_tables()

    def _region(self, base: int, table: int) -> int:
        """A Region, with its base behind it, in device memory."""
        address = self._memory.allocate(abi.REGION.size + 8)
        words = np.zeros(1, abi.REGION.dtype)
        words["bases"], words["base_count"] = address + abi.REGION.size, 1
        words["block_count"], words["page_hashes"] = PAGES, table
        self._memory.write(address, words.tobytes() + base.to_bytes(8, "little"))
        return address

    def _make_tables(self) -> Words:
        """By hash_whole_leaf, again and again until clocks have come up."""
        for _ in range(WARM_UP):
            for base, table in zip(self.bases, self.tables, strict=True):
                self.launch(HASH_AND_STORE, 132, 0, base, PAGES, table, 0, self.answer)
        self.wait()
        hashes = np.concatenate([self.words(table, 2 * PAGES) for table in self.tables])
        for leaf in np.random.default_rng(SEED).integers(0, LEAVES, SAMPLE):
            words = self.data[leaf * LEAF // 8 : (leaf + 1) * LEAF // 8]
            told = int.from_bytes(hashes[2 * leaf : 2 * leaf + 2].tobytes(), "little")
            if xxhash.xxh3_128_intdigest(words.tobytes()) != told:
                raise DeviceError(f"hash_whole_leaf and xxhash have other hashes of leaf {leaf}")
        return hashes

    def launch(self, row: Row, ctas: int, *work: int) -> None:
        """With the words of struct Work."""
        driver = self._driver
        function = checked(driver.cuModuleGetFunction(self._module, row.kernel.encode()), "find")
        if row.shared_bytes:
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(function, limit, row.shared_bytes), "ask for memory")
        words = (ctypes.c_uint64 * 6)(*work)
        places = (ctypes.c_void_p * 1)(ctypes.addressof(words))
        shape = (ctas, 1, 1, row.threads, 1, 1, row.shared_bytes, self._stream)
        launched = driver.cuLaunchKernel(function, *shape, ctypes.addressof(places), 0)
        checked(launched, f"launch {row.kernel}")

    def wait(self) -> None:
        """Until all that was asked for is done, for WAIT_S at most."""
        checked(self._driver.cuEventRecord(self._events[1], self._stream), "end")
        until = time.monotonic() + WAIT_S
        while (asked := self._driver.cuEventQuery(self._events[1]))[0].name == NOT_YET:
            if time.monotonic() > until:
                raise WaitTimeout(f"a kernel has not ended after {WAIT_S} s")
        checked(asked, "wait for a kernel")

    def best_us(self, act: Callable[[int], None], rounds: int) -> float:
        """The least of so many; all is there when it starts, for a kernel holds the stream."""
        times = []
        for turn in range(rounds):
            self.launch(Row("", "hold", threads=32), 1)
            checked(self._driver.cuEventRecord(self._events[0], self._stream), "begin")
            act(turn)
            self.wait()
            times.append(float(checked(self._driver.cuEventElapsedTime(*self._events), "measure")))
        return round(min(times) * 1e3, 1)

    def copy_out(self, _turn: int) -> None:
        """All bytes, by the copy engine."""
        asked = self._driver.cuMemcpyDtoHAsync(self.target, self.source, ALL_BYTES, self._stream)
        checked(asked, "copy")

    def words(self, address: int, number: int) -> Words:
        """What device memory holds once all is done."""
        return np.frombuffer(self._memory.read(address, 8 * number), np.uint64)

    def clear(self, address: int, number: int) -> None:
        """So many words of device memory."""
        self._memory.write(address, bytes(8 * number))


def scan(bench: Bench, row: Row, ctas: int, rounds: int) -> float:
    """Best microseconds of a region."""

    def go(i: int, table: int) -> None:
        work = (bench.regions[i][table], bench.bases[i], PAGES, bench.tables[table], 0)
        bench.launch(row, ctas, *work, bench.answer)

    for i in range(REGIONS):
        wanted = 0 if row.is_hash else int(np.bitwise_xor.reduce(np.split(bench.data, REGIONS)[i]))
        for table in range(REGIONS) if row.is_hash else (i,):  # the other one has no right hash
            bench.clear(bench.answer, 2)
            go(i, table)
            bench.wait()
            read, is_late = (int(word) for word in bench.words(bench.answer, 2))
            found = int(bench.words(bench.tables[table] + FOUND_AT, 1)[0])
            bench.clear(bench.tables[table] + FOUND_AT, 1)
            if is_late or (read, found) != (wanted, PAGES if table != i else 0):
                state = f"{found} pages differ, {read:x} was read, {is_late} waits ended early"
                raise DeviceError(f"{row.name}, {ctas} CTAs: {state}")
    return bench.best_us(lambda turn: go(turn % REGIONS, turn % REGIONS), rounds)


def store(bench: Bench, row: Row, ctas: int, rounds: int) -> float:
    """Best GB/s of all leaves."""
    bench.stored[:] = 0  # what was there before must not pass
    bench.clear(bench.digests, 2 * LEAVES)
    work = (0, bench.source, LEAVES, bench.digests, bench.target, bench.answer)
    us = bench.best_us(lambda _: bench.launch(row, ctas, *work), rounds)
    wanted = bench.data if row.is_read else np.repeat(np.arange(LEAVES, dtype=np.uint64), LEAF // 8)
    if not np.array_equal(bench.stored, wanted):
        raise DeviceError(f"{row.name}, {ctas} CTAs: other bytes are stored")
    if row.is_hash and not np.array_equal(bench.words(bench.digests, 2 * LEAVES), bench.hashes):
        raise DeviceError(f"{row.name}, {ctas} CTAs: other hashes than those of the table")
    return round(ALL_BYTES / us / 1e3, 2)


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--scans", type=count, default=20)
    parser.add_argument("--stores", type=count, default=3)
    parser.add_argument("--output", type=file_in_folder, default=RESULT)
    options = parser.parse_args(arguments)
    bench, scans, stores = Bench(), {}, {}
    for row in SCANS:
        scans[row.name] = {f"{n} CTAs": scan(bench, row, n, options.scans) for n in SCAN_CTAS}
        print(f"{row.name:52} us   {scans[row.name]}", flush=True)
    for row in STORES:
        stores[row.name] = {f"{n} CTAs": store(bench, row, n, options.stores) for n in STORE_CTAS}
        print(f"{row.name:52} GB/s {stores[row.name]}", flush=True)
    us = bench.best_us(bench.copy_out, options.stores)
    stores["copy engine"] = {"us": us, "GBps": round(ALL_BYTES / us / 1e3, 2)}
    print(f"{'copy engine':52} GB/s {stores['copy engine']}", flush=True)
    result = {
        "what": WHAT,
        "machine": (found := machine()),
        "commit": found["commit"],
        "note": f"best of {options.scans} (scan) and of {options.stores} (store)",
        "scan_us": scans,
        "store_gb_per_s": stores,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)

"""What the runtime costs and moves on one GPU.

Round trip through the ring, appends and restores of a model's KV, parking and hot swap, each beside
a plain launch in the same process. Writes benchmarks/results/gpu_runtime.json (medians with spread)
and prints a table. Needs an NVIDIA GPU and 4 GiB of /dev/shm.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from bench import stay
from figures import Figures, figure, timed, us
from lent_stream import Stream
from peers import launch_and_sync
from swap import swap

from concordia import abi
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.checkpoint.region import KvGeometry, Plane, Region
from concordia.device.cuda import CudaDevice
from concordia.runtime.ring import Task
from concordia.testing.command import Parser, count, file_in_folder, run_command
from concordia.testing.machine import machine

RESULTS: Final = pathlib.Path(__file__).parent / "results" / "gpu_runtime.json"

# Llama shape of 1 B parameters: 16 layers, 8 KV heads of 128, bf16: 64 KiB per token, 1 MiB per
# block of 16 tokens.
MODEL: Final = KvGeometry(
    layers=16, block_count=2048, block_tokens=16, block_bytes=65536, heads=8, head_dim_key=128,
    head_dim_value=128, element_bytes=2, key=Plane(0, 512, 4096, 2), value=Plane(256, 512, 4096, 2),
    dtype="bfloat16", instruction_set="sm_90",
)  # fmt: skip


class Bench:
    """One checkpointer with a model's KV cache on one GPU."""

    def __init__(self, device: CudaDevice, stream: Stream, *, ctas: int) -> None:
        self.stream = stream
        stream.restart()
        self.checkpointer = Checkpointer(device, stream.target(), lanes=ctas)
        self._layers = [
            device.allocate(MODEL.block_count * MODEL.stride) for _ in range(MODEL.layers)
        ]
        noise = (
            np.random.default_rng(1)
            .integers(0, 256, MODEL.block_count * MODEL.stride, dtype=np.uint8)
            .tobytes()
        )
        for layer in self._layers:
            device.write(layer, noise)
        self.region: Region = self.checkpointer.register_kv(MODEL, self._layers)
        self.runtime = self.checkpointer.runtime
        stay(self.runtime)

    def close(self) -> None:
        self.checkpointer.close()
        for layer in self._layers:
            self.checkpointer.device.free(layer)

    def round_trip(self) -> dict[str, Any]:
        task = Task()
        return us(timed(5000, lambda: self.runtime.wait(self.runtime.submit(task))))

    def append(self, count: int, *, tokens: int, whole: bool) -> list[float]:
        """Seconds of several bursts of `count` records, from the first submission to the last
        completion.
        """
        kind = abi.KIND_KV_BLOCK if whole else abi.KIND_KV_TAIL
        blocks_each = -(-tokens // MODEL.block_tokens)
        found = []
        for burst in range(7):
            self.stream.refill()
            self.runtime.drain()
            started = time.perf_counter()
            for i in range(count):
                first = (burst * 131 + i * blocks_each * 3) % (MODEL.block_count - blocks_each)
                ticket = self.checkpointer.append_kv(
                    self.region, kind=kind, key=i, incarnation=1, token_start=0, token_end=tokens,
                    blocks=range(first, first + blocks_each), step=burst,
                )  # fmt: skip
            done = self.checkpointer.wait(ticket)
            found.append(time.perf_counter() - started)
            assert done.is_ok, done
        return found[1:]

    def append_one(self) -> dict[str, Any]:
        """One token of one request, alone: submission to completion."""

        def one() -> None:
            ticket = self.checkpointer.append_kv(
                self.region, kind=abi.KIND_KV_TAIL, key=1, incarnation=1, token_start=3,
                token_end=4, blocks=[77], step=1
            )  # fmt: skip
            while self.checkpointer.result(ticket) is None:
                pass  # the waiter's naps are longer than what is measured

        self.stream.refill()
        return us(timed(1000, one))

    def empty_rate(self) -> dict[str, Any]:
        """Empty tasks that are there already, per task: what the ring itself takes."""
        task = Task()
        found = []
        for _ in range(7):
            with self.runtime.parked():
                for _ in range(1000):
                    ticket = self.runtime.submit(task)
                started = time.perf_counter()
            self.runtime.wait(ticket)
            found.append((time.perf_counter() - started) / 1000)
        return us(found[1:])

    def submit_cost(self) -> dict[str, Any]:
        """What the engine's thread pays for one append."""
        self.stream.refill()
        found = []
        for _ in range(20):
            self.runtime.drain()
            for i in range(50):
                started = time.perf_counter()
                self.checkpointer.append_kv(
                    self.region, kind=abi.KIND_KV_TAIL, key=i, incarnation=1, token_start=3,
                    token_end=4, blocks=[i], step=1
                )  # fmt: skip
                found.append(time.perf_counter() - started)
        self.runtime.drain()
        return us(found)

    def order_cost(self) -> dict[str, Any]:
        found = timed(300, lambda: self.checkpointer.order_after(0))
        self.runtime.drain()
        return us(found)

    def restore(self, count: int, *, tokens: int, hash_only: bool) -> list[float]:
        """Seconds of bursts that write whole records back, or only hash the region."""
        blocks_each = -(-tokens // MODEL.block_tokens)
        size = blocks_each * MODEL.raw_bytes()
        self.stream.refill()
        words = {"kind": abi.KIND_KV_BLOCK, "token_start": 0, "token_end": tokens}
        made = self.checkpointer.wait(
            self.checkpointer.append_kv(
                self.region, key=1, incarnation=1, blocks=range(blocks_each), step=1, **words
            )
        )
        address = self._payload(made.payload_hash, size)
        found = []
        for _ in range(7):
            self.runtime.drain()
            started = time.perf_counter()
            for i in range(count):
                blocks = range(i * blocks_each % 1024, i * blocks_each % 1024 + blocks_each)
                if hash_only:
                    ticket = self.checkpointer.hash_kv(self.region, blocks=blocks, **words)
                else:
                    ticket = self.checkpointer.apply_kv(
                        self.region, blocks=blocks, payload_address=address, payload_bytes=size,
                        payload_hash=made.payload_hash, **words
                    )  # fmt: skip
            done = self.checkpointer.wait(ticket)
            found.append(time.perf_counter() - started)
            assert done.is_ok, done
        return found[1:]

    def _payload(self, payload_hash: int, size: int) -> int:
        """Where the record that was committed last keeps its payload: found by the hash in its
        header.
        """
        pool = np.frombuffer(self.stream.view, "<u8")
        at = abi.RECORD_HEADER.offsets()["payload_hash"] // 8
        low = np.uint64(payload_hash & (1 << 64) - 1)
        lines = np.flatnonzero(pool[at % 16 :: 16] == low)
        for line in lines:
            start = int(line) * abi.LINE_BYTES - (at // 16) * abi.LINE_BYTES
            header = np.frombuffer(self.stream.view, abi.RECORD_HEADER.dtype, 1, start)
            if (
                int(header["payload_bytes"][0]) == size
                and int(header["magic"][0]) == abi.RECORD_MAGIC
            ):
                return self.stream.pool_address + start + abi.RECORD_HEADER.size
        raise LookupError("the record that was just committed is not in the pool")

    def parking(self) -> Figures:
        park, unpark = [], []
        task = Task()
        for _ in range(300):
            self.runtime.wait(self.runtime.submit(task))
            started = time.perf_counter()
            with self.runtime.parked():
                parked = time.perf_counter()
            self.runtime.wait(self.runtime.submit(task))
            park.append(parked - started)
            unpark.append(time.perf_counter() - parked)
        return {"park_us": us(park), "unpark_to_first_task_us": us(unpark)}


def measure(
    ctas: int, device: CudaDevice, stream: Stream, report: Callable[[str, dict[str, Any]], None]
) -> None:
    bench = Bench(device, stream, ctas=ctas)
    try:
        report("ring_round_trip_us", bench.round_trip())
        report("ring_task_us", bench.empty_rate())
        report("append_one_token_us", bench.append_one())
        report("submit_us", bench.submit_cost())
        report("order_after_us", bench.order_cost())
        for name, value in (*bench.parking().items(), *swap(bench.checkpointer).items()):
            report(name, value)
        small = bench.append(500, tokens=1, whole=False)
        report("append_tail_records_per_s", figure([500 / s for s in small], "records/s"))
        for tokens, count in ((16, 300), (256, 60)):
            size = tokens // MODEL.block_tokens * MODEL.raw_bytes() * count
            for name, found in (
                ("append", bench.append(count, tokens=tokens, whole=True)),
                ("restore", bench.restore(count, tokens=tokens, hash_only=False)),
                ("hash", bench.restore(count, tokens=tokens, hash_only=True)),
            ):
                report(
                    f"{name}_{tokens}_tokens_gb_per_s",
                    figure([size / s / 1e9 for s in found], "GB/s"),
                )
    finally:
        bench.close()


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--ctas", type=count, nargs="+", default=[1, 2, 4], help="CTAs of the executor"
    )
    parser.add_argument("--output", type=file_in_folder, default=RESULTS)
    options = parser.parse_args(arguments)
    figures: Figures = {}
    device, stream = CudaDevice(0), Stream()
    try:
        figures["launch_and_sync_us"] = launch_and_sync(device)
        print(f"launch_and_sync_us: {figures['launch_and_sync_us']}", flush=True)
        for ctas in options.ctas:

            def report(name: str, value: dict[str, Any], ctas: int = ctas) -> None:
                figures[f"{name}.{ctas}_cta"] = value
                print(
                    f"{name:32} {ctas} CTA  {value['median']:10.2f} {value['unit']:10} (min "
                    f"{value['min']}, p95 {value['p95']}, n {value['n']})",
                    flush=True,
                )

            measure(ctas, device, stream, report)
    finally:
        device.close()
        stream.close()
    options.output.write_text(
        json.dumps(
            {
                "machine": machine(),
                "model": "16 layers, 8 KV heads of 128, bf16, blocks of 16 tokens",
                "figures": figures,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    return 0


if __name__ == "__main__":
    run_command(main)

"""What an executor costs the kernels that it lives beside, floor 2.

Owns: one probe kernel that wants every multiprocessor, and the clock around it. Promises: it is
short (some 200 us) and each measurement waits for it alone. Made by cuda.py for
runtime/residency_choice.py and the benchmarks. Decides nothing.
"""

from __future__ import annotations

from typing import Final

from concordia.device.burst import Burst
from concordia.device.compiler import HandlerSource
from concordia.device.cuda_call import checked, released
from concordia.device.cuda_context import CudaContext
from concordia.device.loader import CudaImage

SOURCE: Final = HandlerSource.of("probe.cu")
ROUNDS: Final = 12_000  # of eight dependent multiplications: 0.2 ms


class Neighbour:
    """Loaded while executors are parked; `time_us` beside them, as often as wanted."""

    def __init__(self, image: CudaImage, *, context: CudaContext) -> None:
        self._context = context
        self._burst = Burst(image, "concordia_probe", context=context)
        with context.current() as driver:
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = checked(driver.cuStreamCreate(flags), "create a stream")
            self._marks = [checked(driver.cuEventCreate(0), "create an event") for _ in range(2)]
            self._word = int(checked(driver.cuMemAlloc(8), "allocate a word"))
        self.time_us()  # the first launch may load

    def time_us(self) -> float:
        """Microseconds of the GPU's own clock for one run."""
        first, last = self._marks
        with self._context.current() as driver:
            checked(driver.cuEventRecord(first, self._stream), "start the probe's clock")
            self._burst.enqueue(self._stream, (self._word, ROUNDS))
            checked(driver.cuEventRecord(last, self._stream), "stop the probe's clock")
            checked(driver.cuEventSynchronize(last), "wait for the probe")
            return 1000 * float(checked(driver.cuEventElapsedTime(first, last), "read the clock"))

    def close(self) -> None:
        """Give it back; executors are parked."""
        with self._context.current() as driver:
            for mark in self._marks:
                released(driver.cuEventDestroy(mark), "release the probe")
            released(driver.cuStreamDestroy(self._stream), "release the probe")
            released(driver.cuMemFree(self._word), "release the probe")
        self._burst.close()

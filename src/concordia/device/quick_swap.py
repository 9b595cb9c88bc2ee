"""A change of the operator table between two stays of a GPU's executor, in one call, floor 2.

Owns: what compiled code needs to query and launch by itself. Promises: from the moment that the
executor is asked to leave until it is sent in again no interpreter runs, so tasks wait for the GPU
alone; the call spins for QUICK_SWAP_NS at most. Made by launches.py, called by residency.py under
its lock. Does not fill entries, and does not know when a swap is allowed.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

from concordia.device.cuda_call import checked
from concordia.device.cuda_context import CudaContext
from concordia.device.driver import Publication

if TYPE_CHECKING:
    from concordia.device.host import HostLibrary

# A kernel that was told to leave is out within 10 us, or it is inside a task: then whoever swaps
# waits without the lock.
QUICK_SWAP_NS: Final = 200_000
STILL_INSIDE: Final = -1
_WORDS: Final = 8  # of Relaunch in kernels/host.cpp


class QuickSwap:
    """Of one executor: `arguments` are those of its launches, `launch_number` one of them."""

    def __init__(
        self,
        *,
        context: CudaContext,
        library: HostLibrary,
        ring: int,
        function: Any,
        stream: Any,
        arguments: int,
        launch_number: int,
        ctas: int,
        threads: int,
    ) -> None:
        self._context, self._library, self._ring = context, library, ring
        self._relaunch = (ctypes.c_uint64 * _WORDS)(
            context.entry_point("cuStreamQuery"),
            context.entry_point("cuLaunchKernel"),
            *(int(function), int(stream)),
            *(arguments, launch_number, ctas, threads),
        )

    def run(self, wanted: Publication, *, stays: bool) -> bool:
        """Publish it; False when the executor was still inside. Raises CudaError, after which the
        executor is lost.
        """
        with self._context.current() as driver:
            status = self._library.swap_operator(
                *(self._ring, *wanted), ctypes.addressof(self._relaunch), stays, QUICK_SWAP_NS
            )
            if status == STILL_INSIDE:
                return False
            checked((driver.CUresult(status),), "swap an operator")
        return True

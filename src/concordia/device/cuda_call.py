"""One CUDA driver call and what its status means, floor 2.

Owns: the translation of a CUresult into DeviceError, and which statuses mean that the context is
lost. Promises: a status is never dropped; the message carries the CUDA name and what was being
done. Called by cuda.py and loader.py. Decides nothing about recovery.
"""

from __future__ import annotations

from typing import Any, Final

from concordia.errors import DeviceError

# After any of these every later call of the process fails: the process must end (recovery happens
# in another one).
LOST_CONTEXT: Final = frozenset(
    {
        "CUDA_ERROR_ASSERT",
        "CUDA_ERROR_CONTAINED",
        "CUDA_ERROR_ECC_UNCORRECTABLE",
        "CUDA_ERROR_HARDWARE_STACK_ERROR",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "CUDA_ERROR_INVALID_PC",
        "CUDA_ERROR_LAUNCH_FAILED",
        "CUDA_ERROR_LAUNCH_TIMEOUT",
        "CUDA_ERROR_MISALIGNED_ADDRESS",
        "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        "CUDA_ERROR_TENSOR_MEMORY_LEAK",
        "CUDA_ERROR_UNKNOWN",
    }
)


class CudaError(DeviceError):
    """A CUDA call failed; `status` is CUDA's own name for why."""

    def __init__(self, doing: str, status: str) -> None:
        super().__init__(f"{doing}: {status}")
        self.status = status

    @property
    def context_lost(self) -> bool:
        """Whether this process can never use the GPU again."""
        return self.status in LOST_CONTEXT


def released(result: tuple[Any, ...], doing: str) -> None:
    """Like checked, for giving something back: with a lost context it is gone already."""
    try:
        checked(result, doing)
    except CudaError as error:
        if not error.context_lost:
            raise


def checked(result: tuple[Any, ...], doing: str) -> Any:
    """The values of a cuda.bindings call, or CudaError saying what was being done."""
    status = result[0]
    if int(status) != 0:
        raise CudaError(doing, status.name)
    if len(result) == 1:
        return None
    return result[1] if len(result) == 2 else result[1:]

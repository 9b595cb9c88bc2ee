"""The architecture of this machine's first GPU, floor 7.

Owns: the question to NVIDIA's management library. Promises: no CUDA context is made, so that a
launcher takes no memory of a device; where the library or the device cannot be asked, nothing is
said. Called by launch. It knows one number.
"""

from __future__ import annotations

import ctypes
from typing import Final

_LIBRARY: Final = "libnvidia-ml.so.1"


def architecture() -> int | None:
    """Such as 90 for sm_90; None when there is nobody to ask."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        if library.nvmlInit_v2():
            return None
    except (OSError, AttributeError):
        return None
    try:
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
            return None
        if library.nvmlDeviceGetCudaComputeCapability(
            device, ctypes.byref(major), ctypes.byref(minor)
        ):
            return None
        return 10 * major.value + minor.value
    finally:
        library.nvmlShutdown()

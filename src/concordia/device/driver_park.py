"""An executor that is out of the way of the framework's own driver calls, floor 2.

Owns: its registration with the shim that stands before the driver under `concordia run`
(native/park.c). Promises: registered, the executor is asked to leave before each call that waits
for the whole GPU, and kept out until it is over, by compiled code in the thread of the call: no
interpreter takes part. Without a shim nothing happens, and such a call is late by a lease. Called
by residency.py, whose keeper sends the executor in again.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any, Final

from concordia import config
from concordia.device.host import HostLibrary

DRIVER: Final = "libcuda.so.1"


class DriverPark:
    """For the executor of one ring."""

    def __init__(self, library: HostLibrary, ring: int, stop_at: int) -> None:
        self._library, self._ring, self._stop_at = library, ring, stop_at
        self._shim = _shim()
        self._handle = -1

    @property
    def is_on(self) -> bool:
        """Whether such a call is under way now."""
        return bool(self._library.load(self._stop_at) >> 32)

    def begin(self, function: int) -> None:
        """Be told of calls; `function` is the executor's kernel, whose own first launch is none."""
        if self._shim is None or self._handle >= 0:
            return
        self._shim.concordia_park_exempt(ctypes.c_void_p(function))
        park, unpark = (
            ctypes.cast(call, ctypes.c_void_p)
            for call in (self._library.driver_park, self._library.driver_unpark)
        )
        self._handle = self._shim.concordia_park_register(park, unpark, ctypes.c_void_p(self._ring))

    def end(self, timeout_s: float = config.WAIT_PARK_S) -> bool:
        """Be told no more; False while a call is still under way, and then the ring must stay."""
        until = time.monotonic() + timeout_s
        while self._shim is not None and self._handle >= 0:
            if self._shim.concordia_park_unregister(self._handle):
                self._handle = -1
            elif time.monotonic() >= until:
                return False
        return True


def _shim() -> Any | None:
    """The library that the framework's driver calls pass through; None where it is the driver."""
    try:
        found = ctypes.CDLL(DRIVER)
        register = found.concordia_park_register
    except (OSError, AttributeError):
        return None
    register.restype = ctypes.c_int
    register.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    found.concordia_park_unregister.argtypes = (ctypes.c_int,)
    found.concordia_park_exempt.argtypes = (ctypes.c_void_p,)
    return found

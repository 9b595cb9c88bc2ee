"""The architecture of this machine's first GPU, floor 7.

Owns: the question to NVIDIA's management library, and its answers by model of GPU. Promises: no
CUDA context is made, so that a launcher takes no memory of a device; a machine is asked once for a
model, because a GPU that nobody has open is started for the question, which may take seconds; where
models differ, or the system does not tell them, the library is asked each time; where it or the
device cannot be asked, nothing is said. Called by launch. It knows one number.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from concordia.errors import EnvironmentRefused
from concordia.instrument.options import ARCHITECTURES
from concordia.paths import Paths
from concordia.private_folder import check_private, make_private

_LIBRARY: Final = "libnvidia-ml.so.1"
_GPUS: Final = Path("/proc/driver/nvidia/gpus")  # a folder for each, by its place on the bus
_DEVICES: Final = Path("/sys/bus/pci/devices")
_DIGITS_MAX: Final = 3
_ADVICE: Final = "set CONCORDIA_CACHE to another"


def architecture(*, gpus: Path = _GPUS, devices: Path = _DEVICES) -> int | None:
    """Such as 90 for sm_90; None when there is nobody to ask."""
    model = _model(gpus, devices)
    if model is None:
        return _asked()
    path = Paths.default().image_cache.with_name("gpus") / model
    found = _kept(path)
    if found is None:
        found = _asked()
        if found is not None:
            _keep(path, found)
    return found


def _model(gpus: Path, devices: Path) -> str | None:
    """Maker and device number on the bus, which name a chip; None unless all GPUs have the same."""
    try:
        found = {
            "-".join(
                (devices / gpu.name / part).read_text().strip() for part in ("vendor", "device")
            )
            for gpu in gpus.iterdir()
        }
    except OSError:
        return None
    model = found.pop() if len(found) == 1 else ""
    return model if model.replace("-", "").isalnum() else None


def _kept(path: Path) -> int | None:
    try:
        check_private(path.parent, _ADVICE)
        text = path.read_text("ascii")
    except (OSError, UnicodeDecodeError, EnvironmentRefused):
        return None
    is_one = text.isdecimal() and len(text) <= _DIGITS_MAX and int(text) in ARCHITECTURES
    return int(text) if is_one else None


def _keep(path: Path, found: int) -> None:
    """What cannot be kept is asked again."""
    with contextlib.suppress(OSError, EnvironmentRefused):
        make_private(path.parent, _ADVICE)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(str(found))
        part.rename(path)


def _asked() -> int | None:
    import ctypes  # most starts do without

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

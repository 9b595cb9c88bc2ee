"""What several files about the CPU device's runtime begin with: the device, one in each shape with its lanes, and a runtime by one lane and by
four.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from concordia.device.compiler import HostCompiler
from concordia.device.driver import open_device
from concordia.device.host import HostDevice
from concordia.runtime.executor import Runtime

SHAPES = {"one-lane": (1, 0), "four-lanes": (4, 0), "gpu-shape": (4, 1)}


@pytest.fixture(scope="module")
def device() -> Iterator[HostDevice]:
    device = open_device("host")
    assert isinstance(device, HostDevice)
    yield device
    device.close()


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[HostDevice, int]]:
    lanes, is_device = SHAPES[request.param]
    device = HostDevice(HostCompiler(flags=("-O1", f"-DCONCORDIA_DEVICE_SHAPE={is_device}")))
    yield device, lanes
    device.close()


@pytest.fixture(params=[1, 4])
def runtime(device: HostDevice, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    runtime = Runtime(device, lanes=request.param, slots=64)
    yield runtime
    assert runtime.stats().rescues == 0
    runtime.close()

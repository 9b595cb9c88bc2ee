"""What several files about the CPU device's runtime begin with: the device, and a runtime by one lane and by four."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from concordia.device.driver import open_device
from concordia.device.host import HostDevice
from concordia.runtime.executor import Runtime


@pytest.fixture(scope="module")
def device() -> Iterator[HostDevice]:
    device = open_device("host")
    assert isinstance(device, HostDevice)
    yield device
    device.close()


@pytest.fixture(params=[1, 4])
def runtime(device: HostDevice, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    runtime = Runtime(device, lanes=request.param, slots=64)
    yield runtime
    assert runtime.stats().rescues == 0
    runtime.close()

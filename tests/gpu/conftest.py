"""Tests that need an NVIDIA GPU: run with `pytest -m gpu`.

Each scenario runs in a process of its own with a bound (child.py): an error that loses a CUDA context loses a child, never the tests.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterator

import pytest
from child import gpu_missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = pathlib.Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@functools.cache
def _missing() -> str | None:
    return gpu_missing()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Asked only where such a test is about to run: looking for a GPU takes a second."""
    if item.get_closest_marker("gpu") and _missing():
        pytest.skip(f"needs an NVIDIA GPU: {_missing()}")


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all children, so that each kernel is compiled once."""
    before = os.environ.get("CONCORDIA_CACHE")
    os.environ.setdefault("CONCORDIA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    if before is None:
        os.environ.pop("CONCORDIA_CACHE", None)


@pytest.fixture
def journal_path() -> Iterator[pathlib.Path]:
    path = pathlib.Path("/dev/shm") / f"concordia-test-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)

"""The driver, the program and a run folder, for the tests of the shim (named in their `pytest_plugins`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from shim_ground import ShimGround, build_driver, build_user, make_ground


@pytest.fixture(scope="session")
def shim_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The driver and the program, built once."""
    folder = tmp_path_factory.mktemp("shim")
    driver = build_driver(folder / "driver")
    return driver, build_user(folder, driver)


@pytest.fixture
def shim_ground(shim_parts: tuple[Path, Path], tmp_path: Path) -> ShimGround:
    driver, user = shim_parts
    return make_ground(tmp_path, driver, user)

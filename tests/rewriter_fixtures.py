"""A run folder with nothing in it, for the tests of the rewriter (named in their `pytest_plugins`)."""

from __future__ import annotations

import pathlib

import pytest


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    return folder

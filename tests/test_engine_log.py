"""serving/engine_log.py: why an engine failed is told in its own words.

Invariants: the last line that names an error is the reason, but never the one that only says that the core failed; without any, the last line;
only the end of a long log is read; a log that is not there has said nothing.
"""

from __future__ import annotations

import pathlib

import pytest

from concordia import config
from concordia.serving.engine_log import EngineLog


@pytest.fixture
def log(tmp_path: pathlib.Path) -> EngineLog:
    return EngineLog(tmp_path / "engine.log")


def test_reason_is_the_last_error_when_what_followed_from_it_comes_behind(log: EngineLog) -> None:
    log.path.write_text(
        "ValueError: the first one\n(core) OSError: no such model\nRuntimeError: Engine core initialization failed. See above.\nbye\n"
    )
    assert log.last_words() == "OSError: no such model"


def test_reason_is_the_parsers_own_when_flags_are_refused(log: EngineLog) -> None:
    log.path.write_text("usage: vllm serve\nvllm: error: unrecognized arguments: --flag\n")
    assert log.last_words() == "unrecognized arguments: --flag"


def test_reason_is_the_last_line_when_none_names_an_error(log: EngineLog) -> None:
    log.path.write_text("loading\n\nhalf of it\n \n")
    assert log.last_words() == "half of it"
    assert log.last_lines(1) == ["half of it"]


def test_only_the_end_is_read_when_the_log_is_long(log: EngineLog) -> None:
    log.path.write_text("OSError: long ago\n" + "x" * config.LOG_TAIL_BYTES + "\nnow\n")
    assert log.last_words() == "now"


def test_log_says_nothing_when_it_is_not_there(log: EngineLog) -> None:
    assert log.last_lines() == []
    assert log.last_words() == "it said nothing"

"""The faults of tests/gpu/test_gpu_faults.py that a CPU device can be given, on the CPU device: the same tests, another `device`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest
from test_gpu_faults import (  # noqa: F401  collected here too
    seed,
    test_all_or_nothing_is_written_when_a_byte_flips_during_the_restore,
    test_committed_records_restore_when_a_handler_faults_at_one_task,
    test_committed_records_restore_when_the_watchdog_ends_a_hung_handler,
    test_every_wait_says_so_and_work_goes_on_when_a_handler_hangs,
    test_flipped_bit_is_found_where_it_lies_when_a_device_wrote_the_journal,
    test_flipped_kv_is_reported_and_healed_when_it_is_hashed_and_restored,
    test_losses_are_answered_and_appends_go_on_when_the_journal_was_full,
    test_nothing_is_written_when_any_bit_flips_between_journal_and_restore,
    test_task_is_answered_and_the_next_one_served_when_it_names_what_does_not_exist,
)


@pytest.fixture
def device() -> str:
    return "host"


@pytest.fixture
def journal_path() -> Iterator[pathlib.Path]:
    path = pathlib.Path("/dev/shm") / f"concordia-test-faults-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)

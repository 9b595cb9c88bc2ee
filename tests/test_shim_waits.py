"""native/allocations.c, regions.c, saver.c, inside.c: what the program waits for when a driver or an agent stays where it should not.

Invariants: what was waited for in vain to its bound is not waited so long for again, whatever the program does; a point that protection ends under
leaves nobody waiting, and the program the memory that protection took; a point that nobody is in the way of is taken, however many were not. No memory
goes while a point's copies of it are still to come; who frees memory ends no capture, however close that begins.
The bounds are those of this file, and far above what a call without a wait takes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from protected_ground import LIFE_S, ProtectedGround, build, policy_of, protected_folder
from test_shim_tracking import BY_SIZE

BOUND_MS = 1000
REST_MS = 1500
BOUNDS = (f"-DWAIT_COPIES_NS={BOUND_MS}000000ull", f"-DWAIT_SAVER_MS={BOUND_MS}", f"-DWAIT_INSIDE_NS={BOUND_MS}000000ull", f"-DREST_NS={REST_MS}000000ull", "-DBEGIN_HELD_NS=20000000000ull")
OUT_OF_MEMORY = 2
KEPT = "[program]\nkeep_addresses = true"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    return build(tmp_path_factory.mktemp("waits"), source="waits_program.c", shim=BOUNDS)


def life(ground: ProtectedGround, folder: Path, *words: str, said: str = "", more: str = "", **environment: str) -> list[tuple[int, int]]:
    """The pairs that one program prints; nobody answers its points. Asserts what it says on stderr, besides of regions that are freed."""
    protected_folder(folder, policy_of(BY_SIZE, more=more))
    program = ground.start(*words, CONCORDIA_PROTECT=str(folder), **environment)
    printed, errors = program.communicate(timeout=LIFE_S)
    assert program.returncode == 0, errors
    assert [line for line in errors.splitlines() if "is freed" not in line] == ([f"concordia: unprotected from here on: {said}"] if said else [])
    first, second = printed.split()[::2], printed.split()[1::2]
    return [(int(one), int(other)) for one, other in zip(first, second, strict=True)]


def test_one_unmapping_waits_and_no_other_when_the_copies_never_end(ground: ProtectedGround, tmp_path: Path) -> None:
    found = life(ground, tmp_path / "protect", "unmap", said="the copies of memory that goes are not done in time")
    assert [(result, took_ms >= BOUND_MS) for result, took_ms in found] == [(0, True), (0, False), (0, False)], found


def test_one_free_waits_and_no_other_when_the_copies_of_kept_memory_never_end(ground: ProtectedGround, tmp_path: Path) -> None:
    found = life(ground, tmp_path / "protect", "kept", said="the copies of memory that goes are not done in time", more=KEPT)
    assert [(result, took_ms >= BOUND_MS) for result, took_ms in found] == [(0, True), (0, False), (0, False)], found


@pytest.mark.parametrize("more", ["", KEPT], ids=["driver", "kept"])
def test_memory_goes_behind_a_point_when_it_is_freed_in_the_middle_of_one(ground: ProtectedGround, tmp_path: Path, more: str) -> None:
    assert life(ground, tmp_path / "protect", "middle", more=more) == [(0, 0)]


def test_capture_ends_well_when_it_begins_as_kept_memory_is_freed(ground: ProtectedGround, tmp_path: Path) -> None:
    assert life(ground, tmp_path / "protect", "begin", more=KEPT) == [(0, 0)]


def test_one_allocation_waits_and_no_other_when_the_copies_never_get_to_the_host(ground: ProtectedGround, tmp_path: Path) -> None:
    said = "the program needs the memory that protection took"
    found = life(ground, tmp_path / "protect", "allocate", said=said, FAKE_BYTES=str(512 << 20))
    assert [(result, took_ms >= BOUND_MS) for result, took_ms in found] == [(OUT_OF_MEMORY, waits) for waits in (True, False, False)], found


def test_program_gets_memory_without_a_wait_when_protection_ended_as_it_came_to_a_point(ground: ProtectedGround, tmp_path: Path) -> None:
    """The saver's thread goes in that moment: what this point took from all others nobody would give back."""
    ((result, took_ms),) = life(ground, tmp_path / "protect", "ends", said="the agent has gone", FAKE_BYTES=str(5 << 20))
    assert (result, took_ms < BOUND_MS) == (0, True), took_ms


def test_program_gets_the_memory_of_a_region_that_is_gone_when_there_is_no_other(ground: ProtectedGround, tmp_path: Path) -> None:
    said = "the program needs the memory that protection took"
    ((result, took_ms),) = life(ground, tmp_path / "protect", "freed", said=said, FAKE_BYTES=str(5 << 20))
    assert (result, took_ms < BOUND_MS) == (0, True), took_ms


def test_points_rest_from_waits_and_one_is_taken_when_a_long_call_of_another_thread_is_over(ground: ProtectedGround, tmp_path: Path) -> None:
    first, second, last = life(ground, tmp_path / "protect", "inside", str(BOUND_MS))
    assert [fired for fired, _ in (first, second, last)] == [0, 0, 1]
    assert first[1] >= BOUND_MS
    assert second[1] >= 2 * BOUND_MS + REST_MS, "the second wait came before the rest was over"

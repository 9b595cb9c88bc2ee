"""native/inside.c, streams.c, regions.c, region_rules.c: points while other threads give work, and regions that come at once or beside a capture.

Invariants: what a point has is marked whoever wrote it and in whichever stream, so with nothing in flight the stage holds what the regions hold;
regions that threads make at the same moment are all there; a capture is not disturbed; nothing stops checkpoints without a word.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from protected_ground import ProtectedGround, build, marking_run, policy_of, protected_folder
from test_shim_tracking import BY_SIZE, Answers

REGION_BYTES = 1 << 21
TRUSTED = '[images]\ntrust_arguments = ["fill", "update"]'
AUDITED = "[program]\naudit_every = 1"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    return build(tmp_path_factory.mktemp("threads"), source="threads_program.c")


@pytest.fixture
def seed() -> int:
    found = int(os.environ.get("THREADS_SEED", random.randrange(1 << 30)))
    print(f"THREADS_SEED={found}")
    return found


def life(ground: ProtectedGround, folder: Path, *words: str, seed: int = 1, more: str = "", regions: str = BY_SIZE, **environment: str) -> tuple[Answers, str]:
    """One program to its end: its points, and what it said on stderr."""
    protect = folder / "protect"
    answers = Answers(protect, protected_folder(protect, policy_of(regions, more=more)))
    names = {"FAKE_SEED": str(seed), "PROGRAM_SEED": str(seed), "PROGRAM_SNAPSHOTS": str(folder / "snapshots"), "CONCORDIA_PROTECT": str(protect)}
    _, errors = answers.until_end(program := ground.start(*words, **names, **environment))
    assert program.returncode == 0, errors
    return answers, errors


def quiet_points(answers: Answers, snapshots: bytes) -> int:
    """How many points were compared of those at which nothing was in flight; asserts that the stage had what the regions had."""
    at, compared = 0, 0
    count = max(len(content) for content in answers.content.values())
    while at < len(snapshots):
        first, last = (int.from_bytes(snapshots[at + 8 * i : at + 8 * i + 8], "little") for i in range(2))
        at += 16
        for ordinal in range(first, last + 1):
            for which, content in enumerate(answers.content.get(ordinal, [])):
                wanted = snapshots[at + which * REGION_BYTES : at + (which + 1) * REGION_BYTES]
                compared += 1
                if content != wanted:
                    byte = next(i for i in range(REGION_BYTES) if content[i] != wanted[i])
                    pytest.fail(f"point {ordinal}, region {which}, byte {byte}, page {byte >> 16}")
        at += count * REGION_BYTES
    return compared


@pytest.mark.parametrize("stream", ["made", "own"])
@pytest.mark.parametrize("writer", ["fill", "kernel"])
def test_stage_is_what_the_regions_are_when_another_thread_writes_them_at_points(ground: ProtectedGround, tmp_path: Path, seed: int, stream: str, writer: str) -> None:
    answers, errors = life(ground, tmp_path, "race", "12", stream, writer, seed=seed, more=TRUSTED, FAKE_SLOW="1", **marking_run(tmp_path))
    assert errors == ""
    assert quiet_points(answers, (tmp_path / "snapshots").read_bytes()) > 12


def test_points_are_left_out_and_nothing_is_lost_when_another_thread_is_in_a_long_call(ground: ProtectedGround, tmp_path: Path, seed: int) -> None:
    answers, errors = life(ground, tmp_path, "long", seed=seed, more=TRUSTED, FAKE_SLOW="1")
    assert "unprotected" not in errors
    assert answers.board.word("unjoined") > 0
    assert quiet_points(answers, (tmp_path / "snapshots").read_bytes()) > 1


def test_all_regions_are_there_when_threads_make_the_first_ones_at_once(ground: ProtectedGround, tmp_path: Path, seed: int) -> None:
    for round_seed in range(seed, seed + 4):
        folder = tmp_path / str(round_seed)
        folder.mkdir()
        answers, errors = life(ground, folder, "together", "4", seed=round_seed, more=AUDITED, FAKE_SLOW="1", **marking_run(folder))
        assert errors == ""
        assert sorted(one.name for one in answers.posts[-1].regions) == [f"big.{i}" for i in range(4)]
        assert answers.board.word("missed_pages") == 0


def test_capture_ends_well_when_the_first_region_comes_beside_it(ground: ProtectedGround, tmp_path: Path) -> None:
    for name, regions in (("size", BY_SIZE), ("kernel", '[[region]]\nname = "big"\nkernel = "fill"\nargument = 0')):
        folder = tmp_path / name
        folder.mkdir()
        answers, errors = life(ground, folder, "capture", regions=regions, **marking_run(folder))
        assert errors == ""
        assert [one.bytes for one in answers.posts[-1].regions] == [(1 << 20) + 512]


def test_checkpoints_go_on_or_end_in_one_line_when_many_streams_work_between_points(ground: ProtectedGround, tmp_path: Path) -> None:
    for streams, said in ((200, ""), (290, "concordia: unprotected from here on: more than 256 streams work between two points\n")):
        folder = tmp_path / str(streams)
        folder.mkdir()
        answers, errors = life(ground, folder, "many", str(streams), more=TRUSTED)
        assert errors == said
        assert (len(answers.posts) > 0) == (said == "")

"""native/: allocations, regions, marks, points and the copies at them, on a driver whose work is done later and in any order that events allow.

Invariants: at each point that is posted, the stage holds what the regions held at that point, byte for byte, though only marked pages were brought:
so marked pages are a superset of what changed, and work that was given before a point comes before its copies; a program does the same with and
without protection; kept addresses are the same in each life, and nobody else's; whatever is not understood ends protection, in one line, and not the program; an agent that dies or is slow hurts nobody.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from concordia.integrations.program.program_pages import MARK_BYTES, Board, Post
from protected_ground import (
    LIFE_S,
    ProtectedGround,
    build,
    marking_run,
    policy_of,
    protected_folder,
)

DIRTY_BYTES = [8 << 18, 8 << 17, (1 << 20) + 12 * 4096 + 512, 8 << 17]  # of the program's regions
BY_SIZE = '[[region]]\nname = "big"\nsize = ["1MiB", "4MiB"]'


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    return build(tmp_path_factory.mktemp("protected"))


@pytest.fixture
def seed() -> int:
    found = int(os.environ.get("TRACKING_SEED", random.randrange(1 << 30)))
    print(f"TRACKING_SEED={found}")
    return found


class Answers:
    """An agent that looks at each post, and answers it."""

    def __init__(self, folder: Path, board: Board) -> None:
        self.board = board
        with open(folder / "stage", "rb") as file:
            self.stage = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.posts: list[Post] = []
        self.content: dict[int, list[bytes]] = {}

    def look(self) -> bool:
        post = self.board.post()
        if post is None:
            return False
        self.posts.append(post)
        self.content[post.ordinal] = [self.stage[one.stage_offset : one.stage_offset + one.bytes] for one in post.regions]
        for one in post.regions:
            assert not any(self.stage[one.stage_offset + one.bytes : one.stage_offset + one.pages * MARK_BYTES]), "padding"
        self.board.answer(post)
        return True

    def until_end(self, program: subprocess.Popen[str]) -> tuple[str, str]:
        deadline = time.monotonic() + LIFE_S
        while program.poll() is None:
            assert time.monotonic() < deadline, "the program does not end"
            if not self.look():
                time.sleep(0.0005)
        self.look()  # what it posted while nobody ran here
        return program.communicate()


ENOUGH = 30  # posts that were compared; how many a round has is a matter of time


def rounds(ground: ProtectedGround, tmp_path: Path, seed: int, *, more: str = "", steps: int = 60, **environment: str) -> Iterator[tuple[Answers, str]]:
    """Rounds of random writes, each compared at every post, until there were enough; with what the program said on stderr."""
    posts = 0
    for round_seed in range(seed, seed + 40):
        folder, snapshots = tmp_path / f"protect-{round_seed}", tmp_path / f"snapshots-{round_seed}"
        answers = Answers(folder, protected_folder(folder, policy_of(BY_SIZE, more=more)))
        names = {"FAKE_SEED": str(round_seed), "PROGRAM_SEED": str(round_seed), "PROGRAM_SNAPSHOTS": str(snapshots), "CONCORDIA_PROTECT": str(folder)}
        _, said = answers.until_end(program := ground.start("dirty", str(steps), **names, **environment))
        assert program.returncode == 0, said
        assert differences(answers, snapshots.read_bytes()) == [], f"TRACKING_SEED={round_seed}"
        snapshots.unlink()
        yield answers, said
        posts += len(answers.posts)
        if posts >= ENOUGH:
            return
    pytest.fail(f"{posts} posts in 40 rounds")


def spared(answers: Answers) -> int:
    """Pages that were not marked, in all posts."""
    if not answers.posts:
        return 0
    marked = sum(one.pages_marked for one in answers.posts[-1].regions)
    return len(answers.posts) * sum(one.pages for one in answers.posts[-1].regions) - marked


def differences(answers: Answers, snapshots: bytes) -> list[str]:
    """Where the stage was not what the regions were."""
    found = []
    for ordinal, regions in answers.content.items():
        at = (ordinal - 1) * sum(DIRTY_BYTES)
        for which, (size, content) in enumerate(zip(DIRTY_BYTES, regions, strict=True)):
            wanted = snapshots[at : at + size]
            at += size
            if content != wanted:
                first = next(i for i in range(size) if content[i] != wanted[i])
                found.append(f"point {ordinal}, region {which}, byte {first}, page {first // MARK_BYTES}")
    return found


@pytest.mark.parametrize("trust", ["", '[images]\ntrust_arguments = ["fill", "scatter", "update"]'])
def test_stage_is_what_the_regions_are_when_anything_writes_them(ground: ProtectedGround, tmp_path: Path, seed: int, trust: str) -> None:
    found = list(rounds(ground, tmp_path, seed, more=trust))
    assert all(said == "" for _, said in found)
    assert (sum(spared(answers) for answers, _ in found) > 0) == bool(trust), "trusted kernels mark what their arguments point to"


def test_stage_is_what_the_regions_are_when_kernels_mark_what_they_store(ground: ProtectedGround, tmp_path: Path, seed: int) -> None:
    found = list(rounds(ground, tmp_path, seed, more="[program]\naudit_every = 2", **marking_run(tmp_path)))
    assert all(said == "" for _, said in found)
    assert sum(answers.board.word("missed_pages") for answers, _ in found) == 0
    assert sum(answers.board.word("audits") for answers, _ in found) > 0
    assert sum(spared(answers) for answers, _ in found) > 0, "nobody marked for them"


def test_stage_is_what_the_regions_are_when_there_was_no_room_for_the_map(ground: ProtectedGround, tmp_path: Path, seed: int) -> None:
    """It is asked for once, with the first region; a later one must not have a map that points know nothing of."""
    found = list(rounds(ground, tmp_path, seed, FAKE_NO_MAP="1", **marking_run(tmp_path)))
    assert all(said == "" for _, said in found)
    assert sum(spared(answers) for answers, _ in found) == 0


def test_pages_are_not_brought_again_when_their_marks_were_taken(ground: ProtectedGround, tmp_path: Path) -> None:
    """Before the first point the driver marks each page of the first region in every copy of the map; a step marks a few."""
    settings = marking_run(tmp_path)
    for turn in range(10):  # how many steps come between two points is a matter of time
        folder = tmp_path / f"protect-{turn}"
        answers = Answers(folder, protected_folder(folder, policy_of(BY_SIZE)))
        _, said = answers.until_end(ground.start("train", "200", CONCORDIA_PROTECT=str(folder), **settings))
        assert "unprotected" not in said
        found = [next(one for one in post.regions if one.name == "big.0") for post in answers.posts]
        assert found[0].pages_marked == found[0].pages == DIRTY_BYTES[0] // MARK_BYTES
        if any(after.pages_marked - before.pages_marked < after.pages // 2 for before, after in itertools.pairwise(found)):
            return
    pytest.fail("every point brings most pages again")


def test_audit_finds_nothing_when_marks_are_complete(ground: ProtectedGround, tmp_path: Path, seed: int) -> None:
    more = '[program]\naudit_every = 1\n[images]\ntrust_arguments = ["fill", "scatter", "update"]'
    for answers, said in rounds(ground, tmp_path, seed, more=more):
        assert said == ""
        assert answers.board.word("audits") - len(answers.posts) in (0, 1), "the last one may come when nobody looks any more"
        assert answers.board.word("missed_pages") == 0


def test_audit_finds_the_page_when_a_kernel_is_trusted_that_writes_elsewhere(ground: ProtectedGround, tmp_path: Path, seed: int) -> None:
    missed = 0  # and repaired: what was staged is compared
    for answers, said in rounds(ground, tmp_path, seed, more='[program]\naudit_every = 1\n[images]\ntrust_arguments = ["*"]', steps=100):
        assert ("changed unseen" in said) == (answers.board.word("missed_pages") > 0)
        missed += answers.board.word("missed_pages")
    assert missed > 0, "indirect writes where no argument points to"


def test_program_does_the_same_when_it_is_protected(ground: ProtectedGround, tmp_path: Path, seed: int) -> None:
    plain, _ = ground.start("train", "300", shimmed=False, FAKE_SEED=str(seed)).communicate(timeout=LIFE_S)
    assert len(plain.splitlines()) == 300
    folder = tmp_path / "protect"
    answers = Answers(folder, protected_folder(folder, policy_of(BY_SIZE)))
    said, errors = answers.until_end(ground.start("train", "300", FAKE_SEED=str(seed + 1), CONCORDIA_PROTECT=str(folder)))
    assert said == plain
    assert errors.splitlines() == [f"concordia: region big.{i} is freed: it is no part of later checkpoints" for i in range(2, 61)]
    names = [[one.name for one in post.regions] for post in answers.posts]
    assert all(found[:1] == ["big.0"] for found in names)
    assert any(found[1:2] == ["big.1"] for found in names)


def test_freed_regions_are_named_so_often_and_no_more_when_a_program_frees_one_in_each_step(ground: ProtectedGround, tmp_path: Path) -> None:
    folder = tmp_path / "protect"
    answers = Answers(folder, protected_folder(folder, policy_of(BY_SIZE)))
    _, errors = answers.until_end(ground.start("train", "600", CONCORDIA_PROTECT=str(folder)))
    lines = [line for line in errors.splitlines() if "freed" in line]
    assert len(lines) == 101
    assert lines[-1] == "concordia: more than 100 regions were freed: no more of them are named"


def stderr_that_takes_nothing(kind: str) -> tuple[int, list[int]]:
    """One for a program, and what is to be closed after it."""
    if kind == "socket":
        ours, theirs = (end.detach() for end in socket.socketpair())
    else:
        ours, theirs = os.pipe()
    if kind == "pipe without a reader":
        os.close(ours)
        return theirs, [theirs]
    os.set_blocking(theirs, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(theirs, b"x")
    os.set_blocking(theirs, True)
    return theirs, [ours, theirs]


@pytest.mark.parametrize("kind", ["pipe", "socket", "pipe without a reader"])
def test_program_goes_on_when_its_stderr_takes_nothing(ground: ProtectedGround, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "protect"
    answers = Answers(folder, protected_folder(folder, policy_of(BY_SIZE)))
    run = marking_run(tmp_path)
    environment = ground.environment(CONCORDIA_PROTECT=str(folder), **run)
    stderr, ends = stderr_that_takes_nothing(kind)
    program = subprocess.Popen([str(ground.program), "train", "20"], env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        said, _ = answers.until_end(program)
    finally:
        program.kill()
        program.wait()
        for end in ends:
            os.close(end)
    assert program.returncode == 0
    assert len(said.splitlines()) == 20
    (log,) = Path(run["CONCORDIA_RUN"], "modules").iterdir()
    assert log.read_text().count('"what":"not said on stderr","why":"concordia: region big.') == 3, "what is not said is noted"


def test_points_are_where_the_policy_says_when_there_are_several_triggers(ground: ProtectedGround, tmp_path: Path) -> None:
    counts = {}
    for name, trigger in (("all", "kernel:update"), ("third", "kernel:up*:every=3"), ("sync", "stream-synchronize"), ("graph", "graph-launch"), ("none", "kernel:other")):
        folder = tmp_path / name
        board = protected_folder(folder, policy_of(BY_SIZE, trigger=trigger))
        Answers(folder, board).until_end(ground.start("train", "12", CONCORDIA_PROTECT=str(folder)))
        counts[name] = board.word("points")
    assert counts == {"all": 12, "third": 4, "sync": 12, "graph": 0, "none": 0}


def test_region_is_found_when_a_kernel_or_an_ordinal_or_the_stack_names_it(ground: ProtectedGround, tmp_path: Path) -> None:
    for name, rules, wanted in (
        ("ordinal", '[[region]]\nname = "second"\nsize = ["1MiB", "4MiB"]\nordinal = 1', [("second", 8 << 17)]),
        ("kernel", '[[region]]\nname = "out"\nkernel = "sum"\nargument = 1\nbytes = 4096', [("out", 4096)]),
        ("whole", '[[region]]\nname = "out"\nkernel = "upd*"\nargument = 0', [("out", 8 << 18)]),
        ("library", '[[region]]\nname = "mine"\nstack = "program"\nsize = ["1MiB", "2MiB"]', [("mine.0", 8 << 18), ("mine.1", 8 << 17)]),
        ("function", '[[region]]\nname = "mine"\nstack = "no_such_function"\n[[region]]\nname = "all"\nsize = "2MiB"', [("all.0", 8 << 18)]),
    ):
        folder = tmp_path / name
        board = protected_folder(folder, policy_of(rules))
        answers = Answers(folder, board)
        answers.until_end(ground.start("train", "300", CONCORDIA_PROTECT=str(folder)))
        assert [(one.name, one.bytes) for one in answers.posts[-1].regions if "." not in one.name or int(one.name.partition(".")[2]) < 2] == wanted, name


@pytest.mark.parametrize(
    ("rules", "more", "words"),
    [
        ('[[region]]\nname = "out"\nkernel = "update"\nargument = 7', "", "has no pointer 7"),
        ('[[region]]\nname = "out"\nkernel = "update"\nargument = 2', "", "is no memory of"),
        ('[[region]]\nname = "big"\nsize = ["1KiB", "4MiB"]', "", "make limits.stage larger"),
        (BY_SIZE, "", "log of reads is full"),
    ],
)
def test_protection_ends_in_one_line_and_the_program_goes_on_when_it_cannot_be_had(ground: ProtectedGround, tmp_path: Path, rules: str, more: str, words: str) -> None:
    made = policy_of(rules, more=more)
    text = made.lines().replace(f"stage {made.stage_bytes}", f"stage {1 << 20}") if "stage" in words else made.lines()
    folder = tmp_path / "protect"
    board = protected_folder(folder, made)
    (folder / "policy").write_text(text)
    if "full" in words:
        os.truncate(folder / "reads", 4096 + 256)
    answers = Answers(folder, board)
    said, errors = answers.until_end(ground.start("train", "8", CONCORDIA_PROTECT=str(folder)))
    assert len(said.splitlines()) == 8
    lines = [line for line in errors.splitlines() if "is freed" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("concordia: unprotected from here on: ")
    assert words in lines[0]
    assert board.reason in lines[0]


def test_program_goes_on_when_its_agent_never_answers_or_gives_up(ground: ProtectedGround, tmp_path: Path) -> None:
    folder = tmp_path / "silent"
    board = protected_folder(folder, policy_of(BY_SIZE))
    said, _ = ground.start("train", "20", CONCORDIA_PROTECT=str(folder)).communicate(timeout=LIFE_S)
    assert len(said.splitlines()) == 20
    assert board.word("posted") <= 1
    assert board.word("fired") == 1
    assert board.word("coalesced") == 19
    folder = tmp_path / "lost"
    board = protected_folder(folder, policy_of(BY_SIZE))
    board.lose("the journal is full")
    said, errors = ground.start("train", "20", CONCORDIA_PROTECT=str(folder)).communicate(timeout=LIFE_S)
    assert len(said.splitlines()) == 20
    assert "Traceback" not in errors


def test_program_gets_the_memory_that_protection_took_when_it_needs_it(ground: ProtectedGround, tmp_path: Path) -> None:
    plain, _ = ground.start("train", "300", shimmed=False).communicate(timeout=LIFE_S)
    outcomes = set()
    for megabytes in (6, 7, 8, 9, 10):
        folder = tmp_path / str(megabytes)
        answers = Answers(folder, protected_folder(folder, policy_of(BY_SIZE)))
        said, errors = answers.until_end(ground.start("train", "300", CONCORDIA_PROTECT=str(folder), FAKE_BYTES=str(megabytes << 20)))
        assert said == plain, errors
        lines = [line for line in errors.splitlines() if "is freed" not in line]
        assert len(lines) <= 1
        outcomes |= {line.removeprefix("concordia: unprotected from here on: ").partition(" of region")[0] for line in lines}
    assert outcomes == {"the program needs the memory that protection took", "no memory for the copy"}


def test_memory_is_at_the_same_places_and_nobody_elses_when_addresses_are_kept(ground: ProtectedGround, tmp_path: Path, seed: int) -> None:
    """Small ones share pages, which go with the last of them: what is leaked does not fit into the memory that there is."""
    lives = []
    for skew in (0, 3 << 20):
        folder = tmp_path / str(skew)
        protected_folder(folder, policy_of('[[region]]\nname = "none"\nsize = "31MiB"', more="[program]\nkeep_addresses = true"))
        names = {"PROGRAM_SEED": str(seed), "FAKE_SKEW": str(skew), "FAKE_BYTES": str(80 << 20), "CONCORDIA_PROTECT": str(folder)}
        program = ground.start("place", "3000", **names)
        said, errors = program.communicate(timeout=LIFE_S)
        assert program.returncode == 0, said[-500:] + errors
        assert errors == "", f"TRACKING_SEED={seed}"
        lives.append([(int(where, 16), int(size)) for where, size in (line.split() for line in said.splitlines())])
    assert lives[0] == lives[1]
    assert len(lives[0]) == 3000
    small = [(where, size) for where, size in lives[0] if size < 1 << 20]
    assert all(where % 512 == 0 for where, _ in lives[0])
    assert all(where >> 21 == (where + size - 1) >> 21 for where, size in small), "two mappings"
    assert len({where >> 21 for where, _ in small}) < 20, "they share pages"
    assert not {where >> 21 for where, _ in small} & {where >> 21 for where, size in lives[0] if size >= 1 << 20}


def test_nothing_is_protected_when_the_folder_is_damaged_or_switched_off(ground: ProtectedGround, tmp_path: Path) -> None:
    for name, damage, words in (
        ("none", lambda folder: (folder / "policy").unlink(), "policy cannot be read"),
        ("torn", lambda folder: (folder / "policy").write_text("concordia-policy 1\nregion x\n"), "policy cannot be read"),
        ("other", lambda folder: (folder / "policy").write_text("concordia-policy 2\n"), "policy cannot be read"),
        ("board", lambda folder: os.truncate(folder / "board", 100), "board is not what was made"),
        ("reads", lambda folder: (folder / "reads").write_bytes(b"x" * 10000), "reads is not what was made"),
    ):
        folder = tmp_path / name
        protected_folder(folder, policy_of(BY_SIZE))
        damage(folder)
        said, errors = ground.start("train", "3", CONCORDIA_PROTECT=str(folder)).communicate(timeout=LIFE_S)
        assert len(said.splitlines()) == 3
        assert words in errors, (name, errors)
    folder = tmp_path / "off"
    board = protected_folder(folder, policy_of(BY_SIZE))
    ground.start("train", "3", CONCORDIA_PROTECT=str(folder), CONCORDIA_DISABLE="1").communicate(timeout=LIFE_S)
    assert (board.word("owner"), board.word("points")) == (0, 0)


def test_second_process_is_said_to_be_unprotected_when_another_has_the_board(ground: ProtectedGround, tmp_path: Path) -> None:
    folder = tmp_path / "protect"
    board = protected_folder(folder, policy_of(BY_SIZE))
    Answers(folder, board).until_end(ground.start("train", "3", CONCORDIA_PROTECT=str(folder)))
    owner, points = board.word("owner"), board.word("points")
    assert points == 3
    said, errors = ground.start("train", "3", CONCORDIA_PROTECT=str(folder)).communicate(timeout=LIFE_S)
    assert len(said.splitlines()) == 3
    assert f"is unprotected: process {owner} of this run is" in errors
    assert board.word("points") == 3

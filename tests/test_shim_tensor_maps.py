"""native/tensor_maps.c, arguments.c, unseen.c: what a kernel may write through the tensor maps that it is given.

Invariants: every page that a trusted kernel writes through a map is marked, however the map was made; a map that is byte for byte the driver's marks the pages of
its tensor and no others, and none where it leads to no region; what may be a map and is not known marks all regions; so does one that the
bounded table has lost; a graph marks what its nodes' maps lead to, until a node is changed; a kernel that marked too much is named, with the reason.
"""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from concordia.instrument.cache import ImageCache, image_key
from concordia.instrument.options import Options
from concordia.instrument.report import Hook, KernelReport
from concordia.integrations.program.coverage import read_run
from concordia.integrations.program.native_build import NATIVE as SOURCES
from concordia.integrations.program.run_folder import ProgramRun
from concordia.integrations.program.shim_build import hook_names
from protected_ground import ProtectedGround, build, marking_run, policy_of, protected_folder
from test_shim_tracking import BY_SIZE, Answers

ALL = 32  # pages of a region
TABLE = 16  # entries, in these tests
TRUSTED = '[program]\naudit_every = 1\n[images]\ntrust_arguments = ["update", "tensor", "tensors"]\n'
PLAIN_MAPS = TRUSTED + 'trust_maps = ["tensors"]\n'
NOT_KNOWN = "all regions: an argument may be a tensor map that is not known"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    return build(tmp_path_factory.mktemp("tensors"), source="tensor_program.c", shim=[f"-DTENSOR_MAPS_MAX={TABLE}"])


@pytest.fixture(scope="module")
def large_ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    """The shim as it is shipped."""
    return build(tmp_path_factory.mktemp("large"), source="tensor_program.c")


def marked(ground: ProtectedGround, folder: Path, *words: str, more: str = TRUSTED, **environment: str) -> tuple[int, int]:
    """Pages of both regions that what lies between the last two points has marked; all that changed are among them."""
    answers = Answers(folder, protected_folder(folder, policy_of(BY_SIZE, more=more)))
    said, errors = answers.until_end(program := ground.start(*words, CONCORDIA_PROTECT=str(folder), **environment))
    assert (program.returncode, said, errors) == (0, "done\n", "")
    assert [one.pages for one in answers.posts[-1].regions] == [ALL, ALL]
    assert (answers.board.word("missed_pages"), answers.board.word("audits")) == (0, len(answers.posts)), "of all points"
    before, after = (answers.posts[at].regions for at in (-2, -1))
    first, second = (one.pages_marked - two.pages_marked for one, two in zip(after, before, strict=True))
    return first, second


def unseen_rows(environment: dict[str, str]) -> dict[str, str]:
    """Reasons by kernel, as `concordia modules` has them."""
    found = read_run(ProgramRun(Path(environment["CONCORDIA_RUN"])))
    assert found.lines_lost == 0
    rows = {row.kernel: row.why for row in found.unseen}
    assert found.as_json()["unseen"] == [row.as_json() for row in found.unseen]
    assert all(name in found.text() for name in rows)
    return rows


@pytest.mark.parametrize(
    ("words", "pages"),
    [
        (("tiled",), (ALL, 4)),  # and a pointer into the first region, which may be written in all its length
        (("elsewhere",), (0, 0)),
        (("replaced",), (0, 4)),
        (("struct",), (0, 1)),
        (("struct", "buffer"), (0, 1)),
        (("graph",), (0, 4)),
        (("graph", "pointer"), (ALL, 4)),
        (("forgotten", "used"), (0, 4)),
        (("im2col",), (0, ALL - 3)),  # from its address on
        (("wide",), (0, ALL - 3)),
        (("packed",), (0, ALL - 3)),
        (("huge",), (0, ALL - 3)),
    ],
)
def test_pages_of_a_maps_tensor_alone_are_marked_when_the_driver_made_it(ground: ProtectedGround, tmp_path: Path, words: tuple[str, ...], pages: tuple[int, int]) -> None:
    assert marked(ground, tmp_path / "protect", *words) == pages


@pytest.mark.parametrize("words", [("changed",), ("moved",), ("struct", "words"), ("forgotten",), ("graph", "set")])
def test_all_regions_are_marked_when_an_argument_may_be_a_map_that_is_not_known(ground: ProtectedGround, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert marked(ground, tmp_path / "protect", *words) == (ALL, ALL)


@pytest.mark.parametrize("mode", ["tiled", "graph"])
def test_all_regions_are_marked_when_nobody_trusts_the_kernel(ground: ProtectedGround, tmp_path: Path, mode: str) -> None:
    assert marked(ground, tmp_path / "protect", mode, more=TRUSTED.replace(', "tensor",', ",")) == (ALL, ALL)


def test_words_beside_maps_are_words_when_the_policy_says_that_maps_are_the_drivers(ground: ProtectedGround, tmp_path: Path) -> None:
    assert marked(ground, tmp_path / "protect", "struct", "words", more=PLAIN_MAPS) == (0, 1)


def test_they_may_be_maps_again_when_one_was_forgotten(large_ground: ProtectedGround, ground: ProtectedGround, tmp_path: Path) -> None:
    trusted = PLAIN_MAPS.replace('trust_maps = ["tensors"]', 'trust_maps = ["tensor*"]')
    assert marked(large_ground, tmp_path / "large", "forgotten", more=trusted) == (0, 4)
    assert marked(ground, tmp_path / "small", "forgotten", more=trusted) == (ALL, ALL)


def test_every_page_is_marked_when_threads_make_maps_and_use_them(large_ground: ProtectedGround, ground: ProtectedGround, tmp_path: Path) -> None:
    seed = int(os.environ.get("TENSOR_SEED", random.randrange(1 << 30)))
    print(f"TENSOR_SEED={seed}")
    for turn in range(3):
        for name, one in (("large", large_ground), ("small", ground)):
            first, second = marked(one, tmp_path / f"{name}-{turn}", "threads", FAKE_SEED=str(seed + turn))
            assert min(first, second) > 20


def hooked_run(folder: Path, hooks: Hook) -> dict[str, str]:
    """A run in which the program's image was rewritten: kernels that use maps have these hooks."""
    settings = marking_run(folder)
    cache = ImageCache(folder / "cache", Options().key())
    key = image_key(b".version 8.0")
    before = cache.load(key)
    assert before is not None
    (cache.folder / f"{key}.image").unlink()
    cache.store(key, replace(before, kernels=tuple(KernelReport(name, hooks, 32, "") for name in ("tensor", "tensors"))))
    return settings


def test_stores_mark_and_maps_do_when_a_kernel_has_both(ground: ProtectedGround, tmp_path: Path) -> None:
    run = hooked_run(tmp_path, Hook.MARKS | Hook.WHOLE_REGION)
    assert marked(ground, tmp_path / "elsewhere", "elsewhere", **run) == (0, 0)
    assert marked(ground, tmp_path / "graph", "graph", **run) == (0, 4)
    assert unseen_rows(run) == {}
    assert marked(ground, tmp_path / "nobody", "tiled", more=TRUSTED.replace(', "tensor",', ","), **run) == (ALL, ALL)


def test_regions_that_its_arguments_point_to_are_marked_when_a_kernel_that_marks_may_make_maps_itself(ground: ProtectedGround, tmp_path: Path) -> None:
    """"tensors" writes there as through a map of its own: without a mark."""
    run = hooked_run(tmp_path, Hook.MARKS | Hook.WHOLE_REGION)
    assert marked(ground, tmp_path / "struct", "struct", "pointer", **run) == (ALL, 1)
    assert marked(ground, tmp_path / "tiled", "tiled", **run) == (ALL, 4)
    assert marked(ground, tmp_path / "graph", "graph", "pointer", **run) == (ALL, 4)


@pytest.mark.parametrize(("other", "pages"), [("lower", ALL - 1), ("upper", ALL - 3)])
def test_pages_from_the_lower_address_on_are_marked_when_two_maps_have_the_same_bytes(ground: ProtectedGround, tmp_path: Path, other: str, pages: int) -> None:
    assert marked(ground, tmp_path / "protect", "twice", other, FAKE_EQUAL_MAPS="1") == (0, pages)


def test_all_regions_are_marked_when_the_gpu_may_change_a_graphs_node(ground: ProtectedGround, tmp_path: Path) -> None:
    assert marked(ground, tmp_path / "protect", "graph", FAKE_UPDATABLE="1") == (ALL, ALL)


def test_all_regions_are_marked_when_a_kernel_is_known_to_write_through_maps_and_is_given_none(ground: ProtectedGround, tmp_path: Path) -> None:
    run = hooked_run(tmp_path, Hook.MARKS | Hook.WHOLE_REGION)
    assert marked(ground, tmp_path / "map", "replaced", **run) == (0, 4)
    assert marked(ground, tmp_path / "moved", "moved", more=PLAIN_MAPS.replace('["tensors"]', '["tensor"]'), **run) == (ALL, ALL)
    assert unseen_rows(run)["tensor"] == "all regions: it writes through tensor maps, and has none in its arguments"


@pytest.mark.parametrize(
    ("words", "more", "rows"),
    [
        (("tiled",), TRUSTED, {"tensor": "a region as a whole: an argument points to it"}),
        (("elsewhere",), TRUSTED, {}),
        (("changed",), TRUSTED, {"tensor": NOT_KNOWN}),
        (("struct", "words"), TRUSTED, {"tensors": NOT_KNOWN}),
        (("graph", "pointer"), TRUSTED, {"tensor": "a region as a whole: an argument points to it"}),
        (("graph",), TRUSTED.replace(', "tensor",', ","), {"tensor": "all regions: it does not mark, and is not trusted"}),
        (("forgotten",), TRUSTED, {"tensor": "all regions: an argument may be a tensor map that was forgotten"}),
    ],
)
def test_kernel_is_named_with_the_reason_when_it_marks_too_much(
    ground: ProtectedGround, tmp_path: Path, words: tuple[str, ...], more: str, rows: dict[str, str]
) -> None:
    run = marking_run(tmp_path)
    marked(ground, tmp_path / "protect", *words, more=more, **run)
    assert unseen_rows(run) == rows
    (log,) = Path(run["CONCORDIA_RUN"], "modules").iterdir()
    end = next(json.loads(line) for line in log.read_text().splitlines() if '"end"' in line)
    assert (end.get("tensor maps forgotten", 0) > 0) == (words == ("forgotten",))


def test_every_call_that_makes_a_map_is_hooked_when_the_shim_is_built() -> None:
    wanted = {"cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col", "cuTensorMapEncodeIm2colWide", "cuTensorMapReplaceAddress"}
    assert {name for name in hook_names() if re.match("cuTensorMap", name)} == wanted


def test_page_says_how_many_maps_and_places_are_remembered_when_it_is_read() -> None:
    (most,) = re.findall(r"^#define TENSOR_MAPS_MAX (\d+)", (SOURCES / "tensor_maps.c").read_text(), re.MULTILINE)
    (places,) = re.findall(r"REACHED_MAX = (\d+)", (SOURCES / "graph_notes.h").read_text())
    page = " ".join((SOURCES.parents[2] / "docs" / "program.md").read_text().split())
    assert f"up to {int(most):,} maps" in page
    assert f"reach more than {int(places):,} places" in page

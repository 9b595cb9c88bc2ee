"""native/{opaque,process_settings}.c and their part in load.c: which library an image is of decides for each load, and never for the next one.

Invariants: bytes that were hooked where no library is named stay original in one that is left as it is, and the other way, in either order, in one process
or in two; such an image is not looked up and not asked for; a pattern means in C what it means in Python; without a whole list nothing is hooked.
"""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path

import pytest

from concordia import config
from concordia.errors import UsageError
from concordia.instrument.cache import image_key
from concordia.instrument.options import Options
from concordia.integrations.program.run_folder import ProgramRun
from concordia.integrations.program.shim_build import NATIVE
from shim_ground import NATIVE as TESTS_NATIVE
from shim_ground import compile_c
from stand_in_rewriter import hooked
from test_shim_images import IMAGES, PTX, Ground, fatbin, ground, is_hooked, parts  # noqa: F401  fixtures

pytest_plugins = ["shim_fixtures"]

ORIGINAL = [("original", "left as it is, by policy", "")]
HOOKED = [("rewritten", "", image_key(PTX))]
PIECES = ("*", "*", "?", "a", "B", "c", "1", "]", "!", "-", "^", "\\")
NAMES = ("libcublasLt.so.13", "libplain.so")


@pytest.fixture
def holders(ground: Ground) -> dict[str, Path]:  # noqa: F811
    """Two libraries of the same content: one that is left as it is, and one that is not."""
    ground.settle(opaque=Options().opaque_list())
    text, container = PTX.decode().replace("\n", "\\n"), ",".join(map(str, fatbin()))
    found = {}
    for name in NAMES:
        found[name] = ground.run.parent / name
        compile_c([str(TESTS_NATIVE / "image_holder.c"), f'-DIMAGE="{text}"', f"-DCONTAINER={container}", "-fPIC", "-shared"], found[name])
    return found


def outcomes(ground: Ground) -> list[tuple[str, str, str]]:  # noqa: F811
    return [(line["outcome"], line["why"], line["key"]) for line in ground.images()]


def forget(ground: Ground) -> None:  # noqa: F811
    for log in (ground.run / "modules").iterdir():
        log.unlink()


def test_bytes_are_hooked_in_one_place_and_original_in_the_other_when_a_process_loads_both(ground: Ground, holders: dict[str, Path]) -> None:  # noqa: F811
    rewriter = ground.start_rewriter()
    anonymous, held = f"load:{ground.write(PTX)}", f"held_image:{holders['libcublasLt.so.13']}"
    for words in ((anonymous, held), (held, anonymous)):
        for path in ground.cache.folder.iterdir():
            path.unlink()
        forget(ground)
        handed = dict(zip(words, ground.handed("context", *words), strict=True))
        assert is_hooked(handed[anonymous], PTX)
        assert handed[held] == PTX
        found = outcomes(ground)
        assert found == (HOOKED + ORIGINAL if words[0] == anonymous else ORIGINAL + HOOKED)
        (line,) = [line for line in ground.images() if line["outcome"] == "original"]
        assert (line["library"], line["bytes"], line["kind"]) == (str(holders["libcublasLt.so.13"]), len(PTX), "ptx")
    assert len(rewriter.requests) == 2, "only the anonymous ones"


def test_bytes_are_hooked_in_one_place_and_original_in_the_other_when_processes_share_the_cache(ground: Ground, holders: dict[str, Path]) -> None:  # noqa: F811
    rewriter = ground.start_rewriter()
    held = f"held_image:{holders['libcublasLt.so.13']}"
    for is_held in (True, False, True, False):
        (handed,) = ground.handed("context", held if is_held else f"load:{ground.write(PTX)}")
        assert (handed == PTX) if is_held else is_hooked(handed, PTX)
    assert len(rewriter.requests) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["held_image", "held_container", "held_wrapper", "held_load", "load_file", "library_file"])
def test_image_is_original_when_any_that_it_belongs_to_is_opaque(ground: Ground, holders: dict[str, Path], way: str, name: str) -> None:  # noqa: F811
    """It lies in the library with or without its wrapper, its wrapper lies there, the library loads it, or the file has the name."""
    kind = "fatbin" if way in ("held_container", "held_wrapper") else "ptx"
    image = IMAGES[kind]
    ground.cache.store(image_key(image), hooked(image))
    if way.endswith("file"):
        (ground.run.parent / "files").mkdir()
        word = f"{way}:{ground.write(image, f'files/{name}')}"
    else:
        word = f"{way}:{holders[name]}" + ("" if way in ("held_image", "held_container") else f":{ground.write(image)}")
    handed = ground.handed("context", word, "unload")
    assert len(handed) == 1
    is_opaque = name == "libcublasLt.so.13"
    if kind == "ptx":
        assert (handed == [image]) if is_opaque else is_hooked(handed[0], image)
    assert [outcome for outcome, _, _ in outcomes(ground)] == ["original" if is_opaque else "rewritten"]
    assert ground.images()[0]["library"].endswith(f"/{name}") or (way == "held_load" and not is_opaque)


def test_rewriter_is_not_told_of_an_opaque_image_when_images_are_only_looked_at(ground: Ground, holders: dict[str, Path]) -> None:  # noqa: F811
    rewriter = ground.start_rewriter("refused")
    ground.settle(mode="look")
    assert ground.handed("context", f"held_image:{holders['libcublasLt.so.13']}") == [PTX]
    assert outcomes(ground) == ORIGINAL
    assert not rewriter.requests


@pytest.mark.parametrize("given", [None, "x" * (config.OPAQUE_BYTES_MAX + 1), "*"], ids=["none", "too-long", "all"])
def test_nothing_is_hooked_when_there_is_no_whole_list(ground: Ground, given: str | None) -> None:  # noqa: F811
    ground.cache.store(image_key(PTX), hooked(PTX))
    ground.settings.pop("opaque")
    ground.settle(**({} if given is None else {"opaque": given}))
    assert ground.handed("context", f"load:{ground.write(PTX)}") == [PTX]
    assert outcomes(ground) == ORIGINAL
    ground.settle(opaque="x" * config.OPAQUE_BYTES_MAX)
    assert is_hooked(ground.handed("context", f"load:{ground.write(PTX)}")[0], PTX)


# --- the list, by itself


class Settled:
    """The C side with settings."""

    def __init__(self, parts: ctypes.CDLL, folder: Path) -> None:  # noqa: F811
        self._parts, self.run = parts, ProgramRun(folder)
        folder.mkdir(mode=0o700)

    def says(self, options: Options, path: str) -> bool:
        self.run.settle({"mode": "look", "opaque": options.opaque_list(), "behind": "libx"})
        assert self._parts.process_settle(os.fsencode(self.run.path)) == 1
        return bool(self._parts.opaque_library(os.fsencode(path)))


@pytest.fixture
def settled(parts: ctypes.CDLL, tmp_path: Path) -> Settled:  # noqa: F811
    return Settled(parts, tmp_path / "settled")


@pytest.mark.parametrize(
    ("pattern", "name", "is_match"),
    [
        ("cublas*", "/x/libcublasLt.so.13", True), ("CuBLAS*", "libcublas.so", True), ("cublas*", "/x/LIBCUBLAS.so", False), ("cublas", "libcublas.so", False),
        ("*", "", True), ("*.so.?", "libx.so.1", True), ("*.so.?", "libx.so.13", False), ("a]", "a]", True), ("?", "[", True),
        ("\\*", "\\x", True), ("\\*", "*", False), ("a*b*c", "a1b2b3c", True), ("a*b*c", "a1b2b3d", False), ("x", "/x/", False),
    ],
)  # fmt: skip
def test_pattern_means_the_same_to_both_when_it_is_of_this_form(settled: Settled, pattern: str, name: str, is_match: bool) -> None:
    options = Options(opaque=(pattern,))
    assert options.is_opaque_library(name) == is_match
    assert settled.says(options, name) == is_match


def test_pattern_is_refused_when_it_has_a_set_of_letters() -> None:
    """What is in a set, shells and languages do not agree on."""
    with pytest.raises(UsageError, match=r"only \* and \? stand for other letters"):
        Options(opaque=("cublas[0-9]*",))


def test_lists_mean_the_same_to_both_when_they_are_random(settled: Settled) -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    found = 0
    for _ in range(3000):
        several = tuple("".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(5)))
        name = rng.choice(["", "/x/", "/x/lib"]) + "".join(rng.choices("abC1!-]^[\\", k=rng.randrange(6)))
        expected = Options(opaque=several).is_opaque_library(name)
        assert settled.says(Options(opaque=several), name) == expected, (several, name)
        found += expected
    assert 200 < found < 2800


def test_library_is_opaque_when_its_name_was_cut(settled: Settled) -> None:
    folder = "/" + "f" * 1020
    assert not settled.says(Options(), folder[:1000] + "/libplain.so")
    assert settled.says(Options(), folder + "/libp")


def test_settings_are_refused_when_the_shim_would_not_read_them(parts: ctypes.CDLL, tmp_path: Path) -> None:  # noqa: F811
    """At the bound both take them, a byte more neither does."""
    run = ProgramRun(tmp_path / "settled")
    run.path.mkdir(mode=0o700)
    room = config.RUN_SETTINGS_BYTES_MAX - len("name=\n")
    run.settle({"name": "x" * room})
    assert parts.process_settle(os.fsencode(run.path)) == 1
    with pytest.raises(UsageError, match="bytes of settings"):
        run.settle({"name": "x" * (room + 1)})
    with (run.path / "settings").open("a") as file:
        file.write("\n")
    assert parts.process_settle(os.fsencode(run.path)) == 0
    run.path.chmod(0o701)
    run.settle({"name": "x"})
    assert parts.process_settle(os.fsencode(run.path)) == 0
    run.path.chmod(0o700)
    assert parts.process_settle(os.fsencode(run.path)) == 1


def test_list_is_as_long_as_the_shim_reads_when_it_is_at_its_bound(settled: Settled) -> None:
    options = Options(opaque=("x" * (config.OPAQUE_BYTES_MAX - 5), "last"))
    assert settled.says(options, "liblast")
    assert not settled.says(options, "libplain.so")
    assert f"LIST_BYTES_MAX {config.OPAQUE_BYTES_MAX} " in (NATIVE / "opaque.c").read_text()

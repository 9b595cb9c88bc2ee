"""native/addresses.c, pointers.c: what a program is told of memory whose addresses are kept, and what that memory costs it.

Invariants: of each allocation the program is told the same as of the driver's own, whatever it is mapped with; nothing is told of what is freed;
who keeps no addresses gets the driver's own functions; one granule without anything in it stays mapped, and is given back where memory is wanted;
a small allocation for which there is no granule is the driver's, and costs no protection; what is not kept is said once; who frees it beside a capture
does not end that, and the place is free behind it; who frees it in the order of a stream frees it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from concordia.integrations.program.native_build import NATIVE as SOURCES
from concordia.integrations.program.shim_build import place_shim
from protected_ground import LIFE_S, ProtectedGround, policy_of, protected_folder
from shim_ground import NATIVE, compile_c

CHILD = Path(__file__).with_name("pointers_child.py")
NOTICE = "concordia: not all addresses are kept from here on: "
MIB = 1 << 20


def build(folder: Path, *flags: str) -> ProtectedGround:
    driver, run = folder / "driver" / "libcuda.so.1", folder / "run"
    driver.parent.mkdir(parents=True)
    shape = ["-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic"]
    compile_c([str(NATIVE / "fake_pointers.c"), *shape, "-ldl"], driver)
    run.mkdir(mode=0o700)
    place_shim(run, driver, flags=("-Werror", *flags))
    return ProtectedGround(driver.parent, CHILD, run)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    return build(tmp_path_factory.mktemp("pointers"))


@pytest.fixture(scope="module")
def narrow_ground(tmp_path_factory: pytest.TempPathFactory) -> ProtectedGround:
    return build(tmp_path_factory.mktemp("narrow"), "-DKEPT_MAX=8", f"-DSMALL_RANGE_BYTES={4 * MIB}")


def asked(ground: ProtectedGround, folder: Path, *words: str, is_kept: bool = True, shimmed: bool = True) -> tuple[Any, list[str]]:
    """The program's answer, and what was said beside it."""
    protected_folder(folder, policy_of('[[region]]\nname = "big"\nsize = "2MiB"', more=f"[program]\nkeep_addresses = {str(is_kept).lower()}"))
    program = ground.start(*words, program=[sys.executable, str(CHILD)], shimmed=shimmed, CONCORDIA_PROTECT=str(folder))
    said, errors = program.communicate(timeout=LIFE_S)
    assert program.returncode == 0, errors
    return json.loads(said.removeprefix("ANSWER ")), [line for line in errors.splitlines() if "is freed" not in line]


def test_program_is_told_what_the_driver_says_of_its_own_memory_when_addresses_are_kept(ground: ProtectedGround, tmp_path: Path) -> None:
    plain, _ = asked(ground, tmp_path / "plain", "tell", shimmed=False)
    loose, _ = asked(ground, tmp_path / "loose", "tell", is_kept=False)
    kept, errors = asked(ground, tmp_path / "kept", "tell")
    assert errors == []
    assert loose == plain
    of_ipc = ("ipc", "capable")
    assert {name: kept[name] for name in kept if name not in of_ipc} == {name: plain[name] for name in plain if name not in of_ipc}
    assert kept["ids"] == len(kept["ipc"])
    assert all(row[1] == row[4] == 0 and row[0] == row[2] == row[5] and row[3] for row in kept["rows"])
    assert kept["freed"] == [False, False, [0]]
    assert [any(kept[name]) for name in of_ipc] == [False, False], "it says that it cannot be shared, and cannot"
    assert [all(plain[name]) for name in of_ipc] == [True, True]


@pytest.mark.parametrize("is_kept", [True, False])
def test_resolver_gives_the_drivers_own_when_no_addresses_are_kept(ground: ProtectedGround, tmp_path: Path, is_kept: bool) -> None:
    found, _ = asked(ground, tmp_path / "resolver", "resolver", is_kept=is_kept)
    assert len(found) == 3
    assert set(found.values()) == {not is_kept}, found


def test_memory_of_a_small_one_stays_mapped_when_it_comes_and_goes(ground: ProtectedGround, tmp_path: Path) -> None:
    found, errors = asked(ground, tmp_path / "churn", "churn")
    # one more granule for the pairs, and each time that both were empty the upper one again
    assert found == {"made": 3, "places": 1, "given_back": 2 * MIB, "same": True}
    assert errors == []


def test_small_one_has_its_place_when_only_an_empty_granule_elsewhere_has_memory(ground: ProtectedGround, tmp_path: Path) -> None:
    found, errors = asked(ground, tmp_path / "hole", "hole")
    assert found == {"same": True}
    assert errors == []


def test_small_one_is_the_drivers_when_there_is_no_memory_for_a_granule(ground: ProtectedGround, tmp_path: Path) -> None:
    found, errors = asked(ground, tmp_path / "full", "full")
    assert found["kept"] == [True, True, True, False]
    assert errors == [NOTICE + "no memory for one more granule of small ones"], "and the program stays protected"


def test_empty_granule_is_given_back_when_its_memory_is_wanted_or_the_context_ends(ground: ProtectedGround, tmp_path: Path) -> None:
    found, errors = asked(ground, tmp_path / "spare", "spare")
    assert found == {"large": 2 * MIB, "pool": MIB, "end": 2 * MIB}
    assert errors == []


@pytest.mark.parametrize(("stream", "end"), [("made", "synchronize"), ("made", "free"), ("made", "destroy"), ("own", "synchronize"), ("own", "free")])
def test_capture_ends_well_and_the_place_is_free_behind_it_when_memory_is_freed_beside_it(ground: ProtectedGround, tmp_path: Path, stream: str, end: str) -> None:
    found, errors = asked(ground, tmp_path / "capture", "capture", stream, end)
    assert found == {"told": [False, False], "refused": [1, 1], "held": 0, "apart": True, "left": -4 * MIB, "same": [True, True]}
    assert errors == []


def test_memory_is_freed_when_it_is_in_the_order_of_a_stream(ground: ProtectedGround, tmp_path: Path) -> None:
    found, errors = asked(ground, tmp_path / "behind", "behind")
    assert found == {"wrong": 0, "captured": 1, "there": True, "gone": True, "same": True}
    assert errors == []


def test_memory_is_of_no_context_when_its_own_has_gone(ground: ProtectedGround, tmp_path: Path) -> None:
    found, errors = asked(ground, tmp_path / "gone", "gone")
    assert found == {"before": True, "after": 0, "size": 3 * MIB}
    assert errors == []


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (512, "more than 8 allocations of less than 1 MiB, or from 1 MiB on"),
        (3 * MIB, "more than 8 allocations of less than 1 MiB, or from 1 MiB on"),
        (MIB - 512, "the place for those of less than 1 MiB is full"),
    ],
)
def test_it_is_said_once_when_no_more_addresses_are_kept(narrow_ground: ProtectedGround, tmp_path: Path, size: int, why: str) -> None:
    found, errors = asked(narrow_ground, tmp_path / "bounds", "bounds", str(size))
    assert found == {"count": 20, "apart": True}
    assert errors == [NOTICE + why]


def test_bounds_are_those_of_the_documentation_when_they_are_read() -> None:
    text = (SOURCES / "addresses.c").read_text("utf-8")
    (most,) = re.findall(r"^#define KEPT_MAX (\d+)$", text, re.MULTILINE)
    assert "#define SMALL_RANGE_BYTES (1ull << 30)" in text
    prose = (SOURCES.parents[2] / "docs" / "program.md").read_text("utf-8")
    assert f"{int(most):,} allocations from 1 MiB on and as many smaller ones, 1 GiB of these" in " ".join(prose.split())

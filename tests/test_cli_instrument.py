"""cli_instrument.py, instrument/offline.py, library_file.py: instrument a file without a GPU.

Invariants: what is written is what the report says, whole, with every slot filled or listed; images in a library are found, whatever
else is in the file; wrong input of every kind is one line and exit code 2, and nothing is written.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import random
import re
import time
from collections.abc import Sequence

import pytest
from click.testing import CliRunner

import gpu_images
from concordia import cli, cli_commands, config
from concordia.abi.control_layout import CONTROL_ALLOCATED_BYTES
from concordia.instrument.library_file import images_in
from concordia.instrument.options import Options
from concordia.instrument.report import Slot, SlotKind, fill
from concordia.instrument.rewrite import rewrite
from concordia.paths import Paths

CONTROL = 0x7F12_3456_7800


def run(*arguments: object) -> tuple[int, str, str]:
    """The command as a person calls it: exit code, what it said, what went wrong."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(part) for part in ("instrument", *arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def ptx(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "in.ptx"
    path.write_text(gpu_images.PTX)
    return path


def kernels_of(text: str) -> dict[str, Sequence[str]]:
    return {kernel["name"]: kernel["hooks"] for kernel in json.loads(text)["kernels"]}


def test_ptx_is_hooked_and_says_where_it_writes_when_a_control_block_is_given(ptx: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.ptx"
    code, said, wrong = run(ptx, "-o", out, "--control", hex(CONTROL), "--json")
    assert (code, wrong) == (0, "")
    found = json.loads(said)
    assert found["is_changed"]
    assert found["output"] == str(out)
    assert found["slots"]
    assert found["control"] == CONTROL
    done = rewrite(ptx.read_bytes(), Options())
    assert out.read_bytes() == fill(done.image, done.slots, CONTROL)
    assert f"{CONTROL:016x}".encode() in out.read_bytes()
    assert kernels_of(said) == {"store": ["entry", "marks", "ptx"], "nothing": ["entry", "marks", "ptx"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ptx", "out.ptx"]


def test_cubin_gets_an_entry_hook_when_it_is_machine_code(tmp_path: pathlib.Path) -> None:
    source, out = tmp_path / "in.cubin", tmp_path / "out.cubin"
    source.write_bytes(gpu_images.cubin())
    code, said, _ = run(source, "-o", out, "--control", CONTROL, "--json", "--arch", "sm_90")
    assert code == 0
    assert kernels_of(said) == {"store": ["entry"], "nothing": ["entry"]}
    assert out.read_bytes() != source.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022))


def test_slots_are_listed_beside_the_file_when_they_are_kept(ptx: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.ptx"
    code, said, _ = run(ptx, "-o", out, "--keep-slots")
    assert code == 0
    assert "out.ptx.slots.json" in said
    listed = json.loads((tmp_path / "out.ptx.slots.json").read_text())["slots"]
    slots = tuple(Slot(slot["offset"], SlotKind[slot["kind"].upper()]) for slot in listed)
    assert slots
    assert all(slot["name"] == "control" for slot in listed)
    done = rewrite(ptx.read_bytes(), Options())
    assert out.read_bytes() == done.image
    assert fill(out.read_bytes(), slots, CONTROL) == fill(done.image, done.slots, CONTROL)


def test_old_list_of_slots_goes_when_a_control_block_is_given(ptx: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.ptx"
    assert run(ptx, "-o", out, "--keep-slots")[0] == run(ptx, "-o", out, "--control", CONTROL)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ptx", "out.ptx"]


def test_reason_says_which_marks_there_are_when_the_other_kind_was_asked_for(ptx: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert "marks in PTX are marks, not sass-marks" in run(ptx, "--hooks", "sass-marks")[1]
    source = tmp_path / "in.cubin"
    source.write_bytes(gpu_images.cubin())
    assert "marks in machine code are sass-marks" in run(source, "--hooks", "marks")[1]


def test_name_of_a_kernel_moves_no_cursor_when_it_is_told(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "in.cubin"
    source.write_bytes(gpu_images.cubin().replace(b"nothing\0", b"no\x1b[2J\n\0"))
    code, said, _ = run(source)
    assert code == 0
    assert "\x1b" not in said
    assert "no\\x1b[2J" in said


def test_nothing_is_written_when_only_a_look_is_asked_for(ptx: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code, said, _ = run(ptx)
    assert code == 0
    assert "2 of 2 kernels hooked" in said
    assert "PTX for sm_90" in said
    assert [path.name for path in tmp_path.iterdir()] == ["in.ptx"]


def test_original_is_written_when_nothing_could_be_hooked(tmp_path: pathlib.Path) -> None:
    source, out = tmp_path / "in.fatbin", tmp_path / "out.fatbin"
    source.write_bytes(gpu_images.fatbin(gpu_images.entry(gpu_images.ELF, 80, b"\x7fELF" + bytes(60))))
    code, said, _ = run(source, "-o", out, "--keep-slots")
    assert code == 0
    assert "the original, nothing was hooked" in said
    assert out.read_bytes() == source.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fatbin", "out.fatbin"]


def library(tmp_path: pathlib.Path, *images: bytes) -> pathlib.Path:
    """A file with these images at aligned places, and words that only look like one."""
    path = tmp_path / "libmine.so"
    data = b"\x7fELF" + bytes(100) + b"\x50\xed\x55\xba" + bytes(20)
    for image in images:
        data += bytes(-len(data) % 8) + image + b"code"
    path.write_bytes(data + b"\x50\xed\x55\xba")
    return path


def test_images_are_listed_and_one_is_taken_out_when_the_file_is_a_library(tmp_path: pathlib.Path) -> None:
    first = gpu_images.fatbin(gpu_images.entry(gpu_images.TEXT, 90, gpu_images.PTX.encode()))
    inner = gpu_images.fatbin(gpu_images.entry(7, 90, gpu_images.fatbin()))
    path = library(tmp_path, first, inner)
    assert [path.read_bytes()[one.offset :][: len(one.image.data)] for one in images_in(path.read_bytes())] == [first, inner]
    code, said, _ = run(path)
    assert code == 0
    assert "2 images" in said
    assert "PTX for sm_90" in said
    assert len(json.loads(run(path, "--json")[1])["images"]) == 2
    assert run(path, "-o", tmp_path / "out", "--keep-slots")[::2] == (2, f"concordia: {path} has 2 images: say which with --image N\n")
    assert run(path, "--image", 2)[::2] == (2, f"concordia: {path} has images 0 to 1, no image 2\n")
    code, said, _ = run(path, "--image", 0, "-o", tmp_path / "out", "--control", CONTROL)
    assert code == 0
    assert "2 of 2 kernels hooked" in said
    done = rewrite(first, Options())
    assert (tmp_path / "out").read_bytes() == fill(done.image, done.slots, CONTROL)


def test_time_grows_with_the_file_when_all_of_it_looks_like_images() -> None:
    """Beginnings of images that reach to its end; copies of them would be gigabytes."""
    count = 100_000
    data = b"".join(b"\x50\xed\x55\xba\x01\0\x10\0" + ((count - n - 1) * 24 + 8).to_bytes(8, "little") + bytes(8) for n in range(count))
    started = time.monotonic()
    assert images_in(data) == ()
    assert time.monotonic() - started < 2


def test_library_is_left_alone_when_its_licence_wants_it(tmp_path: pathlib.Path) -> None:
    path = library(tmp_path, gpu_images.fatbin(gpu_images.entry(gpu_images.TEXT, 90, gpu_images.PTX.encode())))
    opaque = path.rename(tmp_path / "libcublasLt.so.13")
    code, said, _ = run(opaque, "--json")
    assert code == 0
    (kernel,) = json.loads(said)["kernels"]
    assert kernel["hooks"] == ["opaque"]
    assert "libcublasLt.so.13" in kernel["reason"]


WRONG_FILES = {
    "empty": b"",
    "text": b"no image\n",
    "host-elf": b"\x7fELF\x02\x01\x01" + bytes(200),
    "cut-fatbin": gpu_images.fatbin(gpu_images.entry(gpu_images.ELF, 90, bytes(64)))[:-8],
    "wrapper": b"\xb1\x43\x62\x46\x01" + bytes(19),
    "short-cubin": b"\x7fELF\x02\x01\x41\x08" + bytes(20),
    "binary-ptx": b".version 8.0\n\0.target sm_90\n",
    "ptx": gpu_images.PTX.replace("ret;", "#foo").encode(),
    "cut-cubin": b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xbe\0" + bytes(80),
    "fatbin-of-a-cut-cubin": gpu_images.fatbin(gpu_images.entry(gpu_images.ELF, 90, b"\x7fELF\x02\x01\x01" + bytes(60))),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_file_is_one_line_and_exit_code_2_when_given(tmp_path: pathlib.Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WRONG_FILES[name])
    code, said, wrong = run(path, "-o", tmp_path / "out", "--keep-slots")
    assert (code, said, len(wrong.splitlines())) == (2, "", 1)
    assert wrong.startswith("concordia: ")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere/x"], "No such file"), (["{dir}"], "no regular file"), (["/dev/zero"], "no regular file"), (["{in}", "-o", "{out}"], "--control ADDRESS"),
        (["{in}", "-o", "{out}", "--control", "0"], "--control 0"), (["{in}", "-o", "{out}", "--control", "0x7f01"], "--control 0x7f01"),
        (["{in}", "-o", "{out}", "--control", "near"], "--control near"), (["{in}", "-o", "{out}", "--control", "-8"], "--control -8"),
        (["{in}", "-o", "{out}", "--control", "0x7f0000000010"], "--control 0x7f0000000010"), (["{in}", "-o", "{out}", "--control", hex(1 << 47)], "--control 0x8"),
        (["{in}", "-o", "{dir}/" + "x" * 260, "--keep-slots"], "name too long"), (["{in}", "-o", "{dir}/" + "x" * 250, "--keep-slots"], "name too long"),
        (["{in}", "-o", "{out}", "--control", hex(1 << 64)], "--control 0x1"), (["{in}", "-o", "{out}", "--control", "8", "--keep-slots"], "--control ADDRESS"),
        (["{in}", "--control", "8"], "with -o"), (["{in}", "--keep-slots"], "with -o"), (["{in}", "-o", "{in}", "--keep-slots"], "to be read"),
        (["{in}", "-o", "{dir}/no/out", "--keep-slots"], "no folder"), (["{in}", "-o", "{dir}", "--keep-slots"], "no file"),
        (["{in}", "-o", "/dev/null", "--keep-slots"], "no file"), (["{in}", "--hooks", "entry,all"], "--hooks"), (["{in}", "--hooks", ""], "--hooks"),
        (["{in}", "--arch", "hopper"], "--arch hopper"), (["{in}", "--arch", "20"], "architecture 20"), (["{in}", "--image", "1"], "is one image"),
        (["{in}", "--image", "-1"], "--image"), ([], "FILE"), (["{in}", "--unknown"], "--unknown"), (["{in}", "more"], "more"),
    ],
)  # fmt: skip
def test_wrong_argument_is_one_line_and_exit_code_2_when_given(ptx: pathlib.Path, tmp_path: pathlib.Path, arguments: list[str], said: str) -> None:
    places = {"{in}": ptx, "{out}": tmp_path / "out", "{dir}": tmp_path}
    filled = [next((part.replace(name, str(path)) for name, path in places.items() if name in part), part) for part in arguments]
    code, _, wrong = run(*filled)
    assert (code, len(wrong.splitlines())) == (2, 1), wrong
    assert said in wrong
    assert list(tmp_path.iterdir()) == [ptx]


def test_nothing_is_left_when_a_folder_cannot_be_written(ptx: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "rename", full)
    code, _, wrong = run(ptx, "-o", tmp_path / "out", "--keep-slots")
    assert (code, wrong) == (2, f"concordia: {tmp_path / 'out'}: No space left on device\n")
    assert list(tmp_path.iterdir()) == [ptx]


def test_file_is_refused_when_it_is_larger_than_the_bound(ptx: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LIBRARY_BYTES_MAX", 100)
    assert run(ptx)[::2] == (2, f"concordia: {ptx} has more than 100 bytes\n")


def test_every_answer_is_a_report_or_one_line_when_a_file_is_damaged(tmp_path: pathlib.Path) -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole = gpu_images.fatbin(gpu_images.entry(gpu_images.TEXT, 90, gpu_images.PTX.encode()), gpu_images.entry(gpu_images.ELF, 80, bytes(64)))
    path, codes = tmp_path / "in", set()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.choice([rng.randrange(len(damaged)), rng.randrange(80)])] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        code, said, wrong = run(path, "--json")
        codes.add(code)
        assert (code, bool(said), len(wrong.splitlines())) in ((0, True, 0), (2, False, 1))
    assert codes == {0, 2}


def test_page_quotes_the_reasons_and_slots_of_the_source_when_they_change() -> None:
    root = pathlib.Path(__file__).parents[1]
    page = (root / "docs" / "instrument.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (root / "src/concordia/instrument").glob("*.py"))
    table = page.partition("| reason begins with | meaning |")[2].partition("\n\n")[0]
    reasons = [reason for row in table.splitlines()[2:] for reason in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(reasons) > 8
    for reason in reasons:
        for part in re.split(r"\.\.\.|sm_90", reason):
            assert part.strip() in source, f"nothing says {part!r}"
    for kind in SlotKind:
        assert f"`{kind.name.lower()}`" in page
    assert "~/.cache/concordia/images/" in page
    assert Paths.default().image_cache.parts[-2:] == ("concordia", "images")
    assert CONTROL_ALLOCATED_BYTES == 64 << 10


def test_help_says_what_it_does_when_asked() -> None:
    found = CliRunner().invoke(cli_commands.cli, ["instrument", "--help"])
    assert found.exit_code == 0
    assert "--keep-slots" in found.output

"""Hooks in machine code, without a GPU.

Invariants: the shipped hooks are what the pinned compiler makes, for every address; each kernel of the known form gets its hooks, and
no instruction of its own changes or moves: the vendor's disassembler and the proof say so; what is not of the known form stays as it
is, with the reason, while its neighbours are hooked; the proof refuses whatever else differs.
"""

from __future__ import annotations

import pathlib
import random
import re
import struct
import subprocess
import time
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
pytest.importorskip(
    "triton", reason="triton is not installed: its wheel has assembler and disassembler"
)

import zstandard
from splice_kernels import BY_NAME, KERNELS, compiled, new_cubin, old_cubin, vendor_tool

from concordia.device.cubin import read_facts
from concordia.device.nvrtc import link_cubin
from concordia.errors import ImageRefused
from concordia.instrument import hook, sass
from concordia.instrument.elf import TEXT, read_attributes, read_cubin
from concordia.instrument.leaving import refuse_exit
from concordia.instrument.proof import first_difference, proves_original
from concordia.instrument.report import Hook, SlotKind, fill
from concordia.instrument.splice import Spliced, splice_cubin

CORPUS = sorted((pathlib.Path(__file__).parent / "corpus" / "cubin").glob("*.zst"))
BOTH = Hook.ENTRY | Hook.EXIT
ADDRESS = 0x7F12_3456_8000
LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+([^/]*?)\s*;?\s*/\* 0x([0-9a-f]{16}) \*/\s+/\* 0x([0-9a-f]{16}) \*/"
)
HEADING = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
makers = pytest.mark.parametrize("maker", [old_cubin, new_cubin], ids=["V1", "V2"])


def disassembled(cubin: bytes, path: pathlib.Path) -> dict[str, dict[int, tuple[str, int, int]]]:
    """By function and offset: the instruction's words, as the vendor reads them, and its two halves."""
    path.write_bytes(cubin)
    done = subprocess.run(
        [vendor_tool("nvdisasm"), "-c", "-hex", path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    warnings = [
        line
        for line in done.stderr.splitlines()
        if "Old Elf" not in line and "Dataflow analysis disabled" not in line and line.strip()
    ]
    assert (done.returncode, warnings) == (0, []), done.stderr
    parts = HEADING.split(done.stdout)
    found = {
        name: {
            int(at, 16): (words, int(low, 16), int(high, 16))
            for at, words, low, high in LINE.findall(body)
        }
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    sizes = {s.name.removeprefix(TEXT): s.size for s in read_cubin(cubin).sections if s.name.startswith(TEXT)}
    assert {name: 16 * len(instructions) for name, instructions in found.items()} == sizes
    return found


def check_disassembly(original: bytes, spliced: Spliced, path: pathlib.Path) -> None:
    """Every instruction of the original is there, as the disassembler reads both."""
    before = disassembled(original, path)
    after = disassembled(fill(spliced.cubin, spliced.slots, ADDRESS), path)
    hooked = {kernel.name: kernel.hooks for kernel in spliced.kernels}
    assert before.keys() == after.keys()
    for name, instructions in before.items():
        hooks = hooked.get(name, Hook(0))
        for at, (words, low, high) in instructions.items():
            now = after[name][at]
            if at == 0 and Hook.ENTRY in hooks:
                assert words.startswith("LDC R1, c[0x0][0x28]")
                assert now[0].startswith("BRA `(")
            elif "EXIT" in words.split() and Hook.EXIT in hooks:
                guard, _, second = words.partition("EXIT")
                assert re.fullmatch(
                    rf"{re.escape(guard)}BRA {re.escape(second.strip() + ', ' if second.strip() else '')}`\(\S+\)",
                    now[0],
                ), (words, now[0])
            else:
                assert (low, high) == now[1:], (name, at, words, now[0])


@pytest.mark.parametrize("stand_ins", [hook.STAND_INS, (0x12345640, 0x7FABCDEF)])
def test_shipped_hooks_are_the_compiler_s_own_when_compiled_afresh(
    stand_ins: tuple[int, int],
) -> None:
    compiled = hook.compile_hooks(stand_ins)
    assert compiled["entry"] == hook.entry_hook(), "run: python -m concordia.instrument.hook"
    assert compiled["exit"] == hook.exit_hook(), "run: python -m concordia.instrument.hook"


def test_hooks_touch_nothing_that_is_not_theirs_when_disassembled(tmp_path: pathlib.Path) -> None:
    spliced = splice_cubin(new_cubin("nothing"), entry=True, exit=True)
    listing = disassembled(fill(spliced.cubin, spliced.slots, ADDRESS), tmp_path / "a.cubin")[
        "nothing"
    ]
    size = len(new_cubin_code("nothing"))
    entry = [
        listing[at][0] for at in sorted(listing) if size <= at < size + len(hook.entry_hook().code)
    ]
    at = size + len(hook.entry_hook().code) + 2 * sass.INSTRUCTION_BYTES
    leaving = [
        listing[place][0]
        for place in sorted(listing)
        if at <= place < at + len(hook.exit_hook().code)
    ]
    used = {int(r) for words in entry + leaving for r in re.findall(r"\bR(\d+)\b", words)}
    assert (
        max(used) + sass.REGISTERS_KEPT
        < max(hook.entry_hook().registers, hook.exit_hook().registers)
        <= hook.REGISTERS_MAX
    )
    assert (
        sum(words.startswith("BSSY B0") for words in entry)
        == sum(words.startswith("BSYNC B0") for words in entry)
        == 1
    )
    assert not any(re.search(r"\b(EXIT|BAR|CALL|RET|WARPSYNC)\b", words) for words in entry)
    assert not any(
        re.search(r"\b(UR\d+|UP\d|B\d+|R1|BAR|CALL|RET|WARPSYNC|VOTE)\b", words)
        for words in leaving
    ), leaving
    assert [words.startswith("MEMBAR") for words in leaving].index(True) < [
        bool(re.match(r"(S2R|MOV|LDC)\b", w)) for w in leaving
    ].index(True)
    assert f"{ADDRESS & 0xFFFFFFFF:#x}" in " ".join(entry)
    assert f"{ADDRESS >> 32:#x}" in " ".join(entry)


def new_cubin_code(name: str) -> bytes:
    cubin = read_cubin(new_cubin(name))
    (section,) = (s for s in cubin.sections if s.name == TEXT + name)
    return bytes(cubin.bytes_of(section))


@makers
def test_kernels_are_hooked_and_keep_their_instructions_when_compiled_here(
    maker: Callable[[str], bytes], tmp_path: pathlib.Path
) -> None:
    original = maker("")
    spliced = splice_cubin(original, entry=True, exit=True)
    assert {report.name for report in spliced.kernels} == {kernel.name for kernel in KERNELS}
    before, after = read_facts(original).registers, read_facts(spliced.cubin).registers
    for report in spliced.kernels:
        reason = BY_NAME[report.name].exit_reason
        assert report.hooks == (Hook.ENTRY if reason else BOTH), report
        assert reason in report.reason
        assert before[report.name] <= after[report.name] == report.registers <= max(before[report.name], hook.REGISTERS_MAX)
    hooks = sum(2 * report.hooks.bit_count() for report in spliced.kernels)
    assert len(spliced.slots) == hooks
    assert {slot.kind for slot in spliced.slots} == {SlotKind.LOW, SlotKind.HIGH}
    assert first_difference(original, spliced.cubin) is None
    check_disassembly(original, spliced, tmp_path / "a.cubin")


@makers
def test_kernel_is_hooked_when_it_gives_registers_back(maker: Callable[[str], bytes]) -> None:
    elf = read_cubin(maker("fewer_registers_than_before"))
    (section,) = (s for s in elf.sections if s.name == TEXT + "fewer_registers_than_before")
    assert sass.SET_REGISTERS in sass.opcodes(sass.words(elf.bytes_of(section)))
    assert splice_cubin(maker("fewer_registers_than_before"), entry=True, exit=True).kernels[0].hooks == BOTH


@makers
def test_only_what_was_asked_for_is_done_when_one_hook_is_wanted(
    maker: Callable[[str], bytes],
) -> None:
    original = maker("lanes_leave_before_a_barrier")
    for entry, leaving in ((True, False), (False, True)):
        spliced = splice_cubin(original, entry=entry, exit=leaving)
        assert spliced.kernels[0].hooks == (Hook.ENTRY if entry else Hook.EXIT)
        assert proves_original(original, spliced.cubin)
        assert len(spliced.slots) == 2
    nothing = splice_cubin(original, entry=False, exit=False)
    assert (nothing.cubin, nothing.slots, nothing.kernels[0].hooks) == (
        original,
        (),
        Hook.LEFT_ALONE,
    )


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.name.partition(".")[0])
def test_shipped_kernels_keep_their_instructions_when_hooked(
    path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    original = zstandard.decompress(path.read_bytes())
    spliced = splice_cubin(original, entry=True, exit=True)
    assert spliced.kernels
    assert all(Hook.ENTRY in kernel.hooks for kernel in spliced.kernels), [
        k.reason for k in spliced.kernels
    ]
    for kernel in spliced.kernels:
        assert (Hook.EXIT in kernel.hooks) == (not kernel.reason)
    assert first_difference(original, spliced.cubin) is None
    check_disassembly(original, spliced, tmp_path / "a.cubin")


def test_triton_kernel_is_hooked_when_triton_compiles_one_without_a_gpu(
    tmp_path: pathlib.Path,
) -> None:
    import triton_kernel

    original = triton_kernel.compiled().asm["cubin"]
    spliced = splice_cubin(original, entry=True, exit=True)
    assert [kernel.hooks for kernel in spliced.kernels] == [BOTH]
    assert first_difference(original, spliced.cubin) is None
    check_disassembly(original, spliced, tmp_path / "a.cubin")


def changed(cubin: bytes, name: str, at: int, low: int, high: int) -> bytes:
    """The same with another instruction in one place of a kernel."""
    elf = read_cubin(cubin)
    (section,) = (s for s in elf.sections if s.name == TEXT + name)
    data = bytearray(cubin)
    struct.pack_into("<QQ", data, section.offset + at, low, high)
    return bytes(data)


def place_of_exit(name: str) -> int:
    code = sass.words(new_cubin_code(name))
    return int(np.flatnonzero(sass.opcodes(code) == sass.EXIT)[0]) * sass.INSTRUCTION_BYTES


@pytest.mark.parametrize(
    ("at", "instruction", "reason"),
    [
        (0, (0x0000000000007918, 0x000FC00000000000), "first instruction"),
        (16, struct.unpack("<QQ", sass.branch(16, 0)), "branches to its first"),
        (16, (0xFFFFFFE000007945, 0x000FE20003800000 | 3), "branches to its first"),
    ],
)
def test_kernel_is_left_alone_when_it_is_not_of_the_known_form(
    at: int, instruction: tuple[int, int], reason: str
) -> None:
    broken = changed(new_cubin("plain"), "plain", at, *instruction)
    spliced = splice_cubin(broken, entry=True, exit=True)
    assert spliced.cubin is broken
    assert spliced.kernels[0].hooks == Hook.LEFT_ALONE
    assert reason in spliced.kernels[0].reason


def test_neighbours_are_hooked_when_one_kernel_of_a_file_is_left_alone() -> None:
    original = zstandard.decompress(next(p for p in CORPUS if "cuda118" in p.name).read_bytes())
    names = [symbol.name for symbol in read_cubin(original).symbols if symbol.is_kernel]
    broken = changed(original, names[3], 0, 0x7918, 0x000FC00000000000)
    spliced = splice_cubin(broken, entry=True, exit=False, skip={names[5]: "denied by name"})
    left = [(k.name, k.reason) for k in spliced.kernels if k.hooks == Hook.LEFT_ALONE]
    assert {name for name, _ in left} == {names[3], names[5]}
    assert dict(left)[names[5]] == "denied by name"
    assert "first instruction" in dict(left)[names[3]]
    assert proves_original(broken, spliced.cubin)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((16, struct.pack("<H", 1)), "relocatable"),
        ((7, b"\x34"), "unknown ABI"),
        ((48, struct.pack("<I", 0x6006404)), "sm_100"),
    ],
)
def test_file_is_left_alone_when_its_header_says_something_else(
    change: tuple[int, bytes], reason: str
) -> None:
    data = bytearray(new_cubin("plain"))
    data[change[0] : change[0] + len(change[1])] = change[1]
    spliced = splice_cubin(bytes(data), entry=True, exit=True)
    assert spliced.cubin == data
    assert [(k.name, k.hooks) for k in spliced.kernels] == [("plain", Hook.LEFT_ALONE)]
    assert reason in spliced.kernels[0].reason


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ((0x000000000000794D, 0x000FEA0003900000), "EXIT of a form"),
        ((0x000000000000794D, 0x000EEA0003800000), "EXIT of a form"),
        ((0x000000000C00799D, 0x000FE20008100304), "not known when it reads"),
        ((0x0000000300027308, 0x000FE20000001400), "may still read registers"),
    ],
)
def test_exit_is_left_alone_when_registers_may_still_be_read_there(
    instruction: tuple[int, int], reason: str
) -> None:
    at = place_of_exit("plain")
    broken = changed(new_cubin("plain"), "plain", at, *instruction)
    spliced = splice_cubin(broken, entry=True, exit=True)
    assert spliced.kernels[0].hooks == Hook.ENTRY
    assert reason in spliced.kernels[0].reason
    only = splice_cubin(broken, entry=False, exit=True)
    assert (only.cubin, only.kernels[0].hooks) == (broken, Hook.LEFT_ALONE)


def test_surface_stores_are_refused_at_exit_when_their_sources_are_read_late() -> None:
    store = "sust.b.2d.b32.trap [%0, {%1, %2}], {%3};"
    text = f'KERNEL(surface) {{ asm volatile("{store}" :: "l"((uint64_t)in), "r"(threadIdx.x * 4), "r"(1), "r"(count)); }}'
    cubin = link_cubin([compiled(text)], name="surface", architecture="sm_90")
    report = splice_cubin(cubin, entry=True, exit=True).kernels[0]
    assert report.hooks == Hook.ENTRY
    assert "not known when it reads" in report.reason


def test_branches_lead_where_the_disassembler_says_when_made_and_read() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(500):
        at, target = (rng.randrange(1 << 28) * 16 for _ in range(2))
        word = np.frombuffer(sass.branch(at, target), "<u8").reshape(1, 2)
        assert int(sass.branch_targets(word, np.zeros(1, np.intp))[0]) + at == target
    assert sass.branch(0x140, 0x140) == struct.pack("<QQ", 0xFFFFFFFC00FC7947, 0x000FEA000383FFFF)


@makers
def test_branch_targets_are_the_disassembler_s_labels_when_compiled(
    maker: Callable[[str], bytes], tmp_path: pathlib.Path
) -> None:
    cubin, path = maker(""), tmp_path / "a.cubin"
    path.write_bytes(cubin)
    done = subprocess.run([vendor_tool("nvdisasm"), "-c", path], capture_output=True, text=True, timeout=120, check=True)
    elf, seen = read_cubin(cubin), 0
    parts = HEADING.split(done.stdout)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        (section,) = (s for s in elf.sections if s.name == TEXT + name)
        code = sass.words(elf.bytes_of(section))
        labels: dict[str, int] = {}
        jumps: list[tuple[str, int, str]] = []
        waiting: list[str] = []
        for line in body.splitlines():
            if label := re.match(r"^\s*(\.L_x_\d+):", line):
                waiting.append(label[1])
            elif instruction := re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*)", line):
                at = int(instruction[1], 16)
                labels |= dict.fromkeys(waiting, at)
                waiting = []
                if jump := re.search(r"\b(BRA|BSSY)\b.*`\((\.L_x_\d+)\)", instruction[2]):
                    jumps.append((jump[1], at, jump[2]))
        for kind, at, label in jumps:
            found = (sass.branch_targets if kind == "BRA" else sass.near_targets)(code, np.array([at // 16]))
            assert int(found[0]) == labels[label], (name, kind, at)
            seen += 1
    assert seen > 50


def test_predicates_are_carried_over_when_an_exit_has_two(tmp_path: pathlib.Path) -> None:
    at = place_of_exit("plain")
    original = changed(new_cubin("plain"), "plain", at, 0x000000000000A94D, 0x000FEA0005800000)
    spliced = splice_cubin(original, entry=True, exit=True)
    assert disassembled(original, tmp_path / "a.cubin")["plain"][at][0] == "@!P2 EXIT !P3"
    assert disassembled(spliced.cubin, tmp_path / "a.cubin")["plain"][at][0].startswith("@!P2 BRA !P3, `(")
    check_disassembly(original, spliced, tmp_path / "a.cubin")


def test_proof_refuses_every_changed_byte_of_code_when_it_is_not_the_address() -> None:
    original = new_cubin("leaves_in_a_loop")
    spliced = splice_cubin(original, entry=True, exit=True)
    filled = fill(spliced.cubin, spliced.slots, ADDRESS)
    assert proves_original(original, filled)
    elf = read_cubin(filled)
    (section,) = (s for s in elf.sections if s.name == TEXT + "leaves_in_a_loop")
    free = {slot.offset + byte for slot in spliced.slots for byte in range(4, 8)}
    for place in range(section.offset, section.end):
        broken = bytearray(filled)
        broken[place] ^= 0x10
        assert proves_original(original, bytes(broken)) == (place in free), place - section.offset


def test_proof_refuses_what_is_no_copy_when_other_parts_differ() -> None:
    original = new_cubin("table_of_branches")
    spliced = splice_cubin(original, entry=True, exit=True).cubin
    elf = read_cubin(spliced)
    kept = [
        s for s in elf.sections if s.end > s.offset and not s.name.startswith((TEXT, ".nv.info"))
    ]
    assert len(kept) > 5
    for section in kept:
        broken = bytearray(spliced)
        broken[section.offset] ^= 1
        assert not proves_original(original, bytes(broken)), section.name
    assert not proves_original(original, new_cubin("plain"))
    assert not proves_original(original, spliced[:-8])
    assert proves_original(original, original)


STATEMENTS = ["exit offsets", "registers", "registers of a section", "type of a segment", "address of a segment", "alignment of a segment", "entry size"]


@pytest.mark.parametrize("what", STATEMENTS)
def test_proof_refuses_what_is_stated_of_a_kernel_when_it_is_not_what_its_hooks_need(what: str) -> None:
    original = bytearray(new_cubin("one_thread"))
    (section,) = (s for s in read_cubin(bytes(original)).sections if s.name == TEXT + "one_thread")
    stated = read_facts(bytes(original)).registers["one_thread"]
    struct.pack_into("<I", original, section.header_offset + 44, section.info | stated << 24)
    spliced = splice_cubin(bytes(original), entry=True, exit=True)
    elf, broken = read_cubin(spliced.cubin), bytearray(spliced.cubin)
    assert first_difference(bytes(original), spliced.cubin) is None
    if "offsets" in what or what == "registers":
        wanted = 0x1C if "offsets" in what else 0x2F
        found = [(s, a) for s in elf.sections if s.name.startswith(".nv.info") for a in read_attributes(elf, s) if a.code == wanted]
        assert found
        for info, attribute in found:
            assert info.name == ".nv.info" + ".one_thread" * (wanted == 0x1C)
            broken[attribute.offset + attribute.size - 4] ^= 1
    elif "segment" in what:
        at = {"type": 0, "address": 16, "alignment": 48}[what.split(maxsplit=1)[0]]
        broken[elf.segments[1].header_offset + at] ^= 1
    else:
        broken[elf.sections[section.index].header_offset + (56 if "size" in what else 47)] ^= 1
    assert first_difference(bytes(original), bytes(broken)) is not None


def test_what_is_hooked_is_proven_when_the_file_was_damaged_before() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    original = new_cubin("table_of_branches")
    hooked = 0
    for _ in range(600):
        broken = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            spliced = splice_cubin(bytes(broken), entry=True, exit=True)
        except ImageRefused:
            continue
        difference = first_difference(bytes(broken), spliced.cubin)
        assert difference is None
        hooked += spliced.cubin != broken
    assert hooked > 50


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("shorter segment", -16), "within .text."),
        (("alignment", 4096), "alignment of 4096"),
        (("sh_info", 40 << 24), "states"),
        (("symbol", 16), "at 16 of a section"),
    ],
)
def test_kernel_is_left_alone_when_the_file_around_it_is_unusual(change: tuple[str, int], reason: str) -> None:
    original = new_cubin("plain")
    elf = read_cubin(original)
    (section,) = (s for s in elf.sections if s.name == TEXT + "plain")
    (symbol,) = (s for s in elf.symbols if s.is_kernel)
    data, (what, value) = bytearray(original), change
    if what == "shorter segment":
        segment = next(s for s in elf.segments if s.offset + s.file_bytes == section.end)
        struct.pack_into("<Q", data, segment.header_offset + 32, segment.file_bytes + value)
    elif what == "alignment":
        struct.pack_into("<Q", data, section.header_offset + 48, value)
    elif what == "sh_info":
        struct.pack_into("<I", data, section.header_offset + 44, section.info | value)
    else:
        struct.pack_into("<Q", data, symbol.offset + 8, value)
    spliced = splice_cubin(bytes(data), entry=True, exit=True)
    assert spliced.cubin == data
    assert reason in spliced.kernels[0].reason


def test_registers_are_raised_in_both_places_when_a_section_states_them_too() -> None:
    data = bytearray(new_cubin("one_thread"))
    elf = read_cubin(bytes(data))
    (section,) = (s for s in elf.sections if s.name == TEXT + "one_thread")
    stated = read_facts(bytes(data)).registers["one_thread"]
    struct.pack_into("<I", data, section.header_offset + 44, section.info | stated << 24)
    spliced = splice_cubin(bytes(data), entry=True, exit=True)
    after = read_cubin(spliced.cubin)
    assert after.sections[section.index].info >> 24 == spliced.kernels[0].registers > stated
    assert proves_original(bytes(data), spliced.cubin)


def test_exits_are_judged_by_queue_when_a_later_scoreboard_tells_of_them() -> None:
    loose, told = (0x0000000300027308, 0x000FE20000001400), (0x0000000500047308, 0x000E220000001400)
    leave, plain = (
        (0x000000000000794D, 0x000FEA0003800000),
        (0x0000000000007918, 0x000FC00000000000),
    )

    def judged(*instructions: tuple[int, int]) -> str | None:
        code = np.array(instructions, dtype=np.uint64)
        return refuse_exit(code, sass.opcodes(code))

    assert judged(plain, told, leave) is None
    assert judged(loose, told, leave) is None
    assert "may still read" in str(judged(told, loose, leave))
    assert "may still read" in str(judged(loose, leave, told, leave))
    assert judged(plain) == "it has no EXIT"


def test_rewriting_keeps_its_pace_when_a_large_file_is_hooked() -> None:
    original = zstandard.decompress(next(p for p in CORPUS if "cuda118" in p.name).read_bytes())
    best = min(_seconds(lambda: splice_cubin(original, entry=True, exit=True)) for _ in range(3))
    assert len(original) / best > 5e6, (
        "a quarter of what is aimed at: machines that run tests are busy"
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

"""Store marks in machine code, without a GPU.

Invariants: the shipped pieces are what the pinned compiler makes, and write no predicate, no uniform register and no register of the
kernel's, nor one of those that the hardware keeps; the marked byte is that of the store's page for every address inside the window,
and a spare byte of the control block for every other; the stores that are marked are those that the vendor's disassembler shows; each
instruction of the kernel is kept, at its place or in a trampoline, which leads back; a kernel whose stores cannot all be followed, or
that has no room, is left alone with the reason; the proof refuses whatever else differs. No kernel of the scenarios on a GPU waits for
ever because of how they begin or of what marks add, and one that does not end is named.
"""

from __future__ import annotations

import itertools
import math
import pathlib
import random
import re
import struct
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
pytest.importorskip("triton", reason="triton is not installed: its wheel has assembler and disassembler")

import zstandard
from cuda.bindings import driver
from hook_stage import Hangs, wait_for
from splice_kernels import BY_NAME, KERNELS, LEFT, Kernel, compiled, new_cubin, old_cubin

from concordia import abi
from concordia.device.cuda_call import CudaError
from concordia.device.nvrtc import link_cubin
from concordia.instrument import sass, sass_calls, sass_mark_code, sass_marks
from concordia.instrument.elf import ATTRIBUTE_REGISTERS, INFO, TEXT, read_attributes, read_cubin
from concordia.instrument.options import Options
from concordia.instrument.proof import first_difference
from concordia.instrument.proof_statements import stated_registers
from concordia.instrument.report import Hook, KernelReport, fill
from concordia.instrument.rewrite import rewrite
from concordia.instrument.sass_mark_code import mark_code, renamed
from concordia.instrument.sass_registers import FIELDS, LOADS, STORES, opcode_of, width_of
from concordia.instrument.sass_stores import StoreSite, find_stores, may_wait_for_others
from concordia.instrument.sass_trampoline import leading, mark_registers, trampoline, trampolines
from concordia.instrument.splice import Spliced, splice_cubin
from ptx_assembler import assemble
from ptx_forms import FILE, FORMS, GENERIC, GENERIC_RANGE, KERNEL, MARK, NOTHING, RANGE, WHOLE
from ptx_generator import Program, module
from sass_machine import Thread
from test_instrument_splice import disassembled

CORPUS = sorted((pathlib.Path(__file__).parent / "corpus" / "cubin").glob("*.zst"))
ADDRESS = 0x7F12_3456_0000
SHIFT = 16
BASE = 40  # first register of a mark
MULTIPROCESSORS = 132  # of an H200
STORE = re.compile(r"^(?:@!?P\d\s+)?(STG|ST|ATOMG|ATOM|REDG|RED)[. ]")
REGISTER = re.compile(r"\bR(\d+)\b")
CONTROL, MAP = 0x7F00_1234_0000, 0x7F77_FFFF_FF00  # the map's addresses carry into the high word


def unpacked(path: pathlib.Path) -> bytes:
    return zstandard.ZstdDecompressor().decompress(path.read_bytes(), max_output_size=1 << 26)


def linked(text: str, architecture: str = "sm_90", registers: int = 128) -> bytes:
    return link_cubin([text.encode()], name="marks", architecture=architecture, registers_max=registers)


def cuda(body: str, *, attributes: str = "", signature: str = "unsigned* p, unsigned n", registers: int = 128) -> bytes:
    """One kernel of this body."""
    text = f'extern "C" __global__ void {attributes} kernel({signature}) {{ {body} }}'
    return link_cubin([compiled(text)], name="marks", architecture="sm_90", registers_max=registers)


def marked(cubin: bytes, *, entry: bool = False, leaving: bool = False) -> Spliced:
    """With marks, proven."""
    spliced = splice_cubin(cubin, entry=entry, exit=leaving, marks=SHIFT)
    assert first_difference(cubin, spliced.cubin, SHIFT) is None
    return spliced


def check_disassembly(original: bytes, spliced: Spliced, path: pathlib.Path) -> Counter[str]:
    """Every instruction is kept, and stores are the disassembler's; how many are marked, by kernel."""
    before, after = disassembled(original, path), disassembled(fill(spliced.cubin, spliced.slots, ADDRESS), path)
    hooks = {kernel.name: kernel.hooks for kernel in spliced.kernels}
    elf = read_cubin(fill(spliced.cubin, spliced.slots, ADDRESS))
    stated = stated_registers(elf)
    count: Counter[str] = Counter()
    for name, instructions in before.items():
        (section,) = (s for s in elf.sections if s.name == TEXT + name)
        code = sass.words(elf.bytes_of(section))
        has_marks = Hook.MARKS in hooks.get(name, Hook(0))
        if has_marks:
            assert highest_register(after[name]) < stated[section.index] - sass.REGISTERS_KEPT, name
        for at, (words, low, high) in instructions.items():
            now = after[name][at]
            if has_marks and STORE.match(words):
                count[name] += 1
                assert now[0].startswith("BRA `(")
                check_trampoline(after[name], code, at, words)
            elif now[1:] != (low, high):
                assert has_marks
                assert STORE.match(instructions[at + 16][0])
                assert now[0] == words.replace(".reuse", ""), (name, at)
    return count


def highest_register(instructions: dict[int, tuple[str, int, int]]) -> int:
    """Of a pair or four, the first one."""
    return max(int(number) for words, _, _ in instructions.values() for number in REGISTER.findall(words))


def check_trampoline(after: dict[int, tuple[str, int, int]], code: sass.Words, at: int, words: str) -> None:
    """The store is in it, under its guard, and it leads back."""
    begin = int(sass.branch_targets(code, np.array([at // 16]))[0])
    block = [after[place][0] for place in range(begin, begin + 16 * 40, 16) if place in after]
    end = next(index for index, found in enumerate(block) if found.startswith("BRA"))
    assert int(sass.branch_targets(code, np.array([begin // 16 + end]))[0]) == at + 16
    stores = [found for found in block[:end] if STORE.match(found)]
    assert stores[0] == words.replace(".reuse", "")
    assert len(stores) == 2
    assert "STG.E.U8" in stores[1]
    guard = words.split(maxsplit=1)[0] if words.startswith("@") else ""
    # the sum, the store, and the mark's loads and store; but where the store may write its own guard
    ours = 2 + 1 + 3 * (not re.search(r"ATOMG?\.\S+ P\d", words))
    assert [found.split(maxsplit=1)[0] for found in block[:end] if found.startswith("@")] == [guard] * ours * bool(guard)


@pytest.fixture(scope="module")
def fresh() -> sass_mark_code.MarkCode:
    return sass_mark_code.compile_marks()


def test_shipped_pieces_are_the_compiler_s_own_when_compiled_afresh(fresh: sass_mark_code.MarkCode) -> None:
    assert fresh == mark_code(), "run: python -m concordia.instrument.sass_mark_code"


@pytest.mark.parametrize("descriptor", [None, 6, 62])
@pytest.mark.parametrize("base", [4, 24, 240])
def test_pieces_name_their_own_registers_alone_when_moved(descriptor: int | None, base: int, tmp_path: pathlib.Path) -> None:
    piece = mark_code().mark(descriptor)
    code = renamed(piece.code, {number: base + number for number in range(piece.registers)}, descriptor or 0)
    before, after = in_place_of_a_kernel(piece.code, tmp_path), in_place_of_a_kernel(code, tmp_path)
    for old, new in zip(before, after, strict=True):
        moved = REGISTER.sub(lambda found: f"R{int(found[1]) + base}", old)
        assert moved.replace("desc[UR0]", f"desc[UR{descriptor}]") == new
        assert not re.search(r"\bU?P\d", new), "a predicate"
        assert max(map(int, REGISTER.findall(new))) < base + piece.registers == base + mark_registers()
        assert min(map(int, REGISTER.findall(new))) >= base
        assert not re.search(r"\bUR\d", new.replace(f"desc[UR{descriptor}]", "")), "a uniform register"


@pytest.mark.parametrize("descriptor", [None, 6])
def test_no_register_is_read_or_written_before_it_may_be(descriptor: int | None) -> None:
    """What a load brings is waited for; seams between pieces are wide; the next mark waits until this one's store has read its registers."""
    piece = mark_code().mark(descriptor)
    under_way: dict[int, int] = {}
    for at in range(0, len(piece.code), 16):
        low, high = struct.unpack_from("<QQ", piece.code, at)
        waits = high >> sass.WAIT_SHIFT & 0x3F
        under_way = {register: board for register, board in under_way.items() if not waits >> board & 1}
        fields = FIELDS[opcode_of(low, high)]
        places = {"A": low >> 24, "B": low >> 32, "C": high, "d": low >> 16}
        widths = {(places[field] & 0xFF, width_of(opcode_of(low, high), field, high)) for field in fields if field in places}
        named = {register + more for register, width in widths if register != 255 for more in range(width)}
        assert not under_way.keys() & named, at
        if opcode_of(low, high) in LOADS:
            board = high >> sass.WRITE_SHIFT & 7
            assert board != sass.SCOREBOARD_NONE
            under_way |= {(low >> 16 & 0xFF) + more: board for more in range({5: 2, 6: 4}[high >> 9 & 7])}
    assert not under_way
    store = struct.unpack_from("<QQ", piece.code, len(piece.code) - 16)
    assert opcode_of(*store) in STORES
    board = store[1] >> sass.READ_SHIFT & 7
    found = site(10, 8, descriptor=descriptor)
    _, high = struct.unpack("<QQ", leading(found, 0x1000))
    assert high >> sass.WAIT_SHIFT & 0x3F == 1 << board | found.high >> sass.WAIT_SHIFT & 0x3F
    code, control = trampoline(found, BASE, SHIFT)
    seams = [*range(0, 48, 16), control - 32, control, control + 16, len(code) - 16]
    assert all(struct.unpack_from("<Q", code, at + 8)[0] >> sass.CONTROL_SHIFT & 0x1F == 15 for at in seams), "fifteen cycles"


def in_place_of_a_kernel(code: bytes, path: pathlib.Path) -> list[str]:
    """The instructions as the vendor reads them, in a kernel that is long enough."""
    cubin = bytearray(new_cubin("leaves_in_a_loop"))
    (section,) = (s for s in read_cubin(bytes(cubin)).sections if s.name.startswith(TEXT))
    assert len(code) <= section.size
    cubin[section.offset : section.offset + len(code)] = code
    (found,) = disassembled(bytes(cubin), path / "moved.cubin").values()
    return [found[at][0] for at in range(0, len(code), 16)]


def site(register: int, offset: int, *, guard: int = 7, descriptor: int | None = 4) -> StoreSite:
    low = 0x986 | guard << 12 | register << 24 | (offset & 0xFFFFFF) << 40
    return StoreSite(0x100, low, 0x0C101904, descriptor)


@pytest.mark.parametrize("descriptor", [4, None])
def test_marked_byte_is_that_of_the_page_when_addresses_are_anywhere(descriptor: int | None) -> None:
    """A page is 32 bits of the address less 32 bits of the window's begin: exact inside the window, and never beyond the map."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    page = 1 << SHIFT
    for _ in range(3000):
        first = rng.choice([0x7F40_0000_0000, rng.randrange(1 << 24, 1 << 47), 0x1_0000_0000, (1 << 47) - (1 << 38)]) >> SHIFT << SHIFT
        size = rng.choice([0, page, 7 * page, rng.randrange(1 << 22) << SHIFT, 1 << 38])
        if first + size > 1 << 47:
            continue
        edge = rng.choice([first, first + size, first + size // 2])
        address = rng.choice([edge + rng.randrange(-20, 20), edge + rng.randrange(-(1 << 30), 1 << 30), rng.randrange(1 << 47), 0])
        address = min(max(address, 0), (1 << 47) - 1)
        offset = rng.choice([0, 4, -4, rng.randrange(-(1 << 23), 1 << 23)])
        register = address - offset & (1 << 64) - 1
        stores = rng.random() < 0.8
        guard = rng.choice([0, 3, 9]) if not stores else rng.choice([7, 0, 9])
        found = run(site(10, offset, guard=guard, descriptor=descriptor), register, first, size, stores=stores)
        if not stores:
            assert found is None, "no descriptor is used where no lane stores"
        elif first <= address < first + size:
            assert found == MAP + (address - first >> SHIFT)
        else:
            assert found is not None
            assert CONTROL + abi.CONTROL_SPARE_OFFSET <= found < CONTROL + abi.CONTROL_ALLOCATED_BYTES


@pytest.mark.parametrize("shift", [12, 20, 30])
def test_marked_byte_is_that_of_the_page_when_pages_have_another_size(shift: int) -> None:
    first, pages = 5 << 30 + 2, 9
    for page, offset in itertools.product(range(-2, pages + 2), (0, (1 << shift) - 1)):
        found = run(site(10, 0), first + (page << shift) + offset, first, pages << shift, shift=shift)
        assert (found == MAP + page) == (0 <= page < pages)


def run(store: StoreSite, register: int, first: int, size: int, *, stores: bool = True, shift: int = SHIFT) -> int | None:
    """Where a mark's byte goes, if anywhere."""
    code, control = trampoline(store, BASE, shift)
    filled = bytearray(code)
    filled[control + 4 : control + 8] = (CONTROL & 0xFFFFFFFF).to_bytes(4, "little")
    filled[control + 20 : control + 24] = (CONTROL >> 32).to_bytes(4, "little")
    offsets = abi.CONTROL.offsets()
    words = {"window_base": first, "window_bytes": size, "map": MAP if size else 0}
    thread = Thread(
        registers={10: register & 0xFFFFFFFF, 11: register >> 32} | dict.fromkeys(range(BASE, BASE + mark_registers()), 0xDEADBEEF),
        memory={CONTROL + offsets[name]: value for name, value in words.items()},
        predicate=stores,
    )
    thread.run(bytes(filled), skip=control - 16)
    assert [value for _, value in thread.stored] == [1] * stores
    assert (thread.registers[10], thread.registers[11]) == (register & 0xFFFFFFFF, register >> 32)
    assert all(number in (10, 11) or BASE <= number < BASE + mark_registers() for number in thread.registers)
    return thread.stored[0][0] if stores else None


def test_mark_needs_neither_guard_nor_descriptor_when_its_atomic_may_write_its_guard() -> None:
    plain = StoreSite(0x100, 0x9A8 | 3 << 12 | 10 << 24, 0x0C1EE904 | 1 << 27, 4)
    telling = replace(plain, high=plain.high & ~(7 << 17) | 3 << 17)
    assert (plain.writes_predicate, telling.writes_predicate) == (False, True)
    marks = []
    for store in (plain, telling):
        code, control = trampoline(store, BASE, SHIFT)
        marks.append([struct.unpack_from("<QQ", code, at) for at in range(control + 32, len(code), 16)])
    guards = [{low >> 12 & 0xF for low, high in found if opcode_of(low, high) in (*LOADS, *STORES)} for found in marks]
    assert guards == [{3}, {7}]
    described = [[opcode_of(low, high) >> 12 for low, high in found if opcode_of(low, high) in (*LOADS, *STORES)] for found in marks]
    assert (set(described[0]), set(described[1])) == ({1}, {0})


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name.partition(".")[0])
def test_shipped_kernel_keeps_its_instructions_when_its_stores_are_marked(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    original = unpacked(path)
    spliced = marked(original)
    by_marks = check_disassembly(original, spliced, tmp_path / "a.cubin").total()
    assert len(spliced.slots) == 2 * by_marks
    for kernel in spliced.kernels:
        assert Hook.MARKS in kernel.hooks or "marks: " in kernel.reason, kernel
    both = marked(original, entry=True, leaving=True)
    hooked = sum((kernel.hooks & (Hook.ENTRY | Hook.EXIT)).bit_count() for kernel in both.kernels)
    assert len(both.slots) == 2 * (by_marks + hooked)


@pytest.mark.parametrize("maker", [old_cubin, new_cubin], ids=["V1", "V2"])
def test_compiled_kernels_keep_their_instructions_when_their_stores_are_marked(maker: type, tmp_path: pathlib.Path) -> None:
    original = maker()
    spliced = marked(original)
    assert check_disassembly(original, spliced, tmp_path / "a.cubin").total() >= 20
    left = {kernel.name: kernel.reason for kernel in spliced.kernels if Hook.MARKS not in kernel.hooks}
    assert all(reason.startswith("marks: ") for reason in left.values())
    assert "it changes how many registers" in left["fewer_registers_than_before"]


def test_random_kernels_keep_their_instructions_when_their_stores_are_marked(tmp_path: pathlib.Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    original = linked(module([Program.random(f"kernel_{n}", seed + n) for n in range(30)], "sm_90"))
    spliced = marked(original)
    assert check_disassembly(original, spliced, tmp_path / "a.cubin").total() >= 50
    left = [kernel.reason for kernel in spliced.kernels if Hook.MARKS not in kernel.hooks]
    known = "it may wait for other CTAs", "it may call functions of their own", "a store of a form that is not known"
    assert all(reason.removeprefix("marks: ").startswith(known) for reason in left), left


THROUGH_MAPS = """.version 9.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 p, .param .align 64 .b8 m[128]) {
 .reg .u64 %p1, %m1; .reg .u32 %r, %s; .shared .align 128 .b8 shared[1024];
 ld.param.u64 %p1, [p]; mov.b64 %m1, m; cvta.param.u64 %m1, %m1; mov.u32 %r, 0; mov.u32 %s, shared;
 TAKES
 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%m1, {%r, %r}], [%s];
 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%p1, {%r, %r}], [%s];
 cp.async.bulk.commit_group; ret; }
"""


def test_kernel_is_left_alone_when_it_takes_over_a_tensor_map_that_the_device_made() -> None:
    (kernel,) = marked(linked(THROUGH_MAPS.replace("TAKES", "prefetch.tensormap [%p1];"), "sm_90a")).kernels
    assert kernel.hooks == Hook.MARKS | Hook.WHOLE_REGION
    (kernel,) = marked(linked(THROUGH_MAPS.replace("TAKES", "fence.proxy.tensormap::generic.acquire.gpu [%p1], 128;"), "sm_90a")).kernels
    assert Hook.MARKS not in kernel.hooks
    assert "it uses a tensor map that the device makes" in kernel.reason


HIDDEN = ("multimem.st", "multimem.red")  # compile to a plain store
FREE = ("discard", "fence", "multimem.ld_reduce", "tensormap", "/*")
OUT_OF_SIGHT = ("st.mmio.relaxed.sys.global.u32 [%rd2]", "st.shared::cluster.u32")  # their address is in uniform registers


ON_HOPPER = [(form[0], form[2]) for form in FORMS if "sm_90a" in form[1]]


@pytest.fixture(scope="module")
def every_form(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[KernelReport, int]]:
    """The report of each form, and how many of its stores are marked."""
    kernels = [KERNEL.format(name=f"form_{number}", instruction=form[0]) for number, form in enumerate(ON_HOPPER)]
    original = linked(FILE.format(target="sm_90a") + "".join(kernels), "sm_90a")
    spliced = marked(original)
    path = tmp_path_factory.mktemp("forms") / "a.cubin"
    counts = check_disassembly(original, spliced, path)
    reports = {kernel.name: kernel for kernel in spliced.kernels}
    return [(reports[f"form_{number}"], counts[f"form_{number}"]) for number in range(len(ON_HOPPER))]


@pytest.mark.parametrize("number", range(len(ON_HOPPER)), ids=[re.sub(r"[^a-z0-9_.]+", "-", form[0][:40]) for form in ON_HOPPER])
def test_every_form_of_store_is_marked_or_refused_when_compiled(number: int, every_form: list[tuple[KernelReport, int]]) -> None:
    (instruction, does), (kernel, count) = ON_HOPPER[number], every_form[number]
    if does == RANGE and instruction.startswith(("cp.", "@%p1 cp.")):
        assert "it stores in bulk" in kernel.reason
    elif instruction.startswith("discard"):
        assert "it discards memory" in kernel.reason
    elif instruction.startswith("fence") and does != NOTHING:
        assert "it uses a tensor map that the device makes" in kernel.reason
    elif instruction.startswith(OUT_OF_SIGHT):
        assert "a store of a form that is not known" in kernel.reason
    elif "it may wait for other CTAs" in kernel.reason:
        assert instruction.startswith(("red", "atom"))
        assert does in (MARK, GENERIC)
    elif does == WHOLE and not instruction.startswith(HIDDEN):
        assert kernel.hooks == Hook.MARKS | Hook.WHOLE_REGION
    else:
        assert kernel.hooks == Hook.MARKS
        if not instruction.startswith(FREE):
            assert (count > 0) == (does != NOTHING)
        assert does in (MARK, GENERIC, RANGE, GENERIC_RANGE, NOTHING) or instruction.startswith((*HIDDEN, *FREE))


MANY = "unsigned x[40]; for (int i = 0; i < 40; ++i) x[i] = p[threadIdx.x + i * n]; __syncthreads(); for (int i = 0; i < 40; ++i) p[threadIdx.x * 3 + i * n] = x[i] ^ x[39 - i];"


FEW = {"attributes": "__launch_bounds__(128)"}
SPIN = "volatile unsigned* v = p; while (v[1] < n) {} p[threadIdx.x] = n;"
SPIN_BEHIND_FENCES = "while (p[1] < n) __threadfence(); p[0] = n;"
TURN_WITHIN_A_CTA = 'for (unsigned i = 0; i < n; ++i) { p[i] = i; __threadfence_block(); asm volatile("prefetch.global.L2 [%0];" :: "l"(p + i)); } __threadfence();'
SPIN_BY_ATOMICS = "for (;;) if (atomicAdd(p, 0) >= n) break; p[threadIdx.x] = 1;"


@pytest.mark.parametrize(
    ("body", "settings", "reason"),
    [
        (MANY, {"registers": 255}, "registers of 1024 threads: a mark needs 18 more"),
        (MANY, {"registers": 64}, "64 registers of 64: a mark needs 16 more"),
        (MANY, FEW, ""),
        (SPIN, {}, ""),
        (SPIN + MANY, FEW, "it may wait for other CTAs"),
        (SPIN_BEHIND_FENCES, {}, ""),
        (SPIN_BEHIND_FENCES + MANY, FEW, "it may wait for other CTAs"),
        (TURN_WITHIN_A_CTA + MANY, FEW, ""),
        (SPIN_BY_ATOMICS + MANY, FEW, "it may wait for other CTAs"),
        ("for (unsigned i = 0; i < n; ++i) atomicAdd(p + i, 1);" + MANY, FEW, ""),
        ("for (unsigned i = 0; i < n; ++i) atomicAdd(p + i, 1);", {}, ""),
        ("if (n) p[threadIdx.x] = 1;", {}, ""),
        ("surf1Dwrite(n, (cudaSurfaceObject_t)p, 4);", {}, "it may write surfaces"),
    ],
    ids=["many", "many_of_few_allowed", "many_of_few", "spins", "spins_with_many", "spins_behind_fences", "spins_behind_fences_with_many", "fences_with_many", "spins_by_atomics_with_many", "adds_with_many", "adds", "plain", "surface"],
)
def test_kernel_is_marked_or_left_alone_with_the_reason_when_of_this_form(body: str, settings: dict[str, Any], reason: str) -> None:
    if "surf" in body:
        original = linked(FILE.format(target="sm_90") + KERNEL.format(name="form", instruction="sust.b.1d.b32.trap [%rd1, {%r1}], %r2;"))
    else:
        original = cuda(body, **settings)
    spliced = marked(original)
    (kernel,) = spliced.kernels
    assert (Hook.MARKS in kernel.hooks) == (not reason), kernel
    assert reason in kernel.reason
    if not reason:
        assert kernel.registers >= read_registers(original) + mark_registers() + sass.REGISTERS_KEPT


def test_kernel_may_wait_for_others_when_a_function_looks_and_its_caller_turns(tmp_path: pathlib.Path) -> None:
    text = """.version 8.0
.target sm_90
.address_size 64
.func (.param .b32 r) look(.param .b64 p) { .reg .b64 %q; .reg .b32 %v; ld.param.u64 %q, [p]; atom.global.add.u32 %v, [%q], 0; st.param.b32 [r], %v; ret; }
.visible .entry kernel(.param .u64 a, .param .u32 n) {
 .reg .b64 %q; .reg .b32 %v, %n; .reg .pred %p; ld.param.u64 %q, [a]; ld.param.u32 %n, [n];
AGAIN: { .param .b64 p; .param .b32 r; st.param.b64 [p], %q; call (r), look, (p); ld.param.b32 %v, [r]; }
 setp.lt.u32 %p, %v, %n; @%p bra AGAIN; ret; }
"""
    assert not assemble(text, "sm_90", tmp_path)
    elf = read_cubin((tmp_path / "out").read_bytes())
    (section,) = (s for s in elf.sections if s.name.startswith(TEXT))
    code = sass.words(elf.bytes_of(section))
    assert may_wait_for_others(code, sass.opcodes(code))


@pytest.mark.parametrize("maker", [old_cubin, new_cubin])
def test_kernel_is_left_alone_when_its_warps_change_their_registers_whoever_waits(maker: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp that asks for registers waits until the CTA's others gave enough of what all begin with: a sum that no mark may change."""
    monkeypatch.setattr(sass_marks, "may_wait_for_others", lambda *_: False)
    name = "fewer_registers_than_before"
    (kernel,) = marked(maker(name), entry=True).kernels
    assert kernel.hooks == Hook.ENTRY
    assert [kernel.registers] == list(stated_registers(read_cubin(maker(name))).values())
    assert kernel.reason == LEFT[name]


@pytest.mark.parametrize("maker", [old_cubin, new_cubin])
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_hooked_kernel_is_marked_and_its_ctas_fit_when_they_wait_for_each_other(case: Kernel, maker: type) -> None:
    (kernel,) = marked(maker(case.name), entry=True, leaving=True).kernels
    assert (Hook.MARKS in kernel.hooks) == (case.name not in LEFT)
    assert case.name not in LEFT or kernel.reason.endswith(LEFT[case.name])
    threads = math.prod(case.block)
    granted = -(-kernel.registers // 8) * 8
    warps_at_a_time = min(16384 // 32 // granted, 16) * 4
    ctas_at_a_time = MULTIPROCESSORS * (warps_at_a_time // -(-threads // 32))
    assert case.launch != "cooperative" or case.cta_count <= ctas_at_a_time


def test_no_cta_waits_for_ever_when_the_scenario_begins_its_output() -> None:
    """The CTAs of whole_grid_waits count each other, and each waits for the next multiple of their number."""
    case = BY_NAME["whole_grid_waits"]
    inputs = np.random.default_rng(case.words).integers(0, 1 << 32, case.words, dtype=np.uint32)

    def waits(first: int) -> int:
        last = first + case.cta_count
        return sum(last < ((first + turn) // case.cta_count + 1) * case.cta_count for turn in range(case.cta_count))

    assert waits(int(case.begin(inputs)[case.count])) == 0
    assert waits(int(inputs[::-1][case.count])) > 0, "what the scenario must not begin with"
    changed = np.flatnonzero(case.begin(inputs) != inputs[::-1])
    assert changed.tolist() == [case.count]


def test_kernel_that_does_not_end_is_named_when_its_wait_is_over() -> None:
    codes = driver.CUresult
    waiting, done, lost = codes.CUDA_ERROR_NOT_READY, codes.CUDA_SUCCESS, codes.CUDA_ERROR_ILLEGAL_INSTRUCTION

    def answers(*found: Any) -> SimpleNamespace:
        left = iter(found)
        return SimpleNamespace(CUresult=codes, cuStreamQuery=lambda _stream: (next(left, waiting),))

    wait_for(answers(waiting, waiting, done), 0, "a kernel")
    with pytest.raises(Hangs, match=r"^a kernel V1 did not end within 0\.05 s$"):
        wait_for(answers(), 0, "a kernel V1", bound_s=0.05)
    with pytest.raises(CudaError, match="wait for a kernel: CUDA_ERROR_ILLEGAL_INSTRUCTION"):
        wait_for(answers(waiting, lost), 0, "a kernel")
    # A scenario that goes on with the next kernel after these would wait for ever.
    assert not issubclass(Hangs, (AssertionError, RuntimeError))


def read_registers(cubin: bytes) -> int:
    return splice_cubin(cubin, entry=False, exit=False, marks=None, skip={"kernel": "-"}).kernels[0].registers or 1


def test_kernel_that_calls_functions_of_their_own_is_left_alone() -> None:
    text = """.version 9.0
.target sm_90
.address_size 64
.visible .func other(.param .u64 q) { .reg .u64 %r1; ld.param.u64 %r1, [q]; st.u32 [%r1], 1; ret; }
.visible .global .u64 table[1] = {other};
.visible .entry kernel(.param .u64 p) {
 .reg .u64 %p1, %f; ld.param.u64 %p1, [p]; ld.global.u64 %f, [table];
 { .param .u64 a; st.param.u64 [a], %p1; kind: .callprototype _ (.param .u64 _); call %f, (a), kind; }
 ret; }
"""
    (kernel,) = marked(linked(text)).kernels
    assert "functions of their own" in kernel.reason


def test_kernel_that_calls_the_driver_is_marked_when_it_is_known_what_it_writes() -> None:
    prints = 'extern "C" int printf(const char*, ...); extern "C" __global__ void kernel(unsigned* p, unsigned n) { p[threadIdx.x] = n; if (n > 9) printf("%u", n); }'
    (kernel,) = marked(linked(compiled(prints).decode())).kernels
    assert Hook.MARKS in kernel.hooks, kernel
    text = """.version 9.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 p) {
 .reg .u64 %p1, %f; ld.param.u64 %p1, [p]; ld.global.u64 %f, [%p1];
 { .param .u64 a; st.param.u64 [a], %p1; kind: .callprototype _ (.param .u64 _); call %f, (a), kind; }
 ret; }
"""
    (kernel,) = marked(linked(text)).kernels
    assert "it calls through a pointer" in kernel.reason


def test_kernel_that_calls_the_driver_and_a_pointer_is_left_alone() -> None:
    text = """.version 9.0
.target sm_90
.address_size 64
.extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e) .noreturn;
.visible .entry kernel(.param .u64 p, .param .u64 f) {
 .reg .u64 %p1, %f; .reg .u32 %r; .reg .pred %q; ld.param.u64 %p1, [p]; ld.param.u64 %f, [f]; ld.global.u32 %r, [%p1];
 setp.ne.u32 %q, %r, 77; @%q bra GOOD;
 { .param .b64 a; .param .b64 b; .param .b32 c; .param .b64 d; .param .b64 e;
 st.param.b64 [a], %p1; st.param.b64 [b], %p1; st.param.b32 [c], 1; st.param.b64 [d], %p1; st.param.b64 [e], 1; call.uni __assertfail, (a, b, c, d, e); }
GOOD:
 CALL
 st.global.u32 [%p1], 5; ret; }
"""
    through = "{ .param .u64 a; st.param.u64 [a], %p1; kind: .callprototype _ (.param .u64 _); call %f, (a), kind; }"
    (kernel,) = marked(linked(text.replace("CALL", ""))).kernels
    assert Hook.MARKS in kernel.hooks, kernel
    (kernel,) = marked(linked(text.replace("CALL", through))).kernels
    assert "it calls through a pointer" in kernel.reason


LOAD_PAIR = (0x0100000000027B82, 0x000E240000000A00)  # LDC.64 R2, c[0x4][R0]
CALL_BY_PAIR = (0x0000000002007343, 0x000FEA0003C00000)
ADD = 0x7210  # IADD3, but for its registers


@pytest.mark.parametrize(
    ("code", "is_unknown"),
    [
        ([LOAD_PAIR, CALL_BY_PAIR], False),
        ([LOAD_PAIR, (ADD | 5 << 16, 0), (ADD | 1 << 16, 0), CALL_BY_PAIR], False),
        ([LOAD_PAIR, (ADD | 2 << 16, 0), CALL_BY_PAIR], True),
        ([LOAD_PAIR, (ADD | 3 << 16, 0), CALL_BY_PAIR], True),
        ([LOAD_PAIR, (0x7381 | 0 << 16, 0xC00), CALL_BY_PAIR], True),  # LDG.128 R0
        ([LOAD_PAIR, CALL_BY_PAIR, CALL_BY_PAIR], True),
        ([LOAD_PAIR, (0x7944, 0), CALL_BY_PAIR], True),
        ([LOAD_PAIR, (ADD | 9 << 16, 0), CALL_BY_PAIR, struct.unpack("<QQ", sass.branch(0x30, 0x10))], True),
        ([LOAD_PAIR, struct.unpack("<QQ", sass.branch(0x10, 0x20)), CALL_BY_PAIR], True),
        ([(LOAD_PAIR[0] ^ 0x7000, LOAD_PAIR[1]), CALL_BY_PAIR], True),
        ([(LOAD_PAIR[0] ^ 1 << 56, LOAD_PAIR[1]), CALL_BY_PAIR], True),
        ([(LOAD_PAIR[0], 0x800), CALL_BY_PAIR], True),
        ([LOAD_PAIR, *[(ADD | 9 << 16, 0)] * 64, CALL_BY_PAIR], True),
        ([CALL_BY_PAIR], True),
        ([LOAD_PAIR, (CALL_BY_PAIR[0] & ~0xFFF | 0x344, 0)], True),
        ([(0x7943, 0)], False),
    ],
)  # fmt: skip
def test_call_by_register_is_the_driver_s_when_the_linker_s_constant_was_loaded_before(code: list[tuple[int, int]], is_unknown: bool) -> None:
    words = sass.words(b"".join(struct.pack("<QQ", *one) for one in code))
    assert sass_calls.leads_anywhere(words, sass.opcodes(words)) == is_unknown


def test_operands_kept_for_a_store_are_forgotten_when_it_moves() -> None:
    """Somewhere in the corpus an instruction before a store keeps an operand."""
    seen = 0
    for path in CORPUS:
        original = unpacked(path)
        elf = read_cubin(original)
        for section in elf.sections:
            if not section.name.startswith(TEXT):
                continue
            raw = bytes(elf.bytes_of(section))
            code = sass.words(raw)
            stores = find_stores(code, sass.opcodes(code))
            if isinstance(stores, str):
                continue
            made = trampolines(stores.sites, raw, at=section.size, base=BASE, page_shift=SHIFT)
            places = {found.at for found in stores.sites}
            changed = {at: instruction for at, instruction in made.patches if at not in places}
            kept = {at - 16 for at in places if at - 16 not in places and raw[at - 1] >> 2 & 7}
            assert changed.keys() == kept
            assert all(instruction == raw[at : at + 15] + bytes([raw[at + 15] & 0xE3]) for at, instruction in changed.items())
            seen += len(kept)
    assert seen


def test_proof_refuses_when_a_byte_of_a_mark_or_of_a_branch_to_it_differs() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    original = cuda("if (n) p[threadIdx.x] = 1; else atomicAdd(p + n, 5);")
    spliced = marked(original)
    slots = {place for slot in spliced.slots for place in range(slot.offset + 4, slot.offset + 8)}
    (section,) = (s for s in read_cubin(spliced.cubin).sections if s.name == TEXT + "kernel")
    (code,) = (s for s in read_cubin(original).sections if s.name == TEXT + "kernel")
    was, now = (image[s.offset : s.offset + code.size] for image, s in ((original, code), (spliced.cubin, section)))
    branches = [at for at in range(0, code.size, 16) if was[at : at + 16] != now[at : at + 16]]
    assert len(branches) >= 2
    bits = [(section.offset + at + bit // 8, bit % 8) for at in branches for bit in range(128)]  # of every branch to a mark
    bits += [(rng.randrange(section.offset, section.end), rng.randrange(8)) for _ in range(400)]
    for at, bit in bits:
        if at in slots:
            continue
        broken = bytearray(spliced.cubin)
        broken[at] ^= 1 << bit
        assert first_difference(original, bytes(broken), SHIFT) is not None, (at, bit)
    assert first_difference(original, spliced.cubin) is not None, "marks that nobody asked for"
    assert first_difference(original, spliced.cubin, SHIFT + 1) is not None, "pages of another size"


@pytest.mark.parametrize("lacking", [1, sass.REGISTERS_KEPT])
def test_proof_refuses_when_a_mark_is_in_registers_that_the_hardware_keeps(lacking: int) -> None:
    original = cuda("if (n) p[threadIdx.x] = 1;")
    spliced = marked(original)
    (kernel,) = spliced.kernels
    broken = bytearray(spliced.cubin)
    (info,) = (s for s in read_cubin(spliced.cubin).sections if s.name == INFO)
    (at,) = (found.offset for found in read_attributes(read_cubin(spliced.cubin), info) if found.code == ATTRIBUTE_REGISTERS)
    assert struct.unpack_from("<I", broken, at + 4) == (kernel.registers,)
    struct.pack_into("<I", broken, at + 4, kernel.registers - lacking)
    assert first_difference(original, bytes(broken), SHIFT) == f"section {INFO} differs"


@pytest.mark.parametrize("most", [24, 64, 255])
def test_compiler_states_registers_that_the_hardware_keeps_when_there_are_few_or_many(most: int, tmp_path: pathlib.Path) -> None:
    """What REGISTERS_KEPT says, from who must know: it spills rather than name one of them."""
    original = cuda(MANY.replace("40", "60").replace("39", "59").replace("for", "\n#pragma unroll\nfor"), registers=most)
    (found,) = disassembled(original, tmp_path / "a.cubin").values()
    (stated,) = stated_registers(read_cubin(original)).values()
    assert most - 80 < stated <= most
    assert highest_register(found) == stated - 1 - sass.REGISTERS_KEPT


def test_rewrite_marks_machine_code_when_it_is_asked_to() -> None:
    original = cuda("if (n) p[threadIdx.x] = 1;")
    options = Options(entry=True, marks=True)
    assert rewrite(original, options).kernels[0].hooks == Hook.ENTRY
    found = rewrite(original, options.replaced(sass_marks=True))
    assert found.is_changed
    assert found.kernels[0].hooks == Hook.ENTRY | Hook.MARKS
    assert options.replaced(sass_marks=True).key() != options.key()

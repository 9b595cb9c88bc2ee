"""Random PTX kernels with a reference that says what they write.

Owns: `Program`: straight code, loops, branches, predicates, vectors, atomics, calls, shared and generic stores, copies in bulk, made from a
seed. Promises: what a byte of the buffer ends up as does not depend on the order of threads (a stored word is a function of its place,
atomics commute or set one value), so one run on any machine has the reference's bytes; the reference is computed from the program's own
description, never from its PTX. Called by test_instrument_ptx_random.py and, on a GPU, by scenarios_ptx.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

PAGE_SHIFT = 16
THREADS, BLOCKS = 32, 2
WORD = 0x9E3779B1
GAP = 1 << 16  # between areas: offsets of a few KB reach out of one, and not into the next
AREAS = {"plain": (GAP, 1 << 20), "add": (1 << 21, 1 << 18), "swap": (5 << 19, 1 << 18), "bulk": (3 << 20, 1 << 19)}
BUFFER_BYTES = (3 << 20) + (1 << 19) + (GAP << 1)
BULK_BYTES = 16384
FILL = 0xA5A5A5A5
M32 = (1 << 32) - 1


def word_at(offset: int) -> int:
    """What a store puts into the four bytes there."""
    return ((offset >> 2) * WORD ^ 0x5BD1E995) & M32


def _mix(value: int) -> int:
    value &= M32
    value ^= value >> 15
    value = value * 0x2C1B3C6D & M32
    return value ^ value >> 12


@dataclass(frozen=True)
class Hash:
    """A number of thread and turn."""

    a: int
    b: int
    c: int

    def value(self, thread: int, turn: int) -> int:
        return _mix(thread * self.a + turn * self.b + self.c)


@dataclass(frozen=True)
class Place:
    """Where in an area: scattered, or one behind the other; always on a boundary of `width`."""

    area: str
    width: int
    hash: Hash
    is_scattered: bool
    is_upper: bool = False  # half of an area, for words of another width

    def offset(self, thread: int, turn: int) -> int:
        at, size = AREAS[self.area]
        half = size // 2 if self.area in {"add", "swap"} else size
        found = self.hash.value(thread, turn) if self.is_scattered else thread * self.width + turn * self.hash.b * self.width + self.hash.c
        return at + (half if self.is_upper else 0) + (found & (half - 1) & -self.width)


@dataclass(frozen=True)
class Condition:
    """Of thread and turn."""

    hash: Hash
    mask: int
    is_negated: bool

    def holds(self, thread: int, turn: int) -> bool:
        return ((self.hash.value(thread, turn) & self.mask) == 0) != self.is_negated


@dataclass
class Written:
    """What a run leaves: bytes of the buffer, offsets of stores and atomics, and first and last byte of copies."""

    data: bytearray = field(default_factory=lambda: bytearray(BUFFER_BYTES))
    stores: set[int] = field(default_factory=set)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def store(self, offset: int, width: int) -> None:
        self.stores.add(offset)
        for at in range(offset, offset + width):
            self.data[at] = word_at(at) >> 8 * (at & 3) & 255

    def pages(self, window_from: int, window_bytes: int, page_shift: int = PAGE_SHIFT) -> set[int]:
        """Pages of the window that are marked, counted from its first byte: that of a store's first byte where it lies in the window, and
        of a copy all that it touches and that begin in the window.
        """
        found = {(first - window_from) >> page_shift for first in self.stores if 0 <= first - window_from < window_bytes}
        for first, last in self.copies:
            touched = range((first - window_from) >> page_shift, ((last - window_from) >> page_shift) + 1)
            found |= {page for page in touched if 0 <= page << page_shift < window_bytes}
        return found


class Node:
    """Something that a kernel does."""

    def emit(self, out: Emitter) -> None:
        raise NotImplementedError

    def run(self, thread: int, turn: int, written: Written) -> None:
        raise NotImplementedError


class Emitter:
    """The text of one kernel."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts = {"r": 1, "rd": 1, "p": 1, "label": 1, "q": 1}
        self.turn = "%turn"

    def new(self, kind: str) -> str:
        self.counts[kind] += 1
        return f"%{kind}{self.counts[kind]}" if kind != "label" else f"$L{self.counts[kind]}"

    def say(self, *lines: str) -> None:
        self.lines += lines

    def hash(self, hash_: Hash) -> str:
        x, y = self.new("r"), self.new("r")
        self.say(f"mul.lo.u32 {x}, %thread, {hash_.a};", f"mad.lo.u32 {x}, {self.turn}, {hash_.b}, {x};", f"add.u32 {x}, {x}, {hash_.c};")
        self.say(f"shr.u32 {y}, {x}, 15;", f"xor.b32 {x}, {x}, {y};", f"mul.lo.u32 {x}, {x}, {0x2C1B3C6D};")
        self.say(f"shr.u32 {y}, {x}, 12;", f"xor.b32 {x}, {x}, {y};")
        return x

    def place(self, place: Place) -> str:
        """A register with the address."""
        at, size = AREAS[place.area]
        half = size // 2 if place.area in {"add", "swap"} else size
        if place.is_scattered:
            found = self.hash(place.hash)
        else:
            found = self.new("r")
            self.say(f"mul.lo.u32 {found}, {self.turn}, {place.hash.b};", f"add.u32 {found}, {found}, %thread;")
            self.say(f"mad.lo.u32 {found}, {found}, {place.width}, {place.hash.c};")
        address = self.new("rd")
        self.say(f"and.b32 {found}, {found}, {(half - 1) & -place.width};", f"cvt.u64.u32 {address}, {found};")
        self.say(f"add.s64 {address}, {address}, {at + (half if place.is_upper else 0)};", f"add.s64 {address}, {address}, %buffer;")
        return address

    def condition(self, condition: Condition) -> str:
        """A guard."""
        found, predicate = self.hash(condition.hash), self.new("p")
        self.say(f"and.b32 {found}, {found}, {condition.mask};", f"setp.eq.u32 {predicate}, {found}, 0;")
        return f"!{predicate}" if condition.is_negated else predicate

    def word(self, address: str, offset: int) -> str:
        """A register with what belongs there."""
        place, word = self.new("rd"), self.new("r")
        self.say(f"sub.s64 {place}, {address}, %buffer;", f"add.s64 {place}, {place}, {offset};", f"shr.u64 {place}, {place}, 2;")
        self.say(f"cvt.u32.u64 {word}, {place};", f"mul.lo.u32 {word}, {word}, {WORD};", f"xor.b32 {word}, {word}, {0x5BD1E995};")
        return word


@dataclass
class Stores(Node):
    """A run of stores to one base: (offset, guard or none) each."""

    place: Place
    width: int
    qualifier: str
    mode: str  # global, generic, mixed: generic, and of some threads to shared memory
    members: list[tuple[int, Condition | None]]
    chooser: Condition
    chained: bool  # through a second register

    def emit(self, out: Emitter) -> None:
        base = out.place(self.place)
        guards = [out.condition(c) if c else "" for _, c in self.members]
        target = base
        if self.mode == "mixed":
            chosen = out.condition(self.chooser)
            target = out.new("rd")
            first, second = (base, "%private") if not chosen.startswith("!") else ("%private", base)
            out.say(f"selp.b64 {target}, {first}, {second}, {chosen.lstrip('!')};")
        values = [self._values(out, base, offset) for offset, _ in self.members]
        if self.chained:
            moved = out.new("rd")
            out.say(f"add.s64 {moved}, {target}, 4096;")
            target = moved
        space = ".global" if self.mode == "global" else ""
        for (offset, _), guard, (kind, value) in zip(self.members, guards, values, strict=True):
            at = offset - 4096 if self.chained else offset
            if self.mode == "mixed":
                at = -4096 if self.chained else 0
            out.say(f"{'@' + guard + ' ' if guard else ''}st{self.qualifier_of(space)}{kind} [{target}{f'+{at}' if at else ''}], {value};")

    def qualifier_of(self, space: str) -> str:
        """Cache operators stand behind the space, orders before it."""
        return f"{space}{self.qualifier}" if self.qualifier in {".cs", ".wt", ".cg"} else f"{self.qualifier}{space}"

    def _values(self, out: Emitter, base: str, offset: int) -> tuple[str, str]:
        if self.mode == "mixed":
            offset = 0
        words = [out.word(base, offset + at) for at in range(0, max(4, self.width), 4)]
        if self.width < 4:
            shift, place = out.new("r"), out.new("rd")
            out.say(f"add.s64 {place}, {base}, {offset};", f"cvt.u32.u64 {shift}, {place};", f"and.b32 {shift}, {shift}, 3;", f"shl.b32 {shift}, {shift}, 3;")
            out.say(f"shr.u32 {words[0]}, {words[0]}, {shift};")
            return f".u{8 * self.width}", words[0]
        if len(words) == 1:
            return ".b32", words[0]
        return f".v{len(words)}.b32", "{" + ", ".join(words) + "}"

    def run(self, thread: int, turn: int, written: Written) -> None:
        base = self.place.offset(thread, turn)
        for offset, condition in self.members:
            if condition is not None and not condition.holds(thread, turn):
                continue
            if self.mode == "mixed":
                if self.chooser.holds(thread, turn):
                    written.store(base, self.width)
            else:
                written.store(base + offset, self.width)


@dataclass
class Atomic(Node):
    """One that adds, or one that sets what belongs there."""

    place: Place
    width: int
    operation: str
    is_generic: bool
    guard: Condition | None
    is_destroying: bool  # its result goes where its address is
    amount: int

    def emit(self, out: Emitter) -> None:
        address = out.place(self.place)
        guard = out.condition(self.guard) if self.guard else ""
        at = f"@{guard} " if guard else ""
        space = "" if self.is_generic else ".global"
        bits = 8 * self.width
        if self.operation == "red":
            out.say(f"{at}red{space}.add.u{bits} [{address}], {self.amount};")
            return
        result = out.new("rd") if bits == 64 else out.new("r")
        if self.is_destroying and bits == 64:
            result = address
        if self.operation == "add":
            out.say(f"{at}atom{space}.add.u{bits} {result}, [{address}], {self.amount};")
            return
        low = out.word(address, 0)
        value = low
        if bits == 64:
            value, high = out.new("rd"), out.word(address, 4)
            out.say(f"mov.b64 {value}, {{{low}, {high}}};")
        compared = "0, " if self.operation == "cas" else ""
        out.say(f"{at}atom{space}.{self.operation}.b{bits} {result}, [{address}], {compared}{value};")

    def run(self, thread: int, turn: int, written: Written) -> None:
        if self.guard is not None and not self.guard.holds(thread, turn):
            return
        offset = self.place.offset(thread, turn)
        if self.operation in {"red", "add"}:
            written.stores.add(offset)
            before = int.from_bytes(written.data[offset : offset + self.width], "little")
            after = (before + self.amount) & ((1 << 8 * self.width) - 1)
            written.data[offset : offset + self.width] = after.to_bytes(self.width, "little")
        else:
            written.store(offset, self.width)


@dataclass
class Loop(Node):
    """So many turns; loops do not nest."""

    count: int
    body: list[Node]

    def emit(self, out: Emitter) -> None:
        label, predicate = out.new("label"), out.new("p")
        out.say("mov.u32 %turn, 0;", f"{label}:")
        for node in self.body:
            node.emit(out)
        out.say("add.u32 %turn, %turn, 1;", f"setp.lt.u32 {predicate}, %turn, {self.count};", f"@{predicate} bra {label};", "mov.u32 %turn, 0;")

    def run(self, thread: int, turn: int, written: Written) -> None:
        for own in range(self.count):
            for node in self.body:
                node.run(thread, own, written)


@dataclass
class Branch(Node):
    """Done by some threads, in a scope of its own."""

    condition: Condition
    body: list[Node]

    def emit(self, out: Emitter) -> None:
        guard, label = out.condition(self.condition), out.new("label")
        negated = guard[1:] if guard.startswith("!") else f"!{guard}"
        out.say(f"@{negated} bra {label};", "{", ".reg .b32 %unused<2>;")
        for node in self.body:
            node.emit(out)
        out.say("}", f"{label}:")

    def run(self, thread: int, turn: int, written: Written) -> None:
        if self.condition.holds(thread, turn):
            for node in self.body:
                node.run(thread, turn, written)


@dataclass
class Call(Node):
    """Of a function that stores two words, one of them for some threads."""

    place: Place
    condition: Condition
    is_deep: bool

    def emit(self, out: Emitter) -> None:
        address = out.place(self.place)
        guard, chosen, first, second = out.condition(self.condition), out.new("r"), out.word(address, 0), out.word(address, 2048)
        one, zero = ("0", "1") if guard.startswith("!") else ("1", "0")
        out.say(f"selp.b32 {chosen}, {one}, {zero}, {guard.lstrip('!')};", "{ // callseq")
        out.say(".param .b64 param0;", f"st.param.b64 [param0], {address};")
        for index, value in enumerate((first, second, chosen), 1):
            out.say(f".param .b32 param{index};", f"st.param.b32 [param{index}], {value};")
        out.say(f"call.uni {'outer_writer' if self.is_deep else 'writer'}, (param0, param1, param2, param3);", "}")

    def run(self, thread: int, turn: int, written: Written) -> None:
        offset = self.place.offset(thread, turn)
        written.store(offset, 4)
        if self.condition.holds(thread, turn):
            written.store(offset + 2048, 4)


@dataclass
class Fence(Node):
    """Something that ends a run of stores, or that looks as if it did."""

    text: str

    def emit(self, out: Emitter) -> None:
        if self.text.startswith("$"):
            out.say(f"$L_mark{out.new('label')[2:]}:")
        else:
            out.say(self.text)

    def run(self, thread: int, turn: int, written: Written) -> None:
        pass


@dataclass
class Bulk(Node):
    """Shared memory to the buffer, by the first thread of a block."""

    place: Place
    size: int
    is_register: bool

    def emit(self, out: Emitter) -> None:
        address, size, first = out.place(self.place), out.new("r"), out.new("p")
        out.say("bar.sync 0;", "fence.proxy.async;", f"setp.eq.u32 {first}, %lane, 0;", f"mov.u32 {size}, {self.size};")
        out.say(f"@{first} cp.async.bulk.global.shared::cta.bulk_group [{address}], [%copied], {size if self.is_register else self.size};")
        out.say("cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;")

    def run(self, thread: int, turn: int, written: Written) -> None:
        if thread % THREADS == 0 and self.size:
            offset = self.place.offset(thread, turn)
            written.copies.append((offset, offset + self.size - 1))
            written.data[offset : offset + self.size] = FILL.to_bytes(4, "little") * (self.size // 4)


@dataclass
class Program:
    """One kernel and the functions that it calls."""

    name: str
    nodes: list[Node]
    ending: str
    has_bulk: bool

    @classmethod
    def random(cls, name: str, seed: int, *, has_bulk: bool = False) -> Program:
        """The same for the same seed."""
        rng = random.Random(seed)
        nodes = [_node(rng, depth=0) for _ in range(rng.randrange(2, 7))]
        if has_bulk:
            for _ in range(rng.randrange(1, 3)):
                place = Place("bulk", 16, _hash(rng), True)
                size = rng.choice([0, 16, 16 * rng.randrange(1, 100), BULK_BYTES])
                nodes.insert(rng.randrange(len(nodes) + 1), Bulk(place, size, rng.random() < 0.5))
        return cls(name, nodes, rng.choice(["ret;", "exit;", "", "@%p1 ret;\nret;", "@!%p1 exit;\nexit;"]), has_bulk)

    def kernel(self) -> str:
        """Its PTX, without the head that a file has."""
        out = Emitter()
        for node in self.nodes:
            node.emit(out)
        if self.has_bulk:
            out.lines[:0] = ["mov.u32 %copied, filled;", "mov.u32 %r1, 0;", "shl.b32 %r1, %lane, 2;", "add.u32 %r1, %r1, %copied;", f"mov.u32 %r2, {FILL};", "mov.u32 %turn, 0;", "$FILL:",
                             "st.shared.u32 [%r1], %r2;", f"add.u32 %r1, %r1, {4 * THREADS};", "add.u32 %turn, %turn, 1;", f"setp.lt.u32 %p1, %turn, {BULK_BYTES // 4 // THREADS};", "@%p1 bra $FILL;", "mov.u32 %turn, 0;"]  # fmt: skip
        body = "\n".join(f"\t{line}" for line in out.lines)
        counts = out.counts
        return f""".visible .entry {self.name}(
	.param .u64 {self.name}_0 /* the buffer */
)
.maxntid {THREADS}, 1, 1
{{
	.reg .pred %p<{counts["p"] + 1}>;
	.reg .b32 %r<{counts["r"] + 2}>, %thread, %lane, %turn, %copied; .reg .b64 %rd<{counts["rd"] + 1}>, %buffer, %private;
	.shared .align 16 .b8 private[{16 * THREADS}];
	.shared .align 128 .b8 filled[{BULK_BYTES if self.has_bulk else 128}];
	ld.param.u64 %buffer, [{self.name}_0];
	cvta.to.global.u64 %buffer, %buffer;
	mov.u32 %lane, %tid.x; mov.u32 %thread, %ctaid.x; // two in a line
	mad.lo.u32 %thread, %thread, {THREADS}, %lane;
	mov.u32 %turn, 0;
	mul.wide.u32 %rd1, %lane, 16;
	mov.u64 %private, private;
	cvta.shared.u64 %private, %private;
	add.s64 %private, %private, %rd1;
	setp.lt.u32 %p1, %lane, 7;
{body}
	{self.ending}
}}
"""

    def written(self) -> Written:
        """The reference."""
        written = Written()
        for thread in range(THREADS * BLOCKS):
            for node in self.nodes:
                node.run(thread, 0, written)
        return written


WRITERS = """.func writer(.param .b64 writer_0, .param .b32 writer_1, .param .b32 writer_2, .param .b32 writer_3)
{
	.reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<2>;
	ld.param.b64 %rd1, [writer_0]; ld.param.b32 %r1, [writer_1]; ld.param.b32 %r2, [writer_2]; ld.param.b32 %r3, [writer_3];
	setp.ne.u32 %p1, %r3, 0;
	st.b32 [%rd1], %r1;
	@%p1 st.global.b32 [%rd1+2048], %r2;
	ret;
}
.func outer_writer(.param .b64 outer_0, .param .b32 outer_1, .param .b32 outer_2, .param .b32 outer_3)
{
	.reg .b32 %r<4>; .reg .b64 %rd<2>;
	ld.param.b64 %rd1, [outer_0]; ld.param.b32 %r1, [outer_1]; ld.param.b32 %r2, [outer_2]; ld.param.b32 %r3, [outer_3];
	{
	.param .b64 a; .param .b32 b; .param .b32 c; .param .b32 d;
	st.param.b64 [a], %rd1; st.param.b32 [b], %r1; st.param.b32 [c], %r2; st.param.b32 [d], %r3;
	call.uni writer, (a, b, c, d);
	}
	ret;
}
"""


def module(programs: list[Program], target: str) -> str:
    """A whole text."""
    version = "8.6" if target.startswith("sm_1") else "8.0"
    return f".version {version}\n.target {target}\n.address_size 64\n\n{WRITERS}" + "\n".join(program.kernel() for program in programs)


def windows(seed: int) -> Iterator[tuple[int, int]]:
    """Windows over the buffer: first byte and size; all of it, none, and parts that begin and end within pages."""
    rng = random.Random(seed)
    yield 0, BUFFER_BYTES
    while True:
        begin = rng.randrange(BUFFER_BYTES >> 12) << 12
        yield begin, rng.choice([0, rng.randrange(1, (BUFFER_BYTES - begin >> 12) + 1) << 12])


def _hash(rng: random.Random) -> Hash:
    return Hash(rng.randrange(1, 1 << 16) | 1, rng.randrange(1, 64), rng.randrange(1 << 20))


def _condition(rng: random.Random) -> Condition:
    return Condition(_hash(rng), rng.choice([1, 1, 3, 7]), rng.random() < 0.5)


def _node(rng: random.Random, depth: int) -> Node:
    kind = rng.choices(["stores", "atomic", "loop", "branch", "call", "fence"], [6, 3, 2 * (depth == 0), 2 * (depth < 2), 1, 2])[0]
    if kind == "stores":
        return _stores(rng)
    if kind == "atomic":
        return _atomic(rng)
    if kind == "loop":
        return Loop(rng.randrange(1, 4), [_node(rng, depth=1) for _ in range(rng.randrange(1, 4))])
    if kind == "branch":
        return Branch(_condition(rng), [_node(rng, depth=2) for _ in range(rng.randrange(1, 3))])
    if kind == "call":
        return Call(Place("plain", 4, _hash(rng), rng.random() < 0.5), _condition(rng), rng.random() < 0.5)
    return Fence(rng.choice(["membar.gl;", "$", "/* a; comment { */", "// st.global.u32 [%rd1], %r1;", '.pragma "nounroll";', "nanosleep.u32 1;"]))


def _stores(rng: random.Random) -> Stores:
    width = rng.choice([1, 2, 4, 4, 8, 16])
    mode = rng.choice(["global", "global", "generic", "mixed"])
    offsets = [0, width, -width, 2048, -4096, 65536 - 16, -65536]
    members = [(rng.choice(offsets), _condition(rng) if rng.random() < 0.5 else None) for _ in range(rng.choice([1, 1, 2, 3, 5]))]
    qualifier = rng.choice(["", "", ".volatile", ".relaxed.gpu", ".release.gpu", ".cs", ".wt"])
    if width > 8 and qualifier.startswith((".vol", ".rel")):
        qualifier = ""
    return Stores(Place("plain", width, _hash(rng), rng.random() < 0.5), width, qualifier, mode, members, _condition(rng), rng.random() < 0.3)


def _atomic(rng: random.Random) -> Atomic:
    width = rng.choice([4, 8])
    operation = rng.choice(["red", "add", "exch", "cas"])
    area = "add" if operation in {"red", "add"} else "swap"
    place = Place(area, width, _hash(rng), rng.random() < 0.5, is_upper=width == 8)
    guard = _condition(rng) if rng.random() < 0.5 else None
    return Atomic(place, width, operation, rng.random() < 0.4, guard, rng.random() < 0.5, rng.randrange(1, 1000))

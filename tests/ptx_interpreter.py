"""A small interpreter of PTX: what ptx_generator writes, and what the rewriter puts into it.

Owns: `Machine`: one kernel run thread by thread, with barriers, over a buffer, a control block and a map of pages. Promises: an instruction
that it does not know is an error, as is every byte outside of what was laid out; it shares the statements of a text with the rewriter, and
no rule. Called by test_instrument_ptx*.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from concordia.instrument.ptx_tree import Function, Shape, parse

SHARED_WINDOW = 0x7EFF_FF00_0000  # of 16 MiB; a buffer may lie right behind it
M64 = (1 << 64) - 1
_SPLIT = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s][^,]*")
_TYPE = re.compile(r"\.(?:b|u|s)(8|16|32|64)$")


@dataclass
class Memory:
    """Pieces at their addresses."""

    pieces: list[tuple[int, bytearray]] = field(default_factory=list)

    def add(self, address: int, size: int) -> bytearray:
        piece = bytearray(size)
        self.pieces.append((address, piece))
        return piece

    def find(self, address: int, size: int) -> tuple[bytearray, int]:
        for base, piece in self.pieces:
            if base <= address and address + size <= base + len(piece):
                return piece, address - base
        raise AssertionError(f"{size} bytes at {address:#x} are nobody's")

    def load(self, address: int, size: int) -> int:
        assert address % size == 0, f"{size} bytes at {address:#x}"
        piece, at = self.find(address, size)
        return int.from_bytes(piece[at : at + size], "little")

    def store(self, address: int, size: int, value: int) -> None:
        assert address % size == 0, f"{size} bytes at {address:#x}"
        piece, at = self.find(address, size)
        piece[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


@dataclass(frozen=True)
class Line:
    head: str
    guard: str
    operands: tuple[str, ...]


class Code:
    """A function, ready to run."""

    def __init__(self, text: str, function: Function) -> None:
        self.lines: list[Line] = []
        self.labels: dict[str, int] = {}
        self.variables: list[tuple[str, int]] = []
        self.parameters = re.findall(r"\.param\s+\.\w+\s+(\w+)", text[function.start : function.head_end])
        for statement in function.statements:
            if statement.shape is Shape.LABEL:
                self.labels[statement.head] = len(self.lines)
            elif statement.shape is Shape.INSTRUCTION:
                body = text[statement.body : statement.end].strip().rstrip(";").strip()
                self.lines.append(Line(statement.head, statement.guard, tuple(part.strip() for part in _SPLIT.findall(body))))
            elif statement.head == ".shared":
                name, size = re.findall(r"(\w+)\[(\d+)\]", text[statement.start : statement.end])[0]
                self.variables.append((name, int(size)))


class Machine:
    """One launch of a kernel."""

    def __init__(self, text: str, memory: Memory, *, threads: int, blocks: int) -> None:
        module = parse(text)
        self.codes = {function.name: Code(text, function) for function in module.functions}
        self.memory = memory
        self.threads, self.blocks = threads, blocks
        self.multiprocessors = 132
        self.constants: dict[str, int] = {}

    def launch(self, kernel: str, parameters: list[int]) -> None:
        """All blocks, one after the other; their threads go on together at barriers."""
        code = self.codes[kernel]
        at, places = 1024, {}
        for name, size in code.variables:
            places[name] = at
            at += (size + 127) & -128
        for block in range(self.blocks):
            self.memory.pieces = [piece for piece in self.memory.pieces if piece[0] != SHARED_WINDOW]
            self.memory.add(SHARED_WINDOW, at)
            special = {"%ctaid.x": block, "%smid": (block * 37 + 300) % self.multiprocessors + 200, "%tid.y": 0, "%tid.z": 0}
            frames = [Frame(self, code, dict(zip(code.parameters, parameters, strict=True)), special | {"%tid.x": lane} | places) for lane in range(self.threads)]
            running = [frame.run() for frame in frames]
            while running:
                running = [thread for thread in running if next(thread, None) is not None]


class Left(Exception):
    """A thread that ended inside of a function."""


class Frame:
    """One thread in one function."""

    def __init__(self, machine: Machine, code: Code, parameters: dict[str, int], special: dict[str, int]) -> None:
        self.machine, self.code, self.memory = machine, code, machine.memory
        self.parameters, self.special = parameters, special
        self.registers: dict[str, int] = {}

    def run(self) -> Iterator[int]:
        """Yields at barriers."""
        at, steps = 0, 0
        while at < len(self.code.lines):
            steps += 1
            assert steps < 200_000, "a kernel that does not end"
            line = self.code.lines[at]
            at += 1
            if line.guard and not self._holds(line.guard):
                continue
            root = line.head.partition(".")[0]
            if root in {"ret", "exit"}:
                return
            if root == "bra":
                at = self.code.labels[line.operands[0]]
            elif line.head == "bar.sync":
                yield 1
            elif root == "call":
                self._call(line)
            elif root not in {"membar", "fence", "nanosleep"}:
                getattr(self, f"_{root}")(line, line.head.split("."))

    def _call(self, line: Line) -> None:
        code = self.machine.codes[line.operands[0]]
        given = [self.parameters[name.strip()] for name in line.operands[1].strip("()").split(",")]
        frame = Frame(self.machine, code, dict(zip(code.parameters, given, strict=True)), self.special)
        assert next(frame.run(), None) is None

    # --- operands

    def _value(self, operand: str) -> int:
        if operand in self.registers:
            return self.registers[operand]
        if operand in self.special:
            return self.special[operand]
        return int(operand, 0) & M64

    def _holds(self, guard: str) -> bool:
        return bool(self.registers[guard.lstrip("!")]) != guard.startswith("!")

    def _set(self, name: str, value: int, bits: int = 64) -> None:
        self.registers[name] = value & ((1 << bits) - 1)

    def _bits(self, head: str) -> int:
        found = _TYPE.search(head)
        assert found, head
        return int(found[1])

    def _at(self, operand: str) -> int:
        base, _, offset = operand.strip("[] ").partition("+")
        return (self._value(base.strip()) + (int(offset, 0) if offset else 0)) & M64

    def _group(self, operand: str) -> list[str]:
        return [part.strip() for part in operand.strip("{}").split(",")]

    def _plain(self, line: Line) -> tuple[str, int, list[int]]:
        bits = self._bits(line.head)
        return line.operands[0], bits, [self._value(o) & ((1 << bits) - 1) for o in line.operands[1:]]

    # --- instructions

    def _mov(self, line: Line, _: list[str]) -> None:
        if line.operands[1].startswith("{"):
            low, high = (self._value(part) for part in self._group(line.operands[1]))
            self._set(line.operands[0], low | high << 32)
        else:
            self._set(line.operands[0], self._value(line.operands[1]), self._bits(line.head))

    def _add(self, line: Line, _: list[str]) -> None:
        name, bits, (a, b) = self._plain(line)
        self._set(name, a + b, bits)

    def _sub(self, line: Line, _: list[str]) -> None:
        name, bits, (a, b) = self._plain(line)
        self._set(name, a - b, bits)

    def _mul(self, line: Line, head: list[str]) -> None:
        name, bits, (a, b) = self._plain(line)
        assert head[1] in {"lo", "wide"}
        self._set(name, a * b, bits if head[1] == "lo" else 2 * bits)

    def _mad(self, line: Line, head: list[str]) -> None:
        name, bits, (a, b, c) = self._plain(line)
        assert head[1] in {"lo", "wide"}
        is_wide = head[1] == "wide"
        self._set(name, a * b + (self._value(line.operands[3]) if is_wide else c), 2 * bits if is_wide else bits)

    def _and(self, line: Line, head: list[str]) -> None:
        if head[1] == "pred":
            self.registers[line.operands[0]] = int(self._holds(line.operands[1]) and self._holds(line.operands[2]))
        else:
            name, bits, (a, b) = self._plain(line)
            self._set(name, a & b, bits)

    def _or(self, line: Line, head: list[str]) -> None:
        if head[1] == "pred":
            self.registers[line.operands[0]] = int(self._holds(line.operands[1]) or self._holds(line.operands[2]))
        else:
            name, bits, (a, b) = self._plain(line)
            self._set(name, a | b, bits)

    def _xor(self, line: Line, _: list[str]) -> None:
        name, bits, (a, b) = self._plain(line)
        self._set(name, a ^ b, bits)

    def _shl(self, line: Line, _: list[str]) -> None:
        name, bits, (a, b) = self._plain(line)
        self._set(name, a << min(b, bits), bits)

    def _shr(self, line: Line, head: list[str]) -> None:
        name, bits, (a, b) = self._plain(line)
        a -= (1 << bits) if head[-1].startswith("s") and a >> bits - 1 else 0
        self._set(name, a >> min(b, bits), bits)

    def _selp(self, line: Line, _: list[str]) -> None:
        name, yes, no, predicate = line.operands
        self._set(name, self._value(yes if self._holds(predicate) else no), self._bits(line.head))

    def _setp(self, line: Line, head: list[str]) -> None:
        bits = self._bits(line.head)
        a, b = (self._value(operand) & ((1 << bits) - 1) for operand in line.operands[1:3])
        if head[-1].startswith("s"):
            a, b = ((v - (1 << bits) if v >> bits - 1 else v) for v in (a, b))
        found = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b}[head[1]]
        if len(head) == 4:
            assert head[2] == "and"
            found = found and self._holds(line.operands[3])
        self.registers[line.operands[0]] = int(found)

    def _cvt(self, line: Line, head: list[str]) -> None:
        to, from_ = int(head[1][1:]), int(head[2][1:])
        self._set(line.operands[0], self._value(line.operands[1]) & ((1 << from_) - 1), to)

    def _cvta(self, line: Line, head: list[str]) -> None:
        moved = SHARED_WINDOW if head[1] == "shared" else 0
        self._set(line.operands[0], self._value(line.operands[1]) + moved)

    def _isspacep(self, line: Line, head: list[str]) -> None:
        assert head[1] == "global"
        self.registers[line.operands[0]] = int(not 0 <= self._value(line.operands[1]) - SHARED_WINDOW < 1 << 24)

    def _ld(self, line: Line, head: list[str]) -> None:
        if head[1] == "param":
            self._set(line.operands[0], self.parameters[line.operands[1].strip("[]")], self._bits(line.head))
            return
        if head[1] == "const":
            self._set(line.operands[0], self.machine.constants[line.operands[1].strip("[]")], self._bits(line.head))
            return
        assert head[1] == "global"
        size, names = self._bits(line.head) // 8, self._group(line.operands[0])
        address = self._at(line.operands[1])
        assert address % (size * len(names)) == 0
        for index, name in enumerate(names):
            self._set(name, self.memory.load(address + index * size, size))

    def _st(self, line: Line, head: list[str]) -> None:
        if head[1] == "param":
            self.parameters[line.operands[0].strip("[]")] = self._value(line.operands[1])
            return
        size, names = self._bits(line.head) // 8, self._group(line.operands[1])
        address = self._at(line.operands[0]) + (SHARED_WINDOW if "shared" in head else 0)
        assert address % (size * len(names)) == 0
        for index, name in enumerate(names):
            self.memory.store(address + index * size, size, self._value(name))

    def _red(self, line: Line, head: list[str]) -> None:
        assert "add" in head
        size, address = self._bits(line.head) // 8, self._at(line.operands[0])
        self.memory.store(address, size, self.memory.load(address, size) + self._value(line.operands[1]))

    def _atom(self, line: Line, head: list[str]) -> None:
        size, address = self._bits(line.head) // 8, self._at(line.operands[1])
        before = self.memory.load(address, size)
        values = [self._value(operand) for operand in line.operands[2:]]
        if "add" in head:
            self.memory.store(address, size, before + values[0])
        elif "exch" in head:
            self.memory.store(address, size, values[0])
        else:
            assert "cas" in head
            if before == values[0]:
                self.memory.store(address, size, values[1])
        self._set(line.operands[0], before)

    def _cp(self, line: Line, head: list[str]) -> None:
        if head[-1] in {"commit_group", "wait_group"}:
            return
        target, source, size = self._at(line.operands[0]), self._at(line.operands[1]) + SHARED_WINDOW, self._value(line.operands[2])
        assert target % 16 == source % 16 == size % 16 == 0
        if size:
            piece, at = self.memory.find(target, size)
            shared, begin = self.memory.find(source, size)
            piece[at : at + size] = shared[begin : begin + size]

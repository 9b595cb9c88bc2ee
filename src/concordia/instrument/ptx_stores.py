"""What an instruction of PTX writes, floor 3.

Owns: the rules, one for each instruction that can write memory, and the list of those that cannot.
Promises: an instruction that is on neither list, or whose address is not understood, is an unmarked
writer with its reason: nothing is taken for harmless because it is unknown. Called by ptx_marks
for every instruction of a function; it changes no text.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from concordia.instrument.ptx_names import Named, Names
from concordia.instrument.ptx_tokens import Kind, Token, number, tokens
from concordia.instrument.ptx_tree import Statement

# Instructions that write registers only, or memory of one thread, one block or the tensor core.
_HARMLESS_WORDS: Final = """
    abs activemask add addc alloca and applypriority bar barrier bfe bfi bfind bmsk bra brev brkpt
    brx call clusterlaunchcontrol clz cnot copysign cos createpolicy cvt cvta div dp2a dp4a elect
    ex2 exit fma fns getctarank griddepcontrol isspacep istypep ld ldmatrix ldu lg2 lop3 mad
    mad24 madc mapa match max mbarrier membar min mma mov movmatrix mul mul24 nanosleep neg not or
    pmevent popc prefetch prefetchu prmt rcp redux rem ret rsqrt sad selp set setmaxnreg setp shf
    shfl shl shr sin slct sqrt stackrestore stacksave stmatrix sub subc suld suq szext tanh tcgen05
    testp tex tld4 trap txq vabsdiff vabsdiff2 vabsdiff4 vadd vadd2 vadd4 vavrg2 vavrg4 vmad vmax
    vmax2 vmax4 vmin vmin2 vmin4 vote vset vset2 vset4 vshl vshr vsub vsub2 vsub4 wgmma xor
"""
_HARMLESS: Final = frozenset(_HARMLESS_WORDS.split())
_SPACES: Final = ("global", "shared", "local", "param", "const")
_ELEMENT_BYTES: Final = {"f16": 2, "f32": 4, "s32": 4, "f64": 8}
# Of a matrix that `wmma.store` writes: rows and columns.
_TILES: Final = {
    "m16n16k16": (16, 16),
    "m8n32k16": (8, 32),
    "m32n8k16": (32, 8),
    "m16n16k8": (16, 16),
    "m8n8k32": (8, 8),
    "m8n8k128": (8, 8),
    "m8n8k4": (8, 8),
}
_TENSOR_MAP_BYTES: Final = 128
# What a copy in bulk says before it says where to.
_COPY_WORDS: Final = frozenset({"reduce", "async", "bulk", "tensor", "1d", "2d", "3d", "4d", "5d"})


class Reach(enum.IntEnum):
    """How far a writer writes."""

    ONE = 1  # aligned bytes at one address, all in one page
    RANGE = 2  # from an address on
    WHOLE = 3  # through a tensor map or a multicast address
    UNKNOWN = 4


@dataclass(frozen=True, slots=True)
class Address:
    """`base + offset`: a register or variable, or a number alone where `base` is empty."""

    base: str
    named: Named | None
    offset: int
    is_generic: bool


@dataclass(frozen=True, slots=True)
class Length:
    """Bytes of a range: `count * scale + extra`; `count` is a register or empty."""

    count: str = ""
    scale: int = 0
    extra: int = 0


@dataclass(frozen=True, slots=True)
class Write:
    """One instruction's. `reason` is for those that no mark can follow."""

    reach: Reach
    address: Address | None = None
    length: Length | None = None
    reason: str = ""
    is_destroyed: bool = False  # the address: the instruction writes the register that holds it


def write_of(text: str, statement: Statement, names: Names) -> tuple[Write, ...]:
    """What the instruction writes of memory that others see; empty for most."""
    root = statement.root
    if root in _HARMLESS:
        return ()
    rule = _RULES.get(root)
    if rule is None:
        return (_unknown(f"{root} is no instruction that is known"),)
    return rule(_Parts.of(text, statement), names)


@dataclass(frozen=True, slots=True)
class _Parts:
    head: str
    modifiers: tuple[str, ...]
    operands: tuple[tuple[Token, ...], ...]

    @classmethod
    def of(cls, text: str, statement: Statement) -> _Parts:
        operands: list[list[Token]] = [[]]
        depth = 0
        for token in tokens(text, statement.body, statement.end):
            if token.kind is Kind.MARK:
                depth += (token.text in "([{") - (token.text in ")]}")
                if depth == 0 and token.text in ",;":
                    operands.append([])
                    continue
            if token.kind is not Kind.END:
                operands[-1].append(token)
        modifiers = tuple(statement.head.split("."))[1:]
        return cls(statement.head, modifiers, tuple(tuple(part) for part in operands if part))

    def space(self) -> str:
        """The first state space that it names; "" is generic."""
        for modifier in self.modifiers:
            name = modifier.partition("::")[0]
            if name in _SPACES:
                return name
        return ""

    def address(self, names: Names) -> Address | str:
        """Of the first operand in brackets, or what is not understood about it; "" when it lies in
        a space that nobody else sees.
        """
        space = self.space()
        if space not in {"", "global"}:
            return ""
        inner = next((part[1:-1] for part in self.operands if part[0].text == "["), ())
        sign = -1 if any(token.text == "-" for token in inner) else 1
        words = [token for token in inner if token.text not in {"+", "-"}]
        base = words.pop(0).text if words and words[0].kind is Kind.WORD else ""
        offset = number(words[0].text) if words else 0
        if offset is None or len(words) > 1 or not (base or words) or "." in base:
            return f"{self.head}: its address is not understood"
        if not base:
            return Address("", None, sign * offset, is_generic=not space)
        named = names.find(base)
        if named is not None and not named.is_register and not space:
            space = named.space.removeprefix(".")
        if named is None or (not named.is_register and space != "global"):
            return f"{self.head}: {base} is no register and no global variable"
        if named.is_register and named.bits not in {32, 64}:
            return f"{self.head}: an address of {named.bits} bits"
        return Address(base, named, sign * offset, is_generic=not space)


def _unknown(reason: str) -> Write:
    return Write(Reach.UNKNOWN, reason=reason)


def _one(parts: _Parts, names: Names) -> tuple[Write, ...]:
    """A store, reduction, atomic or line of L2: it lies on a boundary of its own size."""
    address = parts.address(names)
    if isinstance(address, str):
        return (_unknown(address),) if address else ()
    written = {token.text for token in parts.operands[0]} if parts.operands else set()
    is_destroyed = address.base in written and parts.operands[0][0].text != "["
    return (Write(Reach.ONE, address, is_destroyed=is_destroyed),)


def _store(parts: _Parts, names: Names) -> tuple[Write, ...]:
    # `st.bulk` clears shared memory, whether it says so or not.
    return () if parts.modifiers[:1] == ("bulk",) else _one(parts, names)


def _ranged(parts: _Parts, names: Names, length: Length | None) -> tuple[Write, ...]:
    address = parts.address(names)
    if isinstance(address, str):
        return (_unknown(address),) if address else ()
    if length is None:
        return (_unknown(f"{parts.head}: its size is not understood"),)
    return (Write(Reach.RANGE, address, length),)


def _size(operand: tuple[Token, ...], names: Names, *, scale: int, extra: int) -> Length | None:
    """The length that a register or a number says."""
    if len(operand) != 1:
        return None
    (token,) = operand
    if token.kind is Kind.NUMBER:
        value = number(token.text)
        return None if value is None else Length(extra=value * scale + extra)
    named = names.find(token.text)
    return Length(token.text, scale, extra) if named and named.bits == 32 else None


def _copy(parts: _Parts, names: Names) -> tuple[Write, ...]:
    """`cp`: of its many forms those that copy out of shared memory."""
    if "bulk" not in parts.modifiers or {"prefetch", "commit_group", "wait_group"} & set(
        parts.modifiers
    ):
        return ()
    target = next((part for part in parts.modifiers if part not in _COPY_WORDS), "")
    if target.partition("::")[0] == "shared":
        return ()
    if target != "global":
        return (_unknown(f"{parts.head}: a copy that is not known"),)
    if "tensor" in parts.modifiers:
        return (Write(Reach.WHOLE),)
    if len(parts.operands) < 3:
        return (_unknown(f"{parts.head}: a copy without a size"),)
    return _ranged(parts, names, _size(parts.operands[2], names, scale=1, extra=0))


def _multicast(parts: _Parts, _: Names) -> tuple[Write, ...]:
    return () if parts.modifiers[:1] == ("ld_reduce",) else (Write(Reach.WHOLE),)


def _tensor_map(parts: _Parts, names: Names) -> tuple[Write, ...]:
    made = _unknown("tensormap: a tensor map that the device makes")
    return (*_ranged(parts, names, Length(extra=_TENSOR_MAP_BYTES)), made)


def _fence(parts: _Parts, _: Names) -> tuple[Write, ...]:
    """One that takes over a tensor map from whoever stored it: stores through it lead anywhere."""
    is_taken = "acquire" in parts.modifiers and "tensormap::generic" in parts.modifiers
    return (_unknown(f"{parts.head}: a tensor map that the device makes"),) if is_taken else ()


def _surface(parts: _Parts, _: Names) -> tuple[Write, ...]:
    return (_unknown(f"{parts.head}: a surface"),)


def _matrix(parts: _Parts, names: Names) -> tuple[Write, ...]:
    """`wmma`: a matrix of rows, or columns, that lie a stride apart."""
    if parts.modifiers[:1] != ("store",):
        return ()
    tile = next((_TILES[part] for part in parts.modifiers if part in _TILES), None)
    element = _ELEMENT_BYTES.get(parts.modifiers[-1])
    if tile is None or element is None:
        return (_unknown(f"{parts.head}: a matrix that is not known"),)
    lines, line = tile if "row" in parts.modifiers else tile[::-1]
    if len(parts.operands) < 3:
        return _ranged(parts, names, Length(extra=lines * line * element))
    stride = _size(parts.operands[2], names, scale=(lines - 1) * element, extra=line * element)
    return _ranged(parts, names, stride)


_RULES: Final = {
    "st": _store,
    "red": _one,
    "atom": _one,
    "cp": _copy,
    "multimem": _multicast,
    "fence": _fence,
    "discard": _one,  # what a line held is lost: as good as written
    "tensormap": _tensor_map,
    "sust": _surface,
    "sured": _surface,
    "wmma": _matrix,
}

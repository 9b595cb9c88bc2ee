"""Cubins read, and their functions made longer.

Invariants: what is read is what device/cubin.py and the vendor's file say, in both generations; a grown file has every section's bytes,
in the same segment, at the same alignment; malformed is ImageRefused, never another error; one with an unknown form is left alone.
"""

from __future__ import annotations

import pathlib
import random
import struct

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings are not installed")
pytest.importorskip(
    "triton", reason="triton is not installed: its wheel has the assembler of CUDA 12"
)

import splice_kernels
import zstandard

from concordia import config
from concordia.device.cubin import read_facts
from concordia.errors import ImageRefused
from concordia.instrument.elf import (
    ATTRIBUTE_REGISTERS,
    INFO,
    SECTION_NULL,
    SECTION_SYMBOLS,
    TEXT,
    Cubin,
    Generation,
    architecture_of,
    read_attributes,
    read_cubin,
    read_relocated,
)
from concordia.instrument.growth import Grown
from concordia.instrument.splice import splice_cubin

CORPUS = sorted((pathlib.Path(__file__).parent / "corpus" / "cubin").glob("*.zst"))
MAKERS = {Generation.V1: splice_kernels.old_cubin, Generation.V2: splice_kernels.new_cubin}
generations = pytest.mark.parametrize("generation", list(Generation), ids=lambda g: g.name)


def read_all(data: bytes) -> Cubin:
    cubin = read_cubin(data)
    for section in cubin.sections:
        if section.name.startswith(INFO):
            read_attributes(cubin, section)
    read_relocated(cubin)
    return cubin


def registers(cubin: Cubin) -> dict[str, int]:
    (info,) = (section for section in cubin.sections if section.name == INFO)
    pairs = (
        struct.unpack_from("<II", cubin.data, a.offset)
        for a in read_attributes(cubin, info)
        if a.code == ATTRIBUTE_REGISTERS
    )
    return {cubin.symbols[symbol].name: count for symbol, count in pairs}


@generations
def test_facts_are_those_of_the_other_reader_when_a_kernel_is_compiled(
    generation: Generation,
) -> None:
    data = MAKERS[generation]("table_of_branches")
    cubin, facts = read_all(data), read_facts(data)
    assert (cubin.generation, cubin.architecture, architecture_of(data)) == (generation, 90, 90)
    assert registers(cubin) == facts.registers
    assert {s.name for s in cubin.symbols if s.is_kernel} == {"table_of_branches"}
    assert cubin.segments


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.name.partition(".")[0])
def test_shipped_cubin_is_read_as_by_the_other_reader_when_it_is_of_the_corpus(
    path: pathlib.Path,
) -> None:
    data = zstandard.decompress(path.read_bytes())
    assert registers(read_all(data)) == read_facts(data).registers


@generations
def test_every_section_keeps_its_bytes_alignment_and_segment_when_functions_grow(
    generation: Generation,
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    data = MAKERS[generation]("stack")
    if generation is Generation.V1:
        data = zstandard.decompress(next(p for p in CORPUS if "cuda118" in p.name).read_bytes())
    cubin = read_cubin(data)
    code = [s.index for s in cubin.sections if s.name.startswith(TEXT)]
    tails = {
        index: rng.randbytes(rng.randrange(1, 700))
        for index in rng.sample(code, min(len(code), 40))
    }
    after = read_cubin(bytes(Grown(cubin, tails).data))
    for old, new in zip(cubin.sections, after.sections, strict=True):
        if old.kind != SECTION_NULL:
            assert bytes(after.bytes_of(new)) == bytes(cubin.bytes_of(old)) + tails.get(
                old.index, b""
            )
            assert (new.offset - old.offset) % max(
                old.alignment if old.alignment <= 128 else 1, 1
            ) == 0
    for old, new in zip(cubin.segments, after.segments, strict=True):
        inside = [
            s.index
            for s in cubin.sections
            if s.end > s.offset and old.offset <= s.offset and s.end <= old.offset + old.file_bytes
        ]
        assert all(
            new.offset <= after.sections[i].offset
            and after.sections[i].end <= new.offset + new.file_bytes
            for i in inside
        )
        assert new.memory_bytes - new.file_bytes == old.memory_bytes - old.file_bytes


@generations
def test_every_truncation_is_refused_when_a_cubin_ends_early(generation: Generation) -> None:
    data = MAKERS[generation]("nothing")
    last = max(max(s.end for s in read_cubin(data).sections), len(data) - 1)
    for length in range(len(data)):
        if length <= last:
            with pytest.raises(ImageRefused):
                read_all(data[:length])


@generations
def test_every_flip_is_refused_or_left_alone_or_hooked_when_a_byte_of_a_header_differs(
    generation: Generation,
) -> None:
    data = MAKERS[generation]("nothing")
    cubin = read_cubin(data)
    places = [
        *range(64),
        *range(cubin.sections_offset, cubin.sections_offset + 64 * len(cubin.sections)),
    ]
    places += range(cubin.segments_offset, cubin.segments_offset + 56 * len(cubin.segments))
    for section in cubin.sections:
        if section.name.startswith(INFO) or section.name in {".symtab", ".rela.debug_frame"}:
            places += range(section.offset, section.end)
    for place in places:
        for bits in (0x01, 0xFF):
            broken = bytearray(data)
            broken[place] ^= bits
            try:
                read_all(bytes(broken))
                splice_cubin(bytes(broken), entry=True, exit=True)
            except ImageRefused:
                continue


def test_random_damage_is_refused_or_left_alone_or_hooked_when_it_lies_anywhere() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    data = splice_kernels.new_cubin("plain")
    for _ in range(1_500):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 8)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            splice_cubin(bytes(broken), entry=True, exit=True)
        except ImageRefused:
            continue


def test_overlapping_parts_are_refused_when_two_sections_share_bytes() -> None:
    data = bytearray(splice_kernels.new_cubin("plain"))
    cubin = read_cubin(bytes(data))
    (code,) = (s for s in cubin.sections if s.name == TEXT + "plain")
    other = next(s for s in cubin.sections if s.name == ".debug_frame")
    struct.pack_into("<Q", data, other.header_offset + 24, code.offset + 32)
    with pytest.raises(ImageRefused, match="begins at"):
        read_cubin(bytes(data))


def test_names_are_refused_when_all_of_them_are_more_than_a_file_can_have() -> None:
    """Each symbol has the end of one long name: a file of half a megabyte, half a gigabyte of names."""
    cubin = read_cubin(splice_kernels.new_cubin("plain"))
    (table,) = (s for s in cubin.sections if s.kind == SECTION_SYMBOLS)
    data = bytearray(cubin.data)
    names, symbols = len(data), len(data) + 65_000 + 8
    count = 16_000
    data += b"A" * 65_000 + bytes(8) + b"".join(struct.pack("<IIQQ", n, 0, 0, 0) for n in range(count))
    struct.pack_into("<QQ", data, cubin.sections[table.link].header_offset + 24, names, 65_001)
    struct.pack_into("<QQ", data, table.header_offset + 24, symbols, 24 * count)
    with pytest.raises(ImageRefused, match=f"names of more than {config.CUBIN_NAMES_BYTES_MAX} bytes"):
        read_cubin(bytes(data))
    struct.pack_into("<QQ", data, table.header_offset + 24, symbols, 24 * 100)
    assert len(read_cubin(bytes(data)).symbols) == 100

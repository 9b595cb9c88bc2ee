"""Small GPU images to try parsers on: made here, by the ordinary assembler and by hand."""

from __future__ import annotations

import functools
import struct

import pytest

from concordia.errors import EnvironmentRefused

PTX = """.version 8.0
.target sm_90
.address_size 64

.visible .entry store(.param .u64 store_out, .param .u32 store_count)
{
    .reg .pred %p<2>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [store_out];
    ld.param.u32 %r1, [store_count];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra DONE;
    cvta.to.global.u64 %rd2, %rd1;
    mul.wide.u32 %rd3, %r5, 4;
    add.s64 %rd2, %rd2, %rd3;
    st.global.u32 [%rd2], %r5;
DONE:
    ret;
}

.visible .entry nothing()
{
    ret;
}
"""
ELF, TEXT = 2, 1
ZSTD, LZ4, EXACT = 0x8000, 0x2000, 0x100000


@functools.cache
def cubin(architecture: str = "sm_90", text: str = PTX) -> bytes:
    """The text, assembled; skips where there is no assembler."""
    from concordia.device.nvrtc import link_cubin

    try:
        return link_cubin([text.encode()], name="image", architecture=architecture)
    except EnvironmentRefused as error:
        pytest.skip(str(error))


def entry(kind: int, architecture: int, payload: bytes, *, flags: int = 0, unpacked: int = 0) -> bytes:
    """An entry of a fatbin; `unpacked` bytes come out of a packed payload."""
    padded = payload + bytes(-len(payload) % 8)
    packed = len(payload) if unpacked else 0
    header = struct.pack("<HHIQIIHHIIIQQQ", kind, 0x101, 64, len(padded), packed, 0, 0, 9, architecture, 0, 0, 0x11 | flags, 0, unpacked)
    return header + padded


def fatbin(*entries: bytes) -> bytes:
    """A container."""
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, sum(map(len, entries))) + b"".join(entries)


def packed_entry(kind: int, architecture: int, payload: bytes, *, flags: int = 0) -> bytes:
    """An entry packed by zstd, as libraries have them; skips where that is not installed."""
    zstandard = pytest.importorskip("zstandard")
    return entry(kind, architecture, zstandard.compress(payload), flags=flags | ZSTD, unpacked=len(payload))

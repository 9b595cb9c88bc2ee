"""Code that only a GPU runs, the page scan and the headers of records, run by a warp of contexts on the CPU (native/warp.cpp).

Invariants: a page is noted just when its XXH3-128, as the xxhash library computes it, is not the one in the table, in either half; once,
whichever of the warps it falls to, wherever a range begins and ends; no lane of a warp ever waits alone; nothing beyond the pages is read.
Headers that a team puts are those that one lane would: CRC, chain of hashes, places.
"""

import ctypes
import time
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import xxhash

from concordia.device.compiler import HandlerSource, HostCompiler
from concordia.device.memory import Buffer

PAGE = 4096
GUARD = 64  # pages that cannot be read, behind a region: a touch ends this process
PROT_NONE = 0
SOURCE = Path(__file__).parent / "native" / "warp.cpp"
MASK = (1 << 64) - 1


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    flags = ("-Wno-unused-function", "-Wno-unused-variable", "-Wno-unknown-pragmas")
    path, _ = HostCompiler(flags=flags).compile(HandlerSource.of("warp.cpp", text=SOURCE.read_text()))
    return ctypes.CDLL(str(path))


def find(library: ctypes.CDLL, pages: Buffer, table: np.ndarray[tuple[int], np.dtype[np.uint64]], of: tuple[int, int], warps: int) -> list[int]:
    found = np.zeros(len(table), np.uint32)
    words = [ctypes.c_uint64(word) for word in (*of, warps)]
    count = library.find_dirty_pages(
        ctypes.c_void_p(pages.address), ctypes.c_void_p(table.ctypes.data), *words, ctypes.c_void_p(found.ctypes.data), ctypes.c_uint64(len(found))
    )
    assert count >= 0, "the lanes of a warp did not exchange alike"
    return sorted(int(page) for page in found[:count])


@pytest.mark.parametrize("warps", [1, 2, 3, 7])
def test_pages_are_noted_just_when_their_hash_is_another(library: ctypes.CDLL, warps: int) -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    generator = np.random.default_rng(seed)
    count = 61
    pages = Buffer((count + GUARD) * PAGE)
    content = np.frombuffer(pages.view, np.uint8)[: count * PAGE]
    content[:] = generator.integers(0, 256, count * PAGE, dtype=np.uint8)
    content[5 * PAGE : 6 * PAGE] = 0
    content[6 * PAGE : 7 * PAGE] = 255
    hashes = [xxhash.xxh3_128_intdigest(content[i * PAGE : (i + 1) * PAGE].tobytes()) for i in range(count)]
    table = np.array([half for value in hashes for half in (value & MASK, value >> 64)], np.uint64)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(pages.address + count * PAGE), ctypes.c_size_t(GUARD * PAGE), PROT_NONE) == 0
    assert find(library, pages, table, (0, count), warps) == []
    # a bit of one half of the known hash
    wrong = sorted(int(page) for page in generator.choice(count, 9, replace=False))
    for page in wrong:
        table[2 * page + int(generator.integers(2))] ^= np.uint64(1 << int(generator.integers(64)))
    assert find(library, pages, table, (0, count), warps) == wrong
    # a bit of any of the page's stripes
    soiled = sorted(int(page) for page in generator.choice(sorted(set(range(count)) - set(wrong)), 20, replace=False))
    for i, page in enumerate(soiled):
        stripe = 63 if i == 0 else int(generator.integers(64))
        content[page * PAGE + 64 * stripe + int(generator.integers(64))] ^= 1 << int(generator.integers(8))
    for first, end in ((0, count), (0, 1), (60, 61), (3, 50), (17, 18), (10, 31)):
        assert find(library, pages, table, (first, end), warps) == [page for page in sorted(wrong + soiled) if first <= page < end]
    del content
    pages.close()


@pytest.mark.parametrize("count", [1, 2, 31])
def test_headers_of_a_team_have_their_crc_and_the_hash_of_the_one_before(library: ctypes.CDLL, count: int) -> None:
    generator = np.random.default_rng(count)
    payload = 2000  # padded to 2048
    apart = 256 + 2048 + 128
    wanted = generator.integers(0, 256, (1 + count, 256), dtype=np.uint8)
    headers, pool, found = wanted.copy(), np.zeros(256 + count * apart, np.uint8), np.zeros(2, np.uint64)
    at = [ctypes.c_void_p(array.ctypes.data) for array in (headers, headers[1:], pool, found)]
    assert library.put_chain(at[0], at[1], ctypes.c_uint64(count), ctypes.c_uint64(payload), at[2], at[3]) == 0
    previous = None
    for i, header in enumerate(wanted):
        if previous is not None:
            header[24:40] = np.frombuffer(previous, np.uint8)
        header[252:] = np.frombuffer(google_crc32c.value(header[:252].tobytes()).to_bytes(4, "little"), np.uint8)
        previous = xxhash.xxh3_128_intdigest(header.tobytes()).to_bytes(16, "little")
        start = 0 if i == 0 else 256 + (i - 1) * apart
        assert pool[start : start + 256].tobytes() == header.tobytes(), i
        pool[start : start + 256] = 0
    assert found.tobytes() == previous
    assert not pool.any()  # nothing else was written

"""native/{images,hash,cache_file,rewriter,load,loaded,control}.c: which bytes the driver is handed.

Invariants: a key is XXH3 with 128 bits; a size comes from headers, and nothing outside readable memory is read; a rewritten image is
handed over with the control block's address in its slots, only from a cache file that is right in every byte, and only once there is a
control block that all devices can reach; in every other case the driver gets the program's own pointer, in bounded time, and the log says why.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import re
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import xxhash

from concordia import config
from concordia.instrument.cache import ImageCache, encode, image_key
from concordia.instrument.report import Rewritten, Slot, SlotKind
from concordia.integrations.program.shim_build import NATIVE, sources
from shim_ground import (
    ShimGround,
    build_driver,
    build_user,
    compile_c,
    folder_of_length,
    make_ground,
)
from stand_in_rewriter import StandInRewriter, hooked

pytest_plugins = ["shim_fixtures"]

PTX = b".version 8.0\n.target sm_90\n.visible .entry add() { ret; }\n"


def cubin(body: bytes = b"code" * 100) -> bytes:
    """The smallest ELF of CUDA's machine that has an end: headers, two sections, the table last."""
    at = 64 + len(body)
    header = struct.pack("<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, 190, 1, 0, 0, at, 0, 64, 0, 0, 64, 2, 0)
    section = struct.pack("<IIQQQQIIQQ", 0, 1, 0, 0, 64, len(body), 0, 0, 1, 0)
    return header + body + bytes(64) + section


def fatbin(body: bytes = b"compressed" * 99) -> bytes:
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


IMAGES = {"ptx": PTX, "cubin": cubin(), "fatbin": fatbin()}
WAYS = {
    "load": ("ptx", "cubin", "fatbin"),
    "load_ex": ("ptx", "cubin"),
    "load_fat": ("fatbin",),
    "load_wrapped": ("fatbin",),
    "load_file": ("ptx", "cubin", "fatbin"),
    "library": ("ptx", "cubin", "fatbin"),
    "library_wrapped": ("fatbin",),
    "library_file": ("ptx", "cubin", "fatbin"),
}
PAIRS = [(way, kind) for way, kinds in WAYS.items() for kind in kinds]


class Ground(ShimGround):
    """And a cache, a rewriter that can be started, and what the driver was handed."""

    rewriter: StandInRewriter | None = None

    @property
    def cache(self) -> ImageCache:
        return ImageCache(self.run.parent / "images", "options")

    def start_rewriter(self, behaviour: str = "ready") -> StandInRewriter:
        self.rewriter = StandInRewriter(self.run, self.cache, behaviour)
        return self.rewriter

    def write(self, image: bytes, name: str = "image") -> Path:
        path = self.run.parent / name
        path.write_bytes(image)
        return path

    def handed(self, *words: str, **environment: str) -> list[bytes]:
        """Run the program and give the images that the driver was handed."""
        folder = self.run.parent / "handed"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        self.do("begin", *words, f"dump:{folder}", **environment)
        return [(folder / str(i)).read_bytes() for i in range(len(list(folder.iterdir())))]

    def log(self) -> list[dict[str, Any]]:
        lines = [line for path in sorted((self.run / "modules").iterdir()) for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    def images(self) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["event"] == "image"]


@pytest.fixture
def ground(shim_parts: tuple[Path, Path], tmp_path: Path) -> Iterator[Ground]:
    plain = make_ground(tmp_path, *shim_parts)
    ground = Ground(plain.driver, plain.user, plain.run)
    ground.settle(mode="rewrite", cache=ground.cache.folder)
    yield ground
    if ground.rewriter:
        ground.rewriter.close()


def is_hooked(handed: bytes, image: bytes) -> bool:
    """Whether the driver got the stand-in's image, with an address where its zeros were."""
    found = re.fullmatch(re.escape(image) + rb"\n// hooked: 0x([0-9a-f]{16})\n", handed)
    return found is not None and int(found[1], 16) != 0


# --- parts, by themselves


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("parts") / "parts.so"
    compile_c(["-fPIC", "-shared", f"-I{NATIVE}", *map(str, sources()), "-ldl"], path)
    library = ctypes.CDLL(str(path))
    library.hash_crc32c.restype = library.hash_crc32c_plain.restype = ctypes.c_uint32
    for name in ("hash_image", "hash_image_plain", "hash_crc32c", "hash_crc32c_plain"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_uint64, *([ctypes.c_void_p] if "image" in name else [])]
    return library


class CImage(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("bytes", ctypes.c_void_p), ("size", ctypes.c_uint64), ("wrapper", ctypes.c_void_p)]


def size_of(parts: ctypes.CDLL, address: int) -> int:
    image = CImage()
    parts.image_find(ctypes.c_void_p(address), ctypes.byref(image))
    return int(image.size)


def test_hashes_are_those_of_the_libraries_when_lengths_vary(parts: ctypes.CDLL) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    lengths = [*range(1200), *range(2040, 2060), *(source.randrange(1200, 9000) for _ in range(200)), *range(3060, 3110), (1 << 20) + source.randrange(64)]
    for length in lengths:
        data = source.randbytes(length)
        for function in (parts.hash_image, parts.hash_image_plain):
            key = (ctypes.c_uint64 * 2)()
            function(data, length, key)
            assert tuple(key) == divmod(xxhash.xxh3_128_intdigest(data), 1 << 64), length
        assert parts.hash_crc32c(data, length) == parts.hash_crc32c_plain(data, length) == google_crc32c.value(data)


@pytest.mark.parametrize("kind", IMAGES)
def test_size_is_exact_when_an_image_ends_at_unreadable_memory(parts: ctypes.CDLL, kind: str) -> None:
    image = IMAGES[kind] + (b"\0" if kind == "ptx" else b"")
    with guarded(image) as address:
        assert size_of(parts, address) == len(IMAGES[kind])


@pytest.mark.parametrize("kind", IMAGES)
def test_size_is_unknown_and_nothing_faults_when_an_image_is_cut_before_unreadable_memory(parts: ctypes.CDLL, kind: str) -> None:
    for cut in range(1, len(IMAGES[kind])):
        with guarded(IMAGES[kind][:cut]) as address:
            assert size_of(parts, address) == 0, cut


def test_nothing_faults_when_headers_are_random(parts: ctypes.CDLL) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    for _ in range(3000):
        image = bytearray(IMAGES[source.choice(list(IMAGES))])
        for _ in range(source.randrange(1, 6)):
            image[source.randrange(min(64, len(image)))] = source.randrange(256)
        with guarded(bytes(image)) as address:
            assert size_of(parts, address) <= 1 << 30
    for address in (0, 1, 4095, (1 << 64) - 1, (1 << 47) - 8):
        assert size_of(parts, address) == 0


def test_wrapper_is_passed_through_when_its_parts_are_linked_at_load(parts: ctypes.CDLL) -> None:
    with guarded(fatbin()) as container:
        for version, size in ((1, len(fatbin())), (2, 0), (3, 0)):
            with guarded(struct.pack("<IIQQ", 0x466243B1, version, container, 0)) as wrapper:
                assert size_of(parts, wrapper) == size
        for pointer in (0, 1, container + len(fatbin())):
            with guarded(struct.pack("<IIQQ", 0x466243B1, 1, pointer, 0)) as wrapper:
                assert size_of(parts, wrapper) == 0


def test_size_is_unknown_and_nothing_faults_when_a_file_has_shrunk_under_an_image(parts: ctypes.CDLL, tmp_path: Path) -> None:
    path, image = tmp_path / "library", fatbin(b"x" * 40_000)
    path.write_bytes(image)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert size_of(parts, address) == len(image)
        file.truncate(mmap.PAGESIZE)
        assert size_of(parts, address) == 0


class CReplacement(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("control", "memory", "memory_bytes", "image", "image_bytes", "wrapper", "kernels", "kernels_bytes", "kernel_count")]


def test_image_is_whole_and_ends_with_zeros_when_it_is_of_any_size(parts: ctypes.CDLL, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source, huge = random.Random(seed), 2 << 20
    cache = ImageCache(tmp_path, "options")
    key = "ab" * 16
    halves = (ctypes.c_uint64 * 2)(*(int(key[at : at + 16], 16) for at in (0, 16)))
    around = [size + step for size in (huge // 2, huge, huge + huge // 2, 2 * huge) for step in (-200, -mmap.PAGESIZE, 0, 1)]
    for size in [64, mmap.PAGESIZE, 700_000, *around, source.randrange(4 * huge)]:
        image = source.randbytes(max(size, 16))
        cache.store(key, Rewritten(image, (Slot(0, SlotKind.RAW),), (), is_changed=True))
        found = CReplacement()
        assert parts.cache_load(str(cache.folder).encode(), halves, ctypes.c_uint64(1 << 40), ctypes.byref(found)) == 4, size
        assert ctypes.string_at(found.image, found.image_bytes) == (1 << 40).to_bytes(8, "little") + image[8:], size
        assert not any(ctypes.string_at(found.image + found.image_bytes, 8))
        assert found.memory <= found.image < found.wrapper < found.memory + found.memory_bytes
        ctypes.memset(found.wrapper, 1, 24)
        parts.cache_release(ctypes.byref(found))


class guarded:  # noqa: N801 - reads as a verb
    """Bytes that end where readable memory ends."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __enter__(self) -> int:
        page = mmap.PAGESIZE
        used = -(-len(self._data) // page) * page
        self._map = mmap.mmap(-1, used + page)
        self._map[used - len(self._data) : used] = self._data
        view = (ctypes.c_char * (used + page)).from_buffer(self._map)
        base = ctypes.addressof(view)
        assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(base + used), ctypes.c_size_t(page), 0) == 0
        self._view, self._base, self._used = view, base, used
        return base + used - len(self._data)

    def __exit__(self, *_: object) -> None:
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(self._base + self._used), ctypes.c_size_t(mmap.PAGESIZE), 3)
        del self._view
        self._map.close()


# --- the whole way


@pytest.mark.parametrize(("way", "kind"), PAIRS)
def test_driver_is_handed_the_hooked_image_when_the_rewriter_answers(ground: Ground, way: str, kind: str) -> None:
    image, rewriter = IMAGES[kind], ground.start_rewriter()
    (handed,) = ground.handed("context", f"{way}:{ground.write(image)}", "unload")
    assert rewriter.images == [image]
    assert rewriter.requests[0].key == image_key(image)
    # what the fake driver copies ends where the headers of the original say
    expected = hooked(image).image if kind == "ptx" else image
    assert len(handed) == len(expected)
    assert is_hooked(handed, image) if kind == "ptx" else handed == image
    (line,) = ground.images()
    assert (line["outcome"], line["key"], line["bytes"]) == ("rewritten", image_key(image), len(image))
    assert line["kind"] == kind
    assert line["library"] == str(ground.user if "file" not in way else ground.run.parent / "image")


def test_rewriter_is_not_asked_when_the_cache_has_the_image(ground: Ground) -> None:
    ground.cache.store(image_key(PTX), hooked(PTX))
    (handed,) = ground.handed("context", f"load:{ground.write(PTX)}")
    assert is_hooked(handed, PTX)


@pytest.mark.parametrize("kind", [SlotKind.LOW, SlotKind.HIGH, SlotKind.RAW, SlotKind.TEXT])
def test_slots_hold_the_address_when_they_are_of_any_kind(ground: Ground, kind: SlotKind) -> None:
    from dataclasses import replace

    image = cubin(b"0123456789abcdef" * 4)
    rewritten = replace(hooked(PTX), image=image, slots=(Slot(64, SlotKind.TEXT), Slot(80, kind)))
    ground.cache.store(image_key(PTX), rewritten)
    (handed,) = ground.handed("context", f"load:{ground.write(PTX)}")
    address = int(handed[64:80], 16)
    assert address
    expected = bytearray(image)
    expected[64:80] = b"%016x" % address
    if kind is SlotKind.TEXT:
        expected[80:96] = b"%016x" % address
    elif kind is SlotKind.RAW:
        expected[80:88] = address.to_bytes(8, "little")
    else:
        expected[84:88] = (address >> 32 if kind is SlotKind.HIGH else address & 0xFFFFFFFF).to_bytes(4, "little")
    assert handed == expected


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ("refused", "the rewriter has none for it"),
        ("later", "the rewriter is still at it"),
        ("garbage", "no rewriter"),
        ("hang_up", "no rewriter"),
        ("lie", "no file though the rewriter said so"),
        ("silent", "the rewriter was too slow"),
        ("none", "no rewriter"),
    ],
)
def test_driver_is_handed_the_original_when_the_rewriter_fails(ground: Ground, behaviour: str, why: str) -> None:
    if behaviour != "none":
        ground.start_rewriter(behaviour)
    ground.settle(image_wait_ms=300)
    begun = time.monotonic()
    assert ground.handed("context", f"load:{ground.write(PTX)}") == [PTX]
    assert time.monotonic() - begun < 5
    assert [(line["outcome"], line["why"]) for line in ground.images()] == [("original", why)]


def test_waiting_ends_for_the_process_when_its_time_is_spent(ground: Ground) -> None:
    ground.start_rewriter("silent")
    ground.settle(image_wait_ms=200, process_wait_ms=300)
    paths = [ground.write(PTX + b"// %d" % i, f"image{i}") for i in range(6)]
    begun = time.monotonic()
    ground.handed("context", *(f"load:{path}" for path in paths))
    assert time.monotonic() - begun < 4
    why = [line["why"] for line in ground.images()]
    assert why[0] == "the rewriter was too slow"
    assert why[3:] == ["this process has waited long enough"] * 3


def test_driver_is_handed_the_original_when_the_cache_file_is_damaged(ground: Ground) -> None:
    whole, path = encode(hooked(PTX), image_key(PTX)), ground.write(PTX)
    file = ground.cache.path(image_key(PTX))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    cases = [whole[:cut] for cut in sorted({0, 1, 63, 64, len(whole) - 1, *source.sample(range(len(whole)), 8)})]
    cases += [whole + b"\0", *(flipped(whole, source.randrange(len(whole) * 8)) for _ in range(20))]
    cases += [flipped(whole, bit) for bit in (8 * 8, 12 * 8 + 1, 16 * 8 + 40, 24 * 8 + 31, 28 * 8 + 31, 32 * 8 + 62, 44 * 8, 47 * 8 + 7, 48 * 8, 63 * 8 + 7)]
    for data in cases:
        file.write_bytes(data)
        assert ground.handed("context", f"load:{path}") == [PTX], data[:64].hex()


def test_driver_is_handed_the_original_when_a_right_checksum_covers_wrong_slots(ground: Ground) -> None:
    path, file = ground.write(PTX), ground.cache.path(image_key(PTX))
    whole = encode(hooked(PTX), image_key(PTX))
    for at, value in ((64, 1 << 40), (64, len(PTX) + 100), (64, 0), (72, 9), (72, 0), (76, 1)):
        data = bytearray(whole)
        struct.pack_into("<Q" if at == 64 else "<I", data, at, value)
        struct.pack_into("<I", data, 40, google_crc32c.value(bytes(data[64:])))
        file.write_bytes(data)
        assert ground.handed("context", f"load:{path}") == [PTX], (at, value)


@pytest.mark.parametrize(("key", "is_other"), [(image_key(b"another"), True), (image_key(PTX)[:16] + "0" * 16, True), ("0" * 16 + image_key(PTX)[16:], True), (image_key(PTX), False)])
def test_driver_is_handed_the_original_when_the_file_is_of_another_image(ground: Ground, key: str, is_other: bool) -> None:
    ground.cache.path(image_key(PTX)).write_bytes(encode(hooked(PTX), key))
    (handed,) = ground.handed("context", f"load:{ground.write(PTX)}")
    assert (handed == PTX, is_hooked(handed, PTX)) == (is_other, not is_other)
    (line,) = ground.images()
    assert (line["outcome"], line["why"]) == (("original", "its file is another image's") if is_other else ("rewritten", ""))
    assert ground.log()[-1].get("files of other images", 0) == is_other


def test_hooked_image_is_handed_over_when_the_rewriter_mends_a_file_of_another(ground: Ground) -> None:
    ground.cache.path(image_key(PTX)).write_bytes(encode(hooked(PTX), image_key(b"another")))
    ground.start_rewriter()
    (handed,) = ground.handed("context", f"load:{ground.write(PTX)}")
    assert is_hooked(handed, PTX)
    ground.cache.path(image_key(PTX)).write_bytes(encode(hooked(PTX), image_key(b"another")))
    assert ground.rewriter
    ground.rewriter.behaviour = "lie"
    assert ground.handed("context", f"load:{ground.write(PTX)}") == [PTX]
    assert sorted(line["why"] for line in ground.images()) == ["", "its file is another image's"]


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize(("way", "kind"), PAIRS)
def test_driver_gets_the_original_too_when_it_refuses_the_hooked_image(ground: Ground, way: str, kind: str) -> None:
    from dataclasses import replace

    image = IMAGES[kind]
    ground.cache.store(image_key(image), replace(hooked(image), image=struct.pack("<I", 0xDEADBEEF) + image, slots=()))
    assert ground.handed("context", f"{way}:{ground.write(image)}", "unload") == [image]
    (line,) = ground.images()
    assert (line["outcome"], line["why"]) == ("original", "the driver refused what was rewritten")


def test_images_stay_original_when_they_come_before_a_context(ground: Ground) -> None:
    ground.start_rewriter()
    path = ground.write(PTX)
    first, second = ground.handed(f"library:{path}", "context", f"library:{path}")
    assert first == PTX
    assert is_hooked(second, PTX)
    assert ground.images()[0]["why"] == "loaded before the first context"


@pytest.mark.parametrize("created", ["create:2", "create:3", "create:4", "context:0"])
def test_control_block_is_there_when_any_kind_of_context_is_made(ground: Ground, created: str) -> None:
    ground.start_rewriter()
    (handed,) = ground.handed(created, f"load:{ground.write(PTX)}")
    assert is_hooked(handed, PTX)


@pytest.mark.parametrize(
    ("environment", "is_made"),
    [
        ({"FAKE_DEVICES": "4"}, True),
        ({"FAKE_DEVICES": "4", "FAKE_PEER": "0"}, False),
        ({"FAKE_DEVICES": "4", "FAKE_VMM": "0"}, False),
        ({"FAKE_VMM": "0"}, False),
        ({"FAKE_ACCESS": "0"}, False),
    ],
)
def test_nothing_is_hooked_when_a_device_cannot_reach_the_control_block(ground: Ground, environment: dict[str, str], is_made: bool) -> None:
    ground.start_rewriter()
    (handed,) = ground.handed("context", f"load:{ground.write(PTX)}", **environment)
    assert is_hooked(handed, PTX) is is_made
    notes = [line["what"] for line in ground.log() if line["event"] == "note"]
    assert notes == ([] if is_made else ["nothing is hooked in this process"])


@pytest.mark.parametrize(("settings", "environment", "is_made"), [
    ({"arch": 90}, {}, True),
    ({"arch": 80}, {}, False),
    ({"arch": 90}, {"CUDA_FORCE_PTX_JIT": "0"}, True),
    ({"arch": 90}, {"CUDA_FORCE_PTX_JIT": "1"}, False),
    ({}, {"CUDA_FORCE_JIT": "1"}, False),
])  # fmt: skip
def test_nothing_is_hooked_when_the_driver_takes_other_code_than_was_read(
    ground: Ground, settings: dict[str, int], environment: dict[str, str], is_made: bool
) -> None:
    ground.start_rewriter()
    ground.settle(**settings)
    (handed,) = ground.handed("context", f"load:{ground.write(PTX)}", **environment)
    assert is_hooked(handed, PTX) is is_made


def test_driver_is_called_once_and_log_is_absent_when_switched_off(ground: Ground) -> None:
    path = ground.write(PTX)
    for environment in ({"CONCORDIA_DISABLE": "1"}, {"CONCORDIA_RUN": ""}, {"CONCORDIA_RUN": "/nonexistent"}):
        assert ground.handed("context", f"load:{path}", **environment) == [PTX]
    assert not list((ground.run / "modules").iterdir())
    ground.run.chmod(0o755)  # then it may be another's
    assert ground.handed("context", f"load:{path}") == [PTX]
    ground.run.chmod(0o700)
    assert not list((ground.run / "modules").iterdir())


def test_images_are_told_to_the_rewriter_without_waiting_when_only_looked_at(ground: Ground) -> None:
    rewriter = ground.start_rewriter("silent")
    ground.settle(mode="look")
    begun = time.monotonic()
    assert ground.handed("context", f"load:{ground.write(PTX)}") == [PTX]
    assert time.monotonic() - begun < 4
    deadline = time.monotonic() + 5
    while not rewriter.images and time.monotonic() < deadline:
        time.sleep(0.001)
    assert rewriter.images == [PTX]
    assert ground.images()[0]["why"] == "look only"


@pytest.mark.parametrize("image", [b"\x01\x02\x03" * 40, b"plain text\n", b"."])
def test_image_is_passed_through_when_its_kind_is_not_known(ground: Ground, image: bytes) -> None:
    (handed,) = ground.handed("context", f"load:{ground.write(image)}")
    assert handed == image.split(b"\0")[0] or handed == image[: len(handed)]
    assert ground.images()[0]["why"] == "no image that is known"


def test_eight_threads_get_hooked_images_when_they_load_at_the_same_time(ground: Ground) -> None:
    ground.start_rewriter()
    handed = ground.handed("context", f"threads:{ground.write(PTX)}", *["unload"] * 8)
    assert len(handed) == 8
    assert all(is_hooked(image, PTX) for image in handed)
    assert ground.log()[-1]["rewritten"] == 8


def test_child_starts_anew_when_a_process_forks_before_its_first_context(ground: Ground) -> None:
    ground.start_rewriter()
    path = ground.write(PTX)
    lines = ground.do("begin", f"library:{path}", "fork", "context", f"library:{path}", "launch:kernel", "cell")
    assert lines == ["cell 1", "child 0"]
    logs = sorted((ground.run / "modules").iterdir(), key=lambda path: path.stat().st_mtime)
    outcomes = sorted(json.loads(line)["outcome"] for log in logs for line in log.read_text().splitlines() if '"event":"image"' in line)
    assert len(logs) == 2
    assert outcomes == ["original", "rewritten"]


def test_counts_are_in_the_log_when_a_process_ends(ground: Ground) -> None:
    ground.start_rewriter()
    ground.do("begin", "context", f"load:{ground.write(PTX)}", "launch:kernel", "launch:cooperative", "graph")
    first, *_, last = ground.log()
    assert first["event"] == "process"
    assert str(ground.user) in first["command"]
    assert last == {"event": "end", "images": 1, "rewritten": 1, "launches": 4}


def test_image_is_hooked_once_when_the_driver_calls_its_own_public_functions(ground: Ground, tmp_path: Path) -> None:
    driver = build_driver(tmp_path / "recursing", "-DFAKE_RECURSES")
    made = make_ground(tmp_path / "other", driver, ground.user)
    recursing = Ground(made.driver, made.user, made.run)
    recursing.settle(mode="rewrite", cache=recursing.cache.folder)
    recursing.cache.store(image_key(PTX), hooked(PTX))
    (handed,) = recursing.handed("context", f"load_ex:{recursing.write(PTX)}", "calls:cuModuleLoadData", CALLS="needed")
    assert is_hooked(handed, PTX)
    assert len(recursing.images()) == 1


def test_images_are_hooked_when_a_sandbox_forbids_to_read_through_the_kernel(ground: Ground, tmp_path: Path) -> None:
    source, library = tmp_path / "forbid.c", tmp_path / "forbid.so"
    source.write_text("#include <errno.h>\nlong process_vm_readv(void) { errno = EPERM; return -1; }\n")
    compile_c([str(source), "-fPIC", "-shared"], library)
    ground.start_rewriter()
    (handed,) = ground.handed("context", f"load:{ground.write(PTX)}", LD_PRELOAD=str(library))
    assert is_hooked(handed, PTX)
    (failed,) = ground.handed("context", f"load_wrapped:{ground.write(fatbin())}", LD_PRELOAD=str(library))
    assert failed == fatbin()


# The folder whose socket's name just fits an address, the one where it does not, and the longest that is used.
@pytest.mark.parametrize("size", [107 - len("/rewriter.sock"), 108 - len("/rewriter.sock"), config.RUN_PATH_BYTES_MAX])
def test_image_is_hooked_when_the_path_of_the_run_is_long(shim_parts: tuple[Path, Path], size: int) -> None:
    with tempfile.TemporaryDirectory(prefix="cnc-", dir="/tmp") as folder:
        short = Path(folder)
        ground = make_ground(folder_of_length(short, size - len("/run")), *shim_parts)
        assert len(os.fsencode(ground.run)) == size
        cache = ImageCache(short / "images", "options")
        ground.settle(mode="rewrite", cache=cache.folder)
        (short / "image").write_bytes(PTX)
        rewriter = StandInRewriter(ground.run, cache)
        try:
            ground.do("begin", "context", f"load:{short}/image", f"dump:{short}")
        finally:
            rewriter.close()
        assert is_hooked((short / "0").read_bytes(), PTX)


def test_limit_is_the_buffers_when_a_folder_is_refused() -> None:
    assert f"PROCESS_PATH_MAX {config.RUN_PATH_BYTES_MAX + 1} " in (NATIVE / "shim.h").read_text()


@pytest.mark.parametrize("flags", ["address,undefined", "thread"])
def test_no_sanitizer_complains_when_threads_load_and_launch(ground: Ground, tmp_path: Path, flags: str) -> None:
    user = build_user(tmp_path, ground.driver, f"-fsanitize={flags}", "-fno-sanitize-recover=undefined")
    checked = make_ground(
        tmp_path / "checked", ground.driver, user, f"-fsanitize={flags}", "-fno-sanitize-recover=undefined", "-Wl,-z,undefs"
    )
    checked = Ground(checked.driver, checked.user, checked.run)
    checked.settle(mode="rewrite", cache=checked.cache.folder)
    checked.start_rewriter()
    paths = [checked.write(image, name) for name, image in IMAGES.items()]
    try:
        words = [
            "begin",
            "context",
            *(f"threads:{path}" for path in paths),
            f"load_file:{paths[0]}",
            "launch:kernel",
            "graph",
            *["unload"] * 25,
        ]
        checked.do(*words, ASAN_OPTIONS="detect_leaks=0", TSAN_OPTIONS="halt_on_error=1")
    finally:
        assert checked.rewriter
        checked.rewriter.close()

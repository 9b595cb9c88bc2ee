"""instrument/cache.py, options.py, request.py: what is on disk or comes in is exactly what was written.

Invariants: a file says what was stored; every truncation and every flipped bit of one is found; a failed write leaves nothing; the
folder is this user's alone; the bound holds and the longest unused goes; the key covers the options; a request is whole or refused.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import shutil
import struct
import sys
import tempfile
from importlib import metadata

import pytest
import xxhash

from concordia import config
from concordia.errors import EnvironmentRefused, ImageRefused, UsageError
from concordia.instrument import cache as cache_room
from concordia.instrument import options as options_room
from concordia.instrument.cache import ImageCache, decode, encode, image_key
from concordia.instrument.options import Options
from concordia.instrument.report import Hook, KernelReport, Rewritten, Slot, SlotKind, fill
from concordia.instrument.request import (
    Request,
    Status,
    check_memory,
    pack_reply,
    parse_reply,
    sealed_memory,
)

IMAGE = b"0123456789abcdef" + bytes(range(48))
SLOTS = (
    Slot(0, SlotKind.TEXT),
    Slot(16, SlotKind.LOW),
    Slot(32, SlotKind.HIGH),
    Slot(56, SlotKind.RAW),
)
KERNELS = (
    KernelReport("k_naïve", Hook.ENTRY | Hook.EXIT, 128),
    KernelReport("", Hook.LEFT_ALONE, 0, "no form that is known"),
    KernelReport("x", Hook.ENTRY | Hook.MARKS | Hook.PTX | Hook.WHOLE_REGION),
)
CHANGED = Rewritten(IMAGE, SLOTS, KERNELS, is_changed=True)
UNCHANGED = Rewritten(IMAGE, (), KERNELS, is_changed=False)
KEY = image_key(IMAGE)
OTHER_KEY = image_key(b"another")


def test_file_says_what_was_stored_when_it_is_read() -> None:
    assert decode(encode(CHANGED, KEY), KEY) == CHANGED
    assert decode(encode(UNCHANGED, KEY), KEY) == Rewritten(b"", (), KERNELS, is_changed=False)


def test_file_is_refused_when_it_is_of_another_image() -> None:
    for rewritten in (CHANGED, UNCHANGED):
        data = encode(rewritten, KEY)
        for another in (OTHER_KEY, KEY[16:] + KEY[:16], KEY[:16] + OTHER_KEY[16:], OTHER_KEY[:16] + KEY[16:]):
            with pytest.raises(ImageRefused, match=f"the file of another image: {KEY}"):
                decode(data, another)


def test_file_lies_as_the_shim_reads_it_when_it_is_written() -> None:
    data = encode(CHANGED, KEY)
    assert struct.unpack_from("<8sIIQIIQ", data) == (
        b"CNCIMG01",
        3,
        0,
        64,
        4,
        3,
        len(data) - 64 - 64 - 64,
    )
    assert struct.unpack_from("<I2Q", data, 44) == (0, *divmod(xxhash.xxh3_128_intdigest(IMAGE), 1 << 64))
    assert [struct.unpack_from("<QII", data, 64 + 16 * i) for i in range(4)] == [
        (0, 1, 0),
        (16, 2, 0),
        (32, 3, 0),
        (56, 4, 0),
    ]
    assert struct.unpack_from("<IIHH", data, 128) == (3, 128, 8, 0)
    assert data[140:148].decode() == "k_naïve"
    assert data[-64:] == IMAGE
    assert struct.unpack_from("<II", encode(UNCHANGED, KEY), 8) == (3, 1)


@pytest.mark.parametrize("rewritten", [CHANGED, UNCHANGED], ids=["changed", "unchanged"])
def test_every_truncation_and_flipped_bit_is_found_when_a_file_is_damaged(
    rewritten: Rewritten,
) -> None:
    data = encode(rewritten, KEY)
    for end in range(len(data)):
        with pytest.raises(ImageRefused):
            decode(data[:end], KEY)
    with pytest.raises(ImageRefused):
        decode(data + b"\0", KEY)
    for at, bit in itertools.product(range(len(data)), range(8)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        with pytest.raises(ImageRefused):
            decode(bytes(damaged), KEY)


def test_only_refusals_are_raised_when_whole_bodies_are_made_up() -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    refused = 0
    for _ in range(3000):
        slots, kernels, kernel_bytes, image = (
            rng.choice([0, 1, 3]),
            rng.choice([0, 1, 2]),
            rng.randrange(0, 60),
            rng.randrange(0, 80),
        )
        body = rng.randbytes(slots * 16 + kernel_bytes + image)
        if rng.random() < 0.5:  # lengths that are nearly right
            body = bytes(byte & 0x0F for byte in body)
        header = struct.pack(
            "<8sIIQIIQIIQQ",
            b"CNCIMG01",
            cache_room.VERSION,
            0 if image else 1,
            image,
            slots,
            kernels,
            kernel_bytes,
            cache_room.google_crc32c.value(body),
            0,
            *cache_room.key_halves(KEY),
        )
        try:
            found = decode(header + body, KEY)
        except ImageRefused:
            refused += 1
            continue
        assert len(encode(found, KEY)) == len(header + body)
    assert 0 < refused < 3000


@pytest.mark.parametrize(
    "slot",
    [
        Slot(-1, SlotKind.RAW),
        Slot(len(IMAGE) - 15, SlotKind.LOW),
        Slot(len(IMAGE) - 7, SlotKind.RAW),
        Slot(16, SlotKind.TEXT),
        Slot(0, SlotKind.TEXT, 1),
    ],
    ids=["before", "low-behind", "raw-behind", "no-digits", "unknown-name"],
)
def test_slot_is_refused_when_no_address_fits_there(slot: Slot) -> None:
    with pytest.raises(ImageRefused):
        encode(Rewritten(IMAGE, (slot,), (), is_changed=True), KEY)


def test_names_are_cut_when_they_are_longer_than_a_file_can_say() -> None:
    long = KernelReport("k" + "ö" * 100_000, Hook.LEFT_ALONE, 0, "\udcff" + "r" * 5000)
    (found,) = decode(encode(Rewritten(IMAGE, (), (long,), is_changed=False), KEY), KEY).kernels
    assert found.name == "k" + "ö" * (config.KERNEL_NAME_BYTES_MAX // 2)
    assert found.reason == "?" + "r" * (config.KERNEL_REASON_BYTES_MAX - 1)


def test_address_lies_in_every_slot_when_it_is_filled_in() -> None:
    filled = fill(IMAGE, SLOTS, 0x7F01_0203_0405_0607)
    assert filled[:16] == b"7f01020304050607"
    assert filled[20:24] == bytes([7, 6, 5, 4])
    assert filled[36:40] == bytes([3, 2, 1, 0x7F])
    assert filled[56:] == (0x7F01020304050607).to_bytes(8, "little")
    kept = [i for i in range(16, 56) if not (20 <= i < 24 or 36 <= i < 40)]
    assert all(filled[i] == IMAGE[i] for i in kept)


def test_key_is_xxh3_when_an_image_is_named() -> None:
    assert xxhash.xxh3_128_hexdigest(IMAGE) == KEY


def test_stored_image_is_found_again_and_private_when_it_is_loaded(tmp_path: pathlib.Path) -> None:
    cache = ImageCache(tmp_path / "images", Options().key())
    assert cache.load(KEY) is None
    size = cache.store(KEY, CHANGED)
    path = cache.path(KEY)
    assert path == tmp_path / "images" / Options().key() / f"{KEY}.image"
    assert path.stat().st_size == size
    assert path.stat().st_mode & 0o777 == 0o600
    assert (
        path.parent.stat().st_mode & 0o777 == (tmp_path / "images").stat().st_mode & 0o777 == 0o700
    )
    assert cache.load(KEY) == CHANGED
    assert ImageCache(tmp_path / "images", Options(arch=80).key()).load(KEY) is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_damaged_file_is_removed_when_it_is_loaded(tmp_path: pathlib.Path) -> None:
    cache = ImageCache(tmp_path / "images", "options")
    cache.store(KEY, CHANGED)
    damaged = bytearray(cache.path(KEY).read_bytes())
    damaged[-1] ^= 1
    cache.path(KEY).write_bytes(damaged)
    assert cache.load(KEY) is None
    assert not cache.path(KEY).exists()
    cache.store(KEY, CHANGED)
    assert cache.load(KEY) == CHANGED


def test_damaged_file_is_none_when_its_folder_cannot_be_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ImageCache(tmp_path / "images", "options")
    cache.store(KEY, CHANGED)
    cache.path(KEY).write_bytes(b"damaged")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    assert cache.load(KEY) is None
    assert cache.path(KEY).exists()


def test_file_is_removed_when_it_lies_in_the_place_of_another(tmp_path: pathlib.Path) -> None:
    cache = ImageCache(tmp_path / "images", "options")
    cache.store(KEY, CHANGED)
    cache.path(KEY).rename(cache.path(OTHER_KEY))
    assert cache.load(OTHER_KEY) is None
    assert not cache.path(OTHER_KEY).exists()
    cache.store(OTHER_KEY, CHANGED)
    assert cache.load(OTHER_KEY) == CHANGED


def test_nothing_is_left_when_a_write_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ImageCache(tmp_path / "images", "options")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cache.store(KEY, CHANGED)
    assert list(cache.folder.iterdir()) == []


def test_folder_is_refused_when_others_may_enter(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    root.chmod(0o701)
    with pytest.raises(EnvironmentRefused, match="only this user"):
        ImageCache(root, "options")
    root.chmod(0o700)
    assert ImageCache(root, "options").load(KEY) is None


def test_longest_unused_goes_when_all_options_together_are_beyond_the_bound(
    tmp_path: pathlib.Path,
) -> None:
    size = len(encode(CHANGED, KEY))
    old, new = (
        ImageCache(tmp_path / "images", name, bytes_max=2 * size) for name in ("old", "new")
    )
    keys = [f"{i:032x}" for i in range(4)]
    for age, (cache, key) in enumerate(
        [(old, keys[0]), (old, keys[1]), (new, keys[2]), (new, keys[3])]
    ):
        cache.store(key, CHANGED)
        os.utime(cache.path(key), (1000 + age, 1000 + age))
    os.utime(old.path(keys[0]), (5000, 1000))  # read lately
    (new.folder / "999999999-x.part").touch()
    mine = new.folder / f"{os.getpid()}-x.part"
    mine.touch()
    assert new.trim() == 2 * size
    assert [
        cache.path(key).exists()
        for cache, key in [(old, keys[0]), (old, keys[1]), (new, keys[2]), (new, keys[3])]
    ] == [True, False, False, True]
    assert sorted(p.name for p in new.folder.iterdir()) == sorted(
        [new.path(keys[3]).name, mine.name]
    )


def _store_often(root: pathlib.Path, rounds: int) -> None:
    cache = ImageCache(root, "options", bytes_max=1)
    for _ in range(rounds):
        cache.store(KEY, CHANGED)
        assert cache.load(KEY) in (CHANGED, None)
        cache.trim()


def test_every_read_is_whole_when_several_store_and_trim_at_once(tmp_path: pathlib.Path) -> None:
    several = [
        multiprocessing.get_context("fork").Process(
            target=_store_often, args=(tmp_path / "images", 100)
        )
        for _ in range(3)
    ]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
        assert process.exitcode == 0


def test_key_differs_when_any_option_or_byte_of_the_rewriter_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    several = [
        Options(),
        Options(arch=80),
        Options(exit=True),
        Options(entry=False),
        Options(marks=False),
        Options(page_shift=21),
        Options(deny=("x",)),
        Options(opaque=()),
        Options(sass_marks=True),
        Options(assembler=True),
    ]
    assert len({options.key() for options in several}) == len(several)
    assert Options().key() == Options.parse(Options().to_json()).key()
    before = Options().key()
    monkeypatch.setattr("concordia.instrument.options._version", lambda: "another")
    assert Options().key() != before


OTHER = {
    **{"arch": 80, "entry": False, "exit": True, "marks": False, "sass_marks": True, "assembler": True},
    **{"page_shift": 21, "opaque": ("cublas*",), "deny": ("x",)},
}


@pytest.mark.parametrize("name", OTHER)
def test_options_are_what_was_asked_for_when_one_is_another(name: str) -> None:
    options = Options(**{name: OTHER[name]})
    assert options._asdict() == Options()._asdict() | {name: OTHER[name]}
    for again in (copy.copy(options), copy.deepcopy(options), pickle.loads(pickle.dumps(options)), Options()._replace(**{name: OTHER[name]})):
        assert type(again) is Options
        assert again == options


def test_options_are_refused_when_a_copy_of_them_would_be_wrong() -> None:
    with pytest.raises(UsageError, match="architecture 1:"):
        Options(arch=1)
    with pytest.raises(UsageError, match="architecture 1:"):
        Options()._replace(arch=1)
    with pytest.raises(UsageError, match="page shift 99:"):
        Options().replaced(page_shift=99)
    for wrong in (lambda: Options(other=1), lambda: Options(90), lambda: Options()._replace(other=1)):  # type: ignore[call-arg, misc]
        with pytest.raises(TypeError):
            wrong()


def test_key_is_the_same_when_what_is_no_file_or_no_source_lies_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = pathlib.Path(options_room.__file__).parent
    shutil.copytree(here, tmp_path / "instrument", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(here.parent / "abi", tmp_path / "abi")
    (tmp_path / "device").mkdir()
    shutil.copy(here.parent / "device" / "nvrtc.py", tmp_path / "device")
    monkeypatch.setattr(options_room, "__file__", str(tmp_path / "instrument" / "options.py"))
    before = options_room._version.__wrapped__()
    for folder in ("instrument", "abi"):
        (tmp_path / folder / ".#rewrite.py").symlink_to("nobody@nowhere.1")  # as an editor locks a file
        os.mkfifo(tmp_path / folder / "pipe.py")
    (tmp_path / "abi" / "notes.txt").write_text("no source")
    assert options_room._version.__wrapped__() == before
    (tmp_path / "abi" / "more.py").write_text("")
    assert options_room._version.__wrapped__() != before


@pytest.mark.parametrize("what", ["assembler", "assembler_is_missing", "config.py", "control_layout.py", "nvrtc.py", "rewrite.py"])
def test_key_is_another_when_something_else_decides_what_comes_out(what: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = options_room._version.__wrapped__()
    sources = options_room._sources()
    if what.startswith("assembler"):
        monkeypatch.setattr(sys, "path", [str(tmp_path), *([] if what.endswith("missing") else sys.path)])
        if what == "assembler":
            (tmp_path / "nvidia_nvjitlink-99.0.dist-info").mkdir()
    else:
        other = tmp_path / what
        (source,) = (path for path in sources if path.name == what)
        other.write_bytes(source.read_bytes() + b"#")
        monkeypatch.setattr(options_room, "_sources", lambda: [other if path == source else path for path in sources])
    assert options_room._version.__wrapped__() != before


def test_versions_are_those_of_the_packages_when_their_folders_are_read() -> None:
    for name in options_room._TOOLS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        assert options_room._installed_versions()[name] == version, name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSON object"), ("[]", "JSON object"), ("[" * 100_000, "JSON object"), ('{"archh": 90}', "no option 'archh'"), ('{"arch": true}', "'arch' is int"),
        ('{"arch": "90"}', "'arch' is int"), ('{"arch": 9}', "architecture 9"), ('{"exit": 1}', "'exit' is bool"), ('{"deny": "x"}', "list of patterns"),
        ('{"deny": [1]}', "list of patterns"), ('{"page_shift": 64}', "page shift 64"), ('{"opaque": ["/usr/lib/libx.so"]}', "without its folder"), ('{"opaque": [""]}', "without its folder"),
        ('{"opaque": ["x\\ny"]}', "without its folder"), (json.dumps({"opaque": ["x" * 3000, "y" * 3000]}), "at most 4096 bytes"),
    ],
)  # fmt: skip
def test_options_are_refused_in_one_line_when_they_are_wrong(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        Options.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("library", "is_opaque"),
    [
        ("/x/nvidia/cublas/lib/libcublasLt.so.13", True), ("/x/libcublas.so.13", True), ("libcudnn_ops.so.9", True), ("/x/libcusparse.so.12", True),
        ("/x/torch/lib/libtorch_cuda.so", False), ("/x/cublas/_C.abi3.so", False), ("/x/libnccl.so.2", False), ("", False), ("/x/libcudart.so.13", False),
    ],
)  # fmt: skip
def test_library_is_left_alone_when_its_name_is_one_of_the_opaque(
    library: str, is_opaque: bool
) -> None:
    assert Options().is_opaque_library(library) == is_opaque
    assert not Options(opaque=()).is_opaque_library(library)


@pytest.mark.parametrize(
    ("kernel", "is_opaque"),
    [
        ("cublasGemvKernel", True), ("_ZN5cudnn3ops12some_kernelIfEEvPT_", True), ("_ZN8cusparse4loadEv", True), ("sm90_xmma_gemm_bf16bf16_tn", True),
        ("_Z9my_kernelPf", False), ("my_cublas_like", False), ("_ZN5torch6cudnn3", False), ("_ZN99999x", False), ("_ZN" + "9" * 5000, False), ("", False),
    ],
)  # fmt: skip
def test_kernel_is_opaque_when_its_name_or_a_scope_says_so(kernel: str, is_opaque: bool) -> None:
    assert Options().is_opaque_kernel(kernel) == is_opaque


def test_request_says_what_was_packed_when_it_is_parsed() -> None:
    for asked in (Request(1 << 20, KEY, is_for_assembler=True), Request(1 << 20, KEY)):
        assert Request.parse(asked.pack()) == asked
    low, high = struct.unpack_from("<QQ", asked.pack(), 16)
    assert (low, high) == divmod(xxhash.xxh3_128_intdigest(IMAGE), 1 << 64)
    for status in Status:
        assert parse_reply(pack_reply(status)) == status


def test_request_is_refused_when_any_part_of_it_is_wrong() -> None:
    good = Request(64, KEY).pack()
    wrong = [good[:end] for end in range(len(good))]
    wrong += [
        b"X" + good[1:],
        good[:4] + b"\1" + good[5:],
        good + b"\0",
    ]
    wrong += [Request(size, KEY).pack() for size in (0, config.IMAGE_BYTES_MAX + 1)]
    for data in wrong:
        with pytest.raises(ImageRefused):
            Request.parse(data)
    for data in (
        b"",
        pack_reply(Status.READY)[:-1],
        b"CNRP" + struct.pack("<I", 3),
        b"CNRX" + bytes(4),
    ):
        with pytest.raises(ImageRefused):
            parse_reply(data)


def test_memory_is_refused_when_it_can_still_change_or_has_another_size() -> None:
    with sealed_memory(IMAGE) as memory:
        check_memory(memory, len(IMAGE))
        for size in (len(IMAGE) - 1, len(IMAGE) + 1):
            with pytest.raises(ImageRefused, match="said to have"):
                check_memory(memory, size)
        with pytest.raises(OSError, match="not permitted"):
            os.write(memory, b"x")
    for seals in (0, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW):
        memory = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, 64)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(ImageRefused, match="can still change"):
            check_memory(memory, 64)
        os.close(memory)
    with tempfile.TemporaryFile() as file, pytest.raises(ImageRefused):
        check_memory(file.fileno(), 0)


def test_options_come_back_when_they_are_written_as_json() -> None:
    options = Options(arch=100, exit=True, deny=("a*", "b"))
    assert Options.parse(options.to_json()) == options
    assert json.loads(options.to_json())["deny"] == ["a*", "b"]

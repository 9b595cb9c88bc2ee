"""instrument/rewrite.py, ptx_check.py: what the driver would take is hooked, on any doubt nothing is.

Invariants: nothing in an image is an error; an unchanged image is the same bytes and says why; in a container only what the driver takes
for this device is changed, and every other byte of it is kept; each slot lies where its address belongs; opaque and denied kernels stay
as they are; a rewritten text that does not assemble is not handed out.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

import gpu_images
from concordia import config
from concordia.errors import EnvironmentRefused
from concordia.instrument import ptx_check
from concordia.instrument import rewrite as rewrite_room
from concordia.instrument.cache import encode
from concordia.instrument.fatbin import Entry, EntryKind
from concordia.instrument.image import read_image
from concordia.instrument.options import Options
from concordia.instrument.proof import proves_original
from concordia.instrument.report import Hook, Rewritten, fill
from concordia.instrument.rewrite import driver_takes, rewrite
from gpu_images import ELF, EXACT, PTX, TEXT, entry, fatbin, packed_entry

CONTROL = 0x7F12_3456_7800
TEXT_BYTES = PTX.encode()
KEY = "0123456789abcdef" * 2  # of an image that is not looked for
MARKED = Hook.ENTRY | Hook.MARKS | Hook.PTX


def hooks(done: Rewritten) -> dict[str, Hook]:
    return {kernel.name: kernel.hooks for kernel in done.kernels}


def unchanged(done: Rewritten, image: bytes) -> bool:
    return (
        done.image == image
        and not done.is_changed
        and not done.slots
        and not any(k.hooks.is_hooked for k in done.kernels)
    )


def test_text_is_marked_and_machine_code_is_entered_when_both_are_rewritten() -> None:
    assert hooks(rewrite(TEXT_BYTES, Options())) == {"store": MARKED, "nothing": MARKED}
    done = rewrite(gpu_images.cubin(), Options(exit=True))
    assert hooks(done) == {"store": Hook.ENTRY | Hook.EXIT, "nothing": Hook.ENTRY | Hook.EXIT}
    assert proves_original(gpu_images.cubin(), done.image)
    assert all(kernel.registers > 0 for kernel in done.kernels)


def test_stores_of_machine_code_are_marked_only_when_that_is_asked_for() -> None:
    assert not any(Hook.MARKS in found for found in hooks(rewrite(gpu_images.cubin(), Options())).values())
    done = rewrite(gpu_images.cubin(), Options(sass_marks=True))
    assert hooks(done) == {"store": Hook.ENTRY | Hook.MARKS, "nothing": Hook.ENTRY | Hook.MARKS}
    assert proves_original(gpu_images.cubin(), done.image, Options().page_shift)
    assert not any(Hook.MARKS in found for found in hooks(rewrite(TEXT_BYTES, Options(marks=False, sass_marks=True))).values())


@pytest.mark.parametrize("tail", [b"", b"\0", b"\0\0\0"])
def test_text_may_end_in_zeros_when_it_is_loaded_as_a_string(tail: bytes) -> None:
    done = rewrite(TEXT_BYTES + tail, Options())
    assert done.is_changed
    for slot in done.slots:
        assert done.image[slot.offset - 2 : slot.offset + 16] == b"0x" + b"0" * 16


@pytest.mark.parametrize("pack", [entry, packed_entry], ids=["raw", "zstd"])
def test_only_what_the_driver_takes_is_changed_when_a_container_has_several(pack: object) -> None:
    assert callable(pack)
    other = pack(ELF, 80, b"\x7fELF for another GPU" * 4)
    text = pack(TEXT, 90, TEXT_BYTES)
    image = fatbin(other, pack(ELF, 90, gpu_images.cubin()), text)
    done = rewrite(image, Options())
    assert hooks(done) == {"store": Hook.ENTRY, "nothing": Hook.ENTRY}
    found, before = read_image(done.image), read_image(image)
    assert [found.payload(i) for i in (0, 2)] == [before.payload(i) for i in (0, 2)]
    assert done.image[16 : 16 + len(other)] == other
    assert done.image.endswith(text)
    spliced = found.payload(1)
    assert proves_original(
        gpu_images.cubin(), spliced[: len(rewrite(gpu_images.cubin(), Options()).image)]
    )
    filled = read_image(fill(done.image, done.slots, CONTROL)).payload(1)
    alone = rewrite(gpu_images.cubin(), Options())
    assert filled[: len(alone.image)] == fill(alone.image, alone.slots, CONTROL)


def test_text_is_rewritten_in_a_container_when_no_machine_code_is_for_the_device() -> None:
    image = fatbin(
        entry(ELF, 80, gpu_images.cubin("sm_80", PTX.replace("sm_90", "sm_80"))),
        packed_entry(TEXT, 80, PTX.replace("sm_90", "sm_80").encode()),
    )
    done = rewrite(image, Options(arch=90))
    assert hooks(done) == {"store": MARKED, "nothing": MARKED}
    filled = read_image(fill(done.image, done.slots, CONTROL)).payload(1)
    assert filled.count(f"0x{CONTROL:016x}".encode()) == len(done.slots) > 0


def _entry(kind: EntryKind, architecture: int, suffix: str = "") -> Entry:
    (base,) = read_image(TEXT_BYTES).entries
    return dataclasses.replace(base, kind=kind, architecture=architecture, suffix=suffix)


CODE, WORDS = EntryKind.ELF, EntryKind.PTX


@pytest.mark.parametrize(
    ("entries", "arch", "taken"),
    [
        ([(CODE, 80), (CODE, 90), (WORDS, 90)], 90, [1]), ([(CODE, 90), (CODE, 90, "a")], 90, [0, 1]), ([(CODE, 80), (CODE, 86)], 86, [0, 1]),
        ([(CODE, 80), (CODE, 86)], 80, [0]), ([(CODE, 90, "a"), (WORDS, 80)], 100, [1]), ([(CODE, 80), (WORDS, 80), (WORDS, 90), (WORDS, 100)], 90, [2]),
        ([(WORDS, 90, "a"), (WORDS, 80)], 90, [0]), ([(WORDS, 90, "a"), (WORDS, 80)], 100, [1]), ([(CODE, 100, "f")], 103, [0]),
        ([(CODE, 100)], 120, []), ([(WORDS, 100, "f")], 120, []), ([(WORDS, 100, "f"), (WORDS, 90)], 103, [0]), ([(CODE, 100), (WORDS, 100)], 90, []),
        ([(EntryKind.OTHER, 90)], 90, []), ([], 90, []), ([(WORDS, 90), (WORDS, 90)], 90, [0, 1]),
    ],
)  # fmt: skip
def test_driver_takes_its_own_generation_and_else_the_newest_text_when_it_chooses(
    entries: Sequence[tuple[EntryKind, int]], arch: int, taken: list[int]
) -> None:
    made = [dataclasses.replace(_entry(*one), index=index) for index, one in enumerate(entries)]
    assert [found.index for found in driver_takes(made, arch)] == taken


def test_only_what_was_done_to_all_is_said_when_a_kernel_is_there_twice() -> None:
    hidden = (
        PTX.replace(".visible .entry store", ".extern .func far;\n.visible .entry store")
        .replace("st.global.u32 [%rd2], %r5;", "call.uni far;")
        .replace("nothing", "alone")
    )
    done = rewrite(fatbin(entry(TEXT, 90, TEXT_BYTES), entry(TEXT, 90, hidden.encode())), Options())
    assert hooks(done) == {"store": Hook.ENTRY | Hook.PTX, "nothing": MARKED, "alone": MARKED}
    assert "far" in next(kernel.reason for kernel in done.kernels if kernel.name == "store")


@pytest.mark.parametrize("kind", ["text", "code"])
def test_no_kernel_is_said_to_be_marked_when_the_driver_may_take_a_part_that_cannot_be_read(kind: str) -> None:
    if kind == "text":
        good, bad = entry(TEXT, 90, TEXT_BYTES), entry(TEXT, 90, TEXT_BYTES + b"// caf\xe9", flags=EXACT)
    else:
        good, bad = entry(ELF, 90, gpu_images.cubin()), entry(ELF, 90, gpu_images.cubin()[:64], flags=EXACT)
    assert rewrite(fatbin(good), Options(sass_marks=True)).is_changed
    for image in (fatbin(good, bad), fatbin(bad, good)):
        done = rewrite(image, Options(sass_marks=True))
        assert unchanged(done, image)
        reasons = {kernel.name: kernel.reason for kernel in done.kernels}
        assert reasons.keys() == {"", "store", "nothing"}
        assert reasons["store"].startswith("a part of the image cannot be read: "), reasons
        encode(done, KEY)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "no bytes"), (b"what", "passed through"), (b"\x7fELF", "4 bytes"), (fatbin(), "no code for sm_90"), (fatbin(entry(ELF, 80, bytes(64))), "no code for sm_90"),
        (fatbin(entry(ELF, 90, bytes(64))), "no 64-bit"), (fatbin(entry(TEXT, 90, b"nonsense")), ""), (b".version 8.0\n.target sm_90\n{{{", ""),
        (fatbin(entry(ELF, 90, bytes(64), flags=gpu_images.ZSTD, unpacked=99)), "zstd"), (fatbin()[:12], "12 bytes"), (b"\xb1\x43\x62\x46\x01" + bytes(19), "wrapper"),
    ],
)  # fmt: skip
def test_image_stays_as_it_is_and_says_why_when_it_cannot_be_read(image: bytes, said: str) -> None:
    done = rewrite(image, Options())
    assert unchanged(done, image)
    (kernel,) = done.kernels
    assert Hook.LEFT_ALONE in kernel.hooks
    assert said in kernel.reason
    assert kernel.reason
    encode(done, KEY)


def test_image_for_another_device_stays_as_it_is_when_it_is_a_cubin_or_text() -> None:
    for image in (gpu_images.cubin(), TEXT_BYTES):
        done = rewrite(image, Options(arch=80))
        assert unchanged(done, image)
        assert "no code for sm_80" in done.kernels[0].reason


def test_nothing_is_changed_when_no_hook_is_asked_for() -> None:
    for image in (gpu_images.cubin(), TEXT_BYTES):
        assert unchanged(rewrite(image, Options(entry=False, exit=False, marks=False)), image)


def test_image_stays_as_it_is_when_policy_says_that_a_kernel_is_opaque() -> None:
    named = PTX.replace("nothing", "_ZN8cublasLt7nothingEv").encode()
    done = rewrite(named, Options())
    assert unchanged(done, named), "the image is of that library, not the kernel alone"
    assert hooks(done) == {"store": Hook.OPAQUE, "_ZN8cublasLt7nothingEv": Hook.OPAQUE}
    assert rewrite(named, Options(opaque=())).is_changed


@pytest.mark.parametrize("kind", ["text", "code"])
def test_kernel_stays_as_it_is_and_the_others_do_not_when_it_is_denied(kind: str) -> None:
    image = TEXT_BYTES if kind == "text" else gpu_images.cubin()
    done = rewrite(image, Options(deny=("noth*",)))
    assert done.is_changed
    denied, hooked = (
        next(k for k in done.kernels if k.name == name) for name in ("nothing", "store")
    )
    assert Hook.LEFT_ALONE in denied.hooks
    assert not denied.hooks.is_hooked
    assert denied.reason == "denied by name"
    assert Hook.ENTRY in hooked.hooks
    all_denied = rewrite(image, Options(deny=("*",)))
    assert unchanged(all_denied, image)


def test_cubin_is_not_handed_out_when_it_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite_room, "first_difference", lambda *_: "one bit")
    done = rewrite(gpu_images.cubin(), Options())
    assert unchanged(done, gpu_images.cubin())
    assert all("one bit" in kernel.reason for kernel in done.kernels)


def test_text_is_not_handed_out_when_the_assembler_refuses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewritten = rewrite_room.rewrite_ptx

    def broken(text: str, **asked: object) -> object:
        done = rewritten(text, **asked)  # type: ignore[arg-type]
        return dataclasses.replace(done, text=done.text + "\nnot PTX")

    gpu_images.cubin()  # skips where there is no assembler
    monkeypatch.setattr(rewrite_room, "rewrite_ptx", broken)
    done = rewrite(TEXT_BYTES, Options())
    assert unchanged(done, TEXT_BYTES)
    assert {kernel.reason for kernel in done.kernels} == {"the assembler refuses what came out"}


def test_assembler_says_nothing_when_it_is_missing_or_refuses_the_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu_images.cubin()
    assert ptx_check.is_assembled(TEXT_BYTES, TEXT_BYTES, "sm_90")
    assert not ptx_check.is_assembled(b"not PTX", TEXT_BYTES, "sm_90")
    assert ptx_check.is_assembled(b"not PTX", b"nor this", "sm_90"), "it may be older than the text"

    def missing(*_: object, **__: object) -> bytes:
        raise EnvironmentRefused("no assembler")

    monkeypatch.setattr(ptx_check, "link_cubin", missing)
    assert ptx_check.is_assembled(b"not PTX", TEXT_BYTES, "sm_90")


def _crash(parts: Sequence[bytes], **_: object) -> bytes:
    faulthandler.disable()  # in the child: what it says is expected
    if parts[0] == b"crash":
        ctypes.string_at(0)
    return b""


def _hang(parts: Sequence[bytes], **_: object) -> bytes:
    while parts[0] == b"hang":
        pass
    return b""


def test_assembler_costs_nothing_but_its_bound_when_it_crashes_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx_check, "link_cubin", _crash)
    assert not ptx_check.is_assembled(b"crash", b"good", "sm_90"), "the driver's compiler would, too"
    assert ptx_check.is_assembled(b"crash", b"crash", "sm_90")
    monkeypatch.setattr(ptx_check, "link_cubin", _hang)
    monkeypatch.setattr(config, "PTX_CHECK_S", 0.2)
    assert ptx_check.is_assembled(b"hang", b"good", "sm_90"), "nothing is known of it"


def test_arch_specific_text_is_assembled_for_its_own_device_when_it_is_rewritten() -> None:
    special = PTX.replace("sm_90", "sm_90a")
    gpu_images.cubin("sm_90a", special)
    done = rewrite(fatbin(entry(TEXT, 90, special.encode(), flags=EXACT)), Options())
    assert hooks(done) == {"store": MARKED, "nothing": MARKED}
    assert rewrite(special.encode(), Options()).is_changed
    assert unchanged(rewrite(special.encode(), Options(arch=100)), special.encode())


def test_missing_unpacker_is_an_error_and_no_answer_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = fatbin(packed_entry(TEXT, 90, TEXT_BYTES))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(EnvironmentRefused, match="extra"):
        rewrite(image, Options())


def test_lack_of_memory_is_no_answer_when_an_image_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    image = fatbin(packed_entry(TEXT, 90, TEXT_BYTES))

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("zstandard.ZstdDecompressor", lambda **_: type("Full", (), {"stream_reader": full})())
    with pytest.raises(MemoryError):
        rewrite(image, Options())


@pytest.mark.parametrize(("bound", "most", "said"), [("IMAGE_BYTES_MAX", 1000, "bytes"), ("IMAGE_SLOTS_MAX", 1, "slots"), ("IMAGE_KERNELS_MAX", 1, "kernels")])
def test_image_stays_as_it_is_when_the_result_would_be_beyond_a_bound(monkeypatch: pytest.MonkeyPatch, bound: str, most: int, said: str) -> None:
    assert len(TEXT_BYTES) < 1000 < len(rewrite(TEXT_BYTES, Options()).image)
    monkeypatch.setattr(config, bound, most)
    done = rewrite(TEXT_BYTES, Options())
    assert unchanged(done, TEXT_BYTES)
    (kernel,) = done.kernels
    assert f"at most {most} {said}" in kernel.reason
    encode(done, KEY)


def test_result_is_the_same_when_an_image_is_rewritten_again() -> None:
    for image in (TEXT_BYTES, gpu_images.cubin(), fatbin(entry(ELF, 90, gpu_images.cubin()))):
        first, second = (encode(rewrite(image, Options(exit=True)), KEY) for _ in range(2))
        assert first == second


def test_hooked_image_is_not_hooked_again_when_it_is_rewritten_twice() -> None:
    once = rewrite(gpu_images.cubin(), Options())
    twice = rewrite(once.image, Options())
    assert unchanged(twice, once.image), "its first instruction is a branch now"


def test_nothing_is_raised_and_all_is_reported_when_corpus_images_are_damaged() -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    corpus = Path(__file__).parent / "corpus" / "fuzz" / "rewrite"
    for path in sorted(corpus.iterdir()):
        whole = path.read_bytes()
        for _ in range(15):
            damaged = bytearray(whole)
            for _ in range(rng.randrange(1, 6)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            done = rewrite(bytes(damaged), Options(exit=True))
            encode(done, KEY)
            assert done.kernels or not done.is_changed
            assert done.is_changed or done.image == bytes(damaged)

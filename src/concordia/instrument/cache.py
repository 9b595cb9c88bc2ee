"""Rewritten images on disk, floor 3.

Owns: the file `<root>/<options key>/<image key>.image`, which the shim maps and reads, and the
bound of all of them. Promises: a file is whole or not there (written beside it, synced, renamed);
one that differs in any bit from what was written, or is another image's, is refused and removed;
the folder is this user's alone; several rewriters may work in it at the same time. Called by the
rewriter and by `concordia modules`. It does not know how an image is rewritten.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import google_crc32c
import xxhash

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.cache_folder import SUFFIX, CacheFolder, check_key
from concordia.instrument.report import CONTROL_BLOCK, Hook, KernelReport, Rewritten, Slot, SlotKind

MAGIC: Final = b"CNCIMG01"
VERSION: Final = 3
UNCHANGED: Final = 1  # flag: load the original; the file has no image
HEADER_BYTES: Final = 64
# magic, version, flags, image bytes, slots, kernels, kernel bytes, CRC32C of the rest, zero, key
_HEADER: Final = struct.Struct("<8sIIQIIQIIQQ")
_SLOT: Final = struct.Struct("<QII")
_KERNEL: Final = struct.Struct("<IIHH")
_ALL_HOOKS: Final = sum(Hook)
_DIGITS: Final = frozenset(b"0123456789abcdef")
_PART: Final = ".part"


def image_key(image: bytes | memoryview) -> str:
    """The name of an image: its XXH3 of 128 bits, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(image)


def key_halves(key: str) -> tuple[int, int]:
    """The two numbers of a key."""
    check_key(key)
    return int(key[:16], 16), int(key[16:], 16)


def check_bounds(image_bytes: int, slots: int, kernels: int) -> None:
    """Raises ImageRefused for more than a file may have."""
    for found, most, what in (
        (image_bytes, config.IMAGE_BYTES_MAX, "bytes"),
        (slots, config.IMAGE_SLOTS_MAX, "slots"),
        (kernels, config.IMAGE_KERNELS_MAX, "kernels"),
    ):
        if found > most:
            raise ImageRefused(f"an image has at most {most} {what}, not {found}")


def encode(rewritten: Rewritten, key: str) -> bytes:
    """The file of the image of this key. Raises ImageRefused when it would be beyond a bound."""
    image = rewritten.image if rewritten.is_changed else b""
    slots = rewritten.slots if rewritten.is_changed else ()
    check_bounds(len(image), len(slots), len(rewritten.kernels))
    kernels = b"".join(map(_packed_kernel, rewritten.kernels))
    for slot in slots:
        _check_slot(slot, image)
    body = b"".join(_SLOT.pack(slot.offset, slot.kind, slot.name) for slot in slots)
    body += kernels + image
    flags = 0 if rewritten.is_changed else UNCHANGED
    return (
        _HEADER.pack(
            *(MAGIC, VERSION, flags, len(image), len(slots), len(rewritten.kernels)),
            *(len(kernels), google_crc32c.value(body), 0, *key_halves(key)),
        )
        + body
    )


def decode(data: bytes, key: str) -> Rewritten:
    """What the file of the image of this key says. Raises ImageRefused for anything that `encode`
    did not write of it; `image` is empty when it was not changed.
    """
    if len(data) < HEADER_BYTES:
        raise ImageRefused(f"a cache file has {HEADER_BYTES} bytes at least, not {len(data)}")
    magic, version, flags, image_bytes, slot_count, kernel_count, kernels_bytes, crc, zero, *of = (
        _HEADER.unpack_from(data)
    )
    if magic != MAGIC or version != VERSION or zero:
        raise ImageRefused(f"no cache file of version {VERSION}: it begins with {data[:16]!r}")
    if tuple(of) != key_halves(key):
        raise ImageRefused(f"the file of another image: {of[0]:016x}{of[1]:016x}")
    if flags & ~UNCHANGED or bool(flags) == bool(image_bytes) or (flags and slot_count):
        raise ImageRefused(f"flags {flags:#x} with {image_bytes} bytes of image")
    check_bounds(image_bytes, slot_count, kernel_count)
    body_bytes = slot_count * _SLOT.size + kernels_bytes + image_bytes
    if len(data) != HEADER_BYTES + body_bytes:
        raise ImageRefused(f"{HEADER_BYTES + body_bytes} bytes expected, found {len(data)}")
    body = data[HEADER_BYTES:]
    if google_crc32c.value(body) != crc:
        raise ImageRefused("the checksum differs")
    kernels_at = slot_count * _SLOT.size
    image = body[kernels_at + kernels_bytes :]
    slots = tuple(_unpacked_slot(raw, image) for raw in _SLOT.iter_unpack(body[:kernels_at]))
    kernels = tuple(_unpacked_kernels(body[kernels_at : kernels_at + kernels_bytes], kernel_count))
    return Rewritten(image, slots, kernels, is_changed=not flags)


class ImageCache:
    """The files of one set of options."""

    def __init__(
        self, root: Path, options_key: str, *, bytes_max: int = config.IMAGE_CACHE_BYTES_MAX
    ) -> None:
        self._place = CacheFolder(root, options_key)
        self.root, self.folder = root, self._place.path
        self._bytes_max = bytes_max

    def path(self, key: str) -> Path:
        """Where the file of an image lies, or would."""
        return self._place.file(key)

    def load(self, key: str) -> Rewritten | None:
        """What was written for this image; None when nothing was, or what was is damaged."""
        path = self.path(key)
        try:
            data = path.read_bytes()
            return decode(data, key)
        except OSError:
            return None
        except ImageRefused:
            with contextlib.suppress(OSError):  # of a folder that cannot be written
                path.unlink(missing_ok=True)
            return None

    def store(self, key: str, rewritten: Rewritten) -> int:
        """Write the file of an image; its size. Two that store the same image write the same.
        Raises OSError or ImageRefused, and leaves nothing.
        """
        data = encode(rewritten, key)
        descriptor, name = tempfile.mkstemp(suffix=_PART, prefix=f"{os.getpid()}-", dir=self.folder)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:  # mkstemp made it 0600
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.path(key))
        finally:
            temporary.unlink(missing_ok=True)
        return len(data)

    def trim(self) -> int:
        """Remove what was unused longest until all options' files together are within the bound,
        and what killed rewriters left; the bytes that stay.
        """
        found = []
        for path in _files(self.root):
            with contextlib.suppress(FileNotFoundError):  # another rewriter trims, too
                if path.suffix == SUFFIX:
                    about = path.stat()
                    found.append((max(about.st_atime, about.st_mtime), about.st_size, path))
                elif path.suffix == _PART and not _is_alive(path.name.partition("-")[0]):
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._bytes_max:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _check_slot(slot: Slot, image: bytes) -> None:
    """Raises ImageRefused when an address written there would not lie where it should."""
    end = slot.offset + slot.bytes_used
    if slot.offset < 0 or end > len(image) or slot.name != CONTROL_BLOCK:
        raise ImageRefused(f"{slot} in an image of {len(image)} bytes")
    if slot.kind is SlotKind.TEXT and not _DIGITS.issuperset(image[slot.offset : end]):
        raise ImageRefused(f"no digits at {slot}")


def _unpacked_slot(raw: tuple[int, int, int], image: bytes) -> Slot:
    offset, kind, name = raw
    try:
        slot = Slot(offset, SlotKind(kind), name)
    except ValueError:
        raise ImageRefused(f"a slot of kind {kind}") from None
    _check_slot(slot, image)
    return slot


def _packed_kernel(kernel: KernelReport) -> bytes:
    name = _cut(kernel.name, config.KERNEL_NAME_BYTES_MAX)
    reason = _cut(kernel.reason, config.KERNEL_REASON_BYTES_MAX)
    packed = _KERNEL.pack(kernel.hooks, kernel.registers, len(name), len(reason))
    return packed + name + reason


def _cut(text: str, bytes_max: int) -> bytes:
    """As many whole characters as fit."""
    return text.encode("utf-8", "replace")[:bytes_max].decode("utf-8", "ignore").encode()


def _unpacked_kernels(raw: bytes, count: int) -> Iterator[KernelReport]:
    at = 0
    for _ in range(count):
        if len(raw) - at < _KERNEL.size:
            raise ImageRefused("the kernel table ends within a kernel")
        hooks, registers, name_bytes, reason_bytes = _KERNEL.unpack_from(raw, at)
        at += _KERNEL.size
        end = at + name_bytes + reason_bytes
        if end > len(raw) or hooks & ~_ALL_HOOKS or reason_bytes > config.KERNEL_REASON_BYTES_MAX:
            raise ImageRefused(f"a kernel with hooks {hooks:#x} and {name_bytes} bytes of name")
        try:
            name, reason = raw[at : at + name_bytes].decode(), raw[at + name_bytes : end].decode()
        except UnicodeDecodeError as error:
            raise ImageRefused(f"the name of a kernel is UTF-8: {error}") from None
        yield KernelReport(name, Hook(hooks), registers, reason)
        at = end
    if at != len(raw):
        raise ImageRefused(f"{len(raw) - at} bytes behind the kernel table")


def _files(root: Path) -> Iterator[Path]:
    for folder in root.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(FileNotFoundError):
                yield from folder.iterdir()


def _is_alive(pid: str) -> bool:
    return pid.isdecimal() and Path(f"/proc/{pid}").exists()

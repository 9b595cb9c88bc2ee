"""Pausing a program's GPU at a kernel boundary, floor 7.

Owns: the calls into the shim of this process, and asking the processes of a run from outside, by
their page (gate_page). Promises: after `pause` no kernel that was launched before runs any more,
and none starts until `resume` or the shim's own bound; at the bound nothing stays paused, and the
error says which process waited for what. Called by checkpoints of programs and by tests. What a
launch waits for is native/gate.c's.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from concordia import config
from concordia.errors import EnvironmentRefused, UsageError, WaitTimeout
from concordia.integrations.program.gate_page import (
    HEADER_BYTES,
    MAGIC,
    PAGE,
    PAGE_BYTES,
    SLOT_BYTES,
)

_WANTED_AT: Final = 8
_SLOT: Final = struct.Struct("<IIIIIIQ96s")  # pid, seen, code, streams, captured, pad, ns, text
_DONE, _LATE, _ALREADY, _NOT_ACTIVE = range(4)
_SAYS: Final = {_ALREADY: "it is paused already", _NOT_ACTIVE: "the shim is switched off in it"}
_FUTEX: Final = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAKE: Final = 1


@dataclass(frozen=True, slots=True)
class Paused:
    """One process's GPU at rest: how long that took, and how many streams were waited for."""

    pid: int
    latency_ns: int
    streams: int
    captured: int  # left out, because they are being captured


class _Report(ctypes.Structure):
    _fields_ = (
        ("latency_ns", ctypes.c_uint64),
        ("streams", ctypes.c_uint32),
        ("captured", ctypes.c_uint32),
        ("waited_for", ctypes.c_char * 96),
    )


def pause(timeout_s: float = config.GATE_PAUSE_S) -> Paused:
    """Bring this process's GPU work to a kernel boundary and hold what other threads launch; the
    calling thread may go on. Raises WaitTimeout, with nothing held, or UsageError.
    """
    shim, report = _shim(), _Report()
    code = shim.concordia_pause(ctypes.c_uint64(int(timeout_s * 1000)))
    shim.concordia_pause_report(ctypes.byref(report))
    _check(os.getpid(), code, report.waited_for.decode(errors="replace"), timeout_s)
    return Paused(os.getpid(), report.latency_ns, report.streams, report.captured)


def resume() -> None:
    """Let launches go on."""
    _shim().concordia_resume()


def is_paused() -> bool:
    """Whether launches of this process are held; a pause ends by itself at the shim's bound."""
    return bool(_shim().concordia_is_paused())


@contextlib.contextmanager
def paused(timeout_s: float = config.GATE_PAUSE_S) -> Iterator[Paused]:
    """This process's GPU at rest while the block runs."""
    found = pause(timeout_s)
    try:
        yield found
    finally:
        resume()


class RunGate:
    """The processes of a run, asked from outside."""

    def __init__(self, run: Path) -> None:
        try:
            with (run / PAGE).open("r+b") as file:
                self._page = mmap.mmap(file.fileno(), PAGE_BYTES)
        except (OSError, ValueError) as error:
            raise UsageError(f"{run} has no gate: {error}") from None
        if int.from_bytes(self._page[:8], "little") != MAGIC:
            self._page.close()
            raise UsageError(f"{run / PAGE} is no gate of this version")

    def close(self) -> None:
        self._page.close()

    def pause(self, timeout_s: float = config.GATE_PAUSE_S) -> tuple[Paused, ...]:
        """Pause every process that has a context. Raises WaitTimeout, with all of them resumed,
        when one did not come to rest.
        """
        struct.pack_into("<I", self._page, _WANTED_AT + 4, int(timeout_s * 1000))
        word = self._ask(is_paused=True)
        try:
            return tuple(self._answers(word, timeout_s))
        except (WaitTimeout, UsageError):
            self.resume()
            raise

    def resume(self) -> None:
        """Let all go on."""
        self._ask(is_paused=False)

    def processes(self) -> tuple[int, ...]:
        """Those that would be paused."""
        return tuple(slot[0] for slot in self._slots())

    def _ask(self, *, is_paused: bool) -> int:
        """Write the next word that says so, and wake who waits for it."""
        (word,) = struct.unpack_from("<I", self._page, _WANTED_AT)
        word = (word + 1 if (word & 1) != is_paused else word + 2) & 0xFFFFFFFF
        struct.pack_into("<I", self._page, _WANTED_AT, word)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._page, _WANTED_AT))
        number = _FUTEX.get(os.uname().machine)
        if number is None:
            raise EnvironmentRefused(f"no pause on a {os.uname().machine}")
        ctypes.CDLL(None).syscall(
            ctypes.c_long(number), ctypes.c_void_p(at), _FUTEX_WAKE, 2**31 - 1, None, None, 0
        )
        return int(word)

    def _answers(self, word: int, timeout_s: float) -> Iterator[Paused]:
        """One of each living process, within the bound and the time that a thread needs to run."""
        deadline = time.monotonic() + timeout_s + config.WAIT_PARK_S
        for pid in self.processes():
            while (slot := self._slot_of(pid)) is not None and slot[1] != word:
                if time.monotonic() > deadline:
                    raise WaitTimeout(f"process {pid} did not answer within {timeout_s} s")
                time.sleep(config.PROGRAM_POLL_S)
            if slot is not None:  # else it has ended meanwhile
                _check(pid, slot[2], slot[7].rstrip(b"\0").decode(errors="replace"), timeout_s)
                yield Paused(pid, slot[6], slot[3], slot[4])

    def _slots(self) -> Iterator[tuple[Any, ...]]:
        for at in range(HEADER_BYTES, PAGE_BYTES, SLOT_BYTES):
            slot = _SLOT.unpack_from(self._page, at)
            if slot[0] and Path(f"/proc/{slot[0]}").exists():
                yield slot

    def _slot_of(self, pid: int) -> tuple[Any, ...] | None:
        return next((slot for slot in self._slots() if slot[0] == pid), None)


def _check(pid: int, code: int, waited_for: str, timeout_s: float) -> None:
    if code == _LATE:
        raise WaitTimeout(f"process {pid} is not at rest after {timeout_s} s: {waited_for}")
    if code != _DONE:
        raise UsageError(f"process {pid} cannot be paused: {_SAYS.get(code, f'code {code}')}")


def _shim() -> Any:
    """The library that is loaded, never one that would be loaded for this."""
    try:
        library = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        library.concordia_pause.restype = ctypes.c_int
    except (OSError, AttributeError):
        raise UsageError(
            "this process has no gate: start its program by `concordia run -- PROGRAM`, and use "
            "its GPU first"
        ) from None
    return library

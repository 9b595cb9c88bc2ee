"""The eye on all replicas: one thread that gathers samples and asks their detectors, floor 6.

Owns: the thread, the descriptors that it sleeps on, and what is read of /proc and of the journal's
board. Promises: the end of a process wakes it at once, all else is looked at every WATCH_PERIOD_S,
and what keeps us from looking ends no watch; a fault is told once per replica, on this thread;
after `remove` the replica is not touched again. Called by the replica set. It decides nothing and
kills nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from concordia import abi, config
from concordia.errors import ConcordiaError
from concordia.journal.control import Control
from concordia.journal.folder import Folder
from concordia.journal.segment import Board
from concordia.recovery.deadline import StepDeadline
from concordia.recovery.detector import Detector, ProcessSample, Sample, StreamSample
from concordia.recovery.fault import Fault, FaultKind
from concordia.serving.heartbeat import Heartbeat
from concordia.serving.process import Process, read_process, read_thread_times
from concordia.serving.replica import Replica

log = logging.getLogger(__name__)

OnFault = Callable[[Replica, Fault], None]
_TITLE: Final = "VLLM::"
_SPAWNED: Final = b"multiprocessing.spawn"
_HELPER: Final = b"resource_tracker"
# a child that is about to run another program looks like its parent for a moment
_AGE_MIN_S: Final = 2.0


class Watch:
    """Replicas are added when they are loaded and removed before they are fenced."""

    def __init__(self, on_fault: OnFault, journal: pathlib.Path | None) -> None:
        self._on_fault = on_fault
        self._home = Folder(journal) if journal is not None else None
        # inode, so that a new file under the name is seen
        self._board: tuple[int, Board] | None = None
        self._entries: dict[int, _Entry] = {}
        self._deadlines: dict[str, StepDeadline] = {}
        self._lock = threading.Lock()  # held while entries are looked at
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def add(self, replica: Replica) -> None:
        """Look at this replica from now on; what it consists of is known when this returns."""
        detector = Detector(replica.incarnation, read_thread_times, self._deadlines)
        entry = _Entry(replica, detector, Heartbeat(replica))
        with self._lock:
            try:
                self._refresh(entry, time.monotonic_ns())
            except OSError:
                self._forget(entry)
                raise
            self._entries[replica.incarnation] = entry
        os.eventfd_write(self._wake, 1)

    def remove(self, replica: Replica) -> None:
        """Look away; when this returns, nothing here touches the replica's tree."""
        with self._lock:
            entry = self._entries.pop(replica.incarnation, None)
            if entry is not None:
                self._forget(entry)

    def hurry(self, replica: Replica) -> None:
        """Ask the replica's server now, not at the next beat."""
        with self._lock:
            entry = self._entries.get(replica.incarnation)
        if entry is not None:
            entry.heartbeat.hurry()

    def stop(self) -> None:
        """End the thread; may be repeated."""
        if self._is_stopping:
            return
        self._is_stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(config.KILL_S)
        with self._lock:
            for entry in self._entries.values():
                self._forget(entry)
            self._entries.clear()
        self._selector.close()
        os.close(self._wake)
        if self._board is not None:
            self._board[1].close()

    def _run(self) -> None:
        while not self._is_stopping:
            events = self._selector.select(config.WATCH_PERIOD_S)
            now_ns = time.monotonic_ns()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            ended = {key.data for key, _ in events if key.data is not None}
            found: list[tuple[Replica, Fault]] = []
            with self._lock:
                for entry in list(self._entries.values()):
                    fault = self._try_look(entry, now_ns, ended)
                    if fault is not None:
                        del self._entries[entry.replica.incarnation]
                        self._forget(entry)
                        found.append((entry.replica, fault))
            for replica, fault in found:
                self._on_fault(replica, fault)

    def _try_look(self, entry: _Entry, now_ns: int, ended: set[tuple[int, int]]) -> Fault | None:
        """Look, whatever keeps us from it: an error of this process, such as too many open files,
        is no fault of an engine.
        """
        try:
            return self._look(entry, now_ns, ended)
        except OSError as error:
            if now_ns >= entry.complained_ns + int(config.TREE_PERIOD_S * 1e9):
                entry.complained_ns = now_ns
                log.error("%s cannot be looked at: %s", entry.replica.name, error)
            return None

    def _look(self, entry: _Entry, now_ns: int, ended: set[tuple[int, int]]) -> Fault | None:
        replica = entry.replica
        for incarnation, pid in ended:
            if incarnation == replica.incarnation:
                name = entry.essential[pid].name if pid in entry.essential else "process"
                detail = f"{name} ({pid}) of {replica.name} ended"
                return Fault(FaultKind.PROCESS_DEATH, replica.incarnation, now_ns, detail, pid)
        if now_ns >= entry.refresh_ns:
            self._refresh(entry, now_ns)
        sample = Sample(
            now_ns=now_ns,
            processes=[_state_of(process) for process in entry.essential.values()],
            streams=[s for c in entry.controls if (s := _read_stream(c, entry)) is not None],
            api=entry.heartbeat.sample(),
            requests_in_flight=replica.requests_in_flight,
        )
        fault = entry.detector.observe(sample)
        # Reading took a moment, and what it found may be younger than the look's beginning.
        return None if fault is None else replace(fault, detected_ns=time.monotonic_ns())

    def _refresh(self, entry: _Entry, now_ns: int) -> None:
        """Find new processes, streams and shared memory; costs milliseconds, so once a second."""
        entry.refresh_ns = now_ns + int(config.TREE_PERIOD_S * 1e9)
        tree = entry.replica.tree
        for process in tree.refresh():
            if process.pid not in entry.essential and _is_essential(process, tree.leader):
                entry.essential[process.pid] = process
                descriptor = tree.pidfd(process.pid)
                if descriptor is not None:
                    # A copy: the tree closes its own when the process is gone, perhaps before we
                    # look.
                    copy = os.dup(descriptor)
                    entry.descriptors.append(copy)
                    data = (entry.replica.incarnation, process.pid)
                    self._selector.register(copy, selectors.EVENT_READ, data)
        workers = [p.pid for p in entry.essential.values() if p.name.startswith(f"{_TITLE}Worker")]
        others = [pid for pid in entry.essential if pid != tree.leader]
        entry.step_pids = tuple(workers or others or [tree.leader])
        if now_ns >= entry.record_ns:
            entry.record_ns = now_ns + int(config.SHARED_PERIOD_S * 1e9)
            tree.record_shared_names()
        entry.controls = self._controls(entry.replica.incarnation)

    def _controls(self, incarnation: int) -> list[Control]:
        """The streams that this replica writes."""
        board = self._attach()
        if board is None:
            return []
        found = []
        for control in board.in_use():
            with contextlib.suppress(ConcordiaError):
                if control.state == abi.STREAM_OPEN and control.identity().replica == incarnation:
                    found.append(control)
        return found

    def _attach(self) -> Board | None:
        """The board, or None while there is none; a journal that was made anew is noticed."""
        if self._home is None:
            return None
        try:
            inode = self._home.board.stat().st_ino
            if self._board is None or self._board[0] != inode:
                self._board = (inode, Board.attach(self._home.board))
        except (OSError, ConcordiaError):
            return None
        return self._board[1]

    def _forget(self, entry: _Entry) -> None:
        entry.heartbeat.stop()
        for descriptor in entry.descriptors:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(descriptor)
            os.close(descriptor)
        entry.descriptors.clear()


@dataclass(slots=True)
class _Entry:
    replica: Replica
    detector: Detector
    heartbeat: Heartbeat
    essential: dict[int, Process] = field(default_factory=dict)
    descriptors: list[int] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    step_pids: tuple[int, ...] = ()
    refresh_ns: int = 0
    record_ns: int = 0
    complained_ns: int = 0


def _is_essential(process: Process, leader: int) -> bool:
    """Whether the engine is lost with this process; compilers and name trackers come and go."""
    if process.pid == leader or process.name.startswith(_TITLE):
        return True
    if _age_s(process) < _AGE_MIN_S:
        return False
    try:
        command = pathlib.Path(f"/proc/{process.pid}/cmdline").read_bytes()
        own = pathlib.Path(f"/proc/{leader}/cmdline").read_bytes()
    except OSError:
        return False
    is_python_child = _SPAWNED in command or (process.parent == leader and command == own)
    return is_python_child and _HELPER not in command


def _age_s(process: Process) -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.start / os.sysconf("SC_CLK_TCK")


def _state_of(known: Process) -> ProcessSample:
    process = read_process(known.pid)
    if process is None or process.start != known.start or process.is_ending:
        return ProcessSample(known.pid, known.name, "X")
    return ProcessSample(known.pid, process.name, process.state)


def _read_stream(control: Control, entry: _Entry) -> StreamSample | None:
    """The step words, or None when they changed while they were read."""
    started = control.word("step_started")
    sample = StreamSample(
        pids=entry.step_pids,
        label=control.label,
        step_started=started,
        step_tokens=control.word("step_tokens"),
        step_started_ns=control.word("step_started_ns"),
        step_done=control.word("step_done"),
        step_done_ns=control.word("step_done_ns"),
        waiting_count=control.word("waiting_count"),
    )
    is_whole = (
        control.word("step_started") == started and control.word("step_done") == sample.step_done
    )
    return sample if is_whole and started else None

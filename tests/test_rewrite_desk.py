"""instrument/rewrite_desk.py, rewrite_job.py: a rewriter answers everybody in time, whatever images and clients do.

Invariants: an image that is rewritten lies in the cache; whatever ends one rewrite ends no other and not the rewriter; a slow one is
answered with "later" and done all the same; the same image is rewritten once; malformed requests cost their own connection only.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import random
import socket
import struct
import time

import pytest

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument.cache import ImageCache, image_key
from concordia.instrument.options import Options
from concordia.instrument.report import Hook
from concordia.instrument.request import Request, Status, parse_reply, sealed_memory
from concordia.instrument.rewrite_desk import RewriteDesk
from rewriter_process import Served, served
from waiting import until

pytest_plugins = ["rewriter_fixtures"]


def test_image_lies_in_the_cache_when_the_rewriter_says_ready(tmp_path: pathlib.Path) -> None:
    with served(tmp_path) as one:
        assert one.ask(b"upper me") is Status.READY
        found = one.cache.load(image_key(b"upper me"))
        assert found is not None
        assert found.image == b"UPPER ME"
        assert [(k.name, k.hooks, k.registers) for k in found.kernels] == [("upper", Hook.ENTRY, 90)]
        assert one.ask(b"upper me") is Status.READY
        assert one.rewrites("upper") == 1, "the second time it was there"
        one.cache.path(image_key(b"upper me")).write_bytes(b"damaged")
        assert one.ask(b"upper me") is Status.READY
        assert one.rewrites("upper") == 2, "a damaged file is made again"


@pytest.mark.parametrize("word", ["crash", "raise", "mistake", "die", "eat"])
def test_next_image_is_rewritten_when_one_ends_its_process(tmp_path: pathlib.Path, word: str) -> None:
    with served(tmp_path) as one:
        assert one.ask(word.encode()) is Status.REFUSED
        assert one.ask(word.encode()) is Status.REFUSED
        assert one.rewrites(word) == 1, "it is not tried again in this run"
        assert one.ask(b"upper x") is Status.READY


@pytest.mark.parametrize("word", ["raise", "mistake"])
def test_error_is_told_in_one_line_when_it_ends_a_rewrite(tmp_path: pathlib.Path, word: str, capfd: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path) as one:
        assert one.ask(word.encode()) is Status.REFUSED
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "as asked" in line]
    assert line.startswith(f"rewriter: {image_key(word.encode())}: {'Type' if word == 'mistake' else 'Value'}Error: as asked")
    assert ("rewriter_child.py:" in line) == (word == "mistake")


def test_image_is_rewritten_when_somebody_claimed_its_key_for_another(tmp_path: pathlib.Path) -> None:
    image = b"upper mine"
    with served(tmp_path) as one:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer, sealed_memory(b"x" * len(image)) as memory:
                peer.settimeout(30)
                peer.connect(str(one.socket))
                socket.send_fds(peer, [Request(len(image), image_key(image)).pack()], [memory])
                assert parse_reply(peer.recv(64)) is Status.LATER
        assert one.ask(image) is Status.READY
        assert one.rewrites("upper") == 1


class _Exhausted:
    """A listener of a process that has no descriptors left; stops the desk at the third try."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self.tries, self.desk = listener, 0, None

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> None:
        self.tries += 1
        if self.tries == 3:
            assert self.desk
            self.desk.stop()
        raise OSError(errno.EMFILE, "Too many open files")

    def close(self) -> None:
        self._listener.close()


def test_rewriter_waits_when_it_has_no_descriptor_for_a_client(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    desk = RewriteDesk(run, ImageCache(tmp_path / "images", Options().key()), Options())
    exhausted = _Exhausted(desk._listener)
    exhausted.desk, desk._listener = desk, exhausted
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(desk.path))
        begin = time.monotonic()
        desk.serve()
        assert exhausted.tries == 3
        assert time.monotonic() - begin >= 2 * config.REWRITE_ACCEPT_PAUSE_S
    desk.close()


def test_rewriter_rests_when_nobody_asks(run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = RewriteDesk(run, ImageCache(tmp_path / "images", Options().key()), Options())
    pauses: list[float] = []

    def select(pause: float) -> list[None]:
        pauses.append(pause)
        if len(pauses) == 3:
            desk.stop()
        return []

    monkeypatch.setattr(desk._selector, "select", select)
    desk.serve()
    assert all(pause > 1 for pause in pauses), pauses
    desk.close()


def test_endless_rewrite_is_killed_and_refused_when_its_bound_is_over(tmp_path: pathlib.Path) -> None:
    with served(tmp_path, answer_s=30, rewrite_s=1.0) as one:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            looping = [pool.submit(one.ask, b"loop %d" % i) for i in range(2)]  # both workers
            until(lambda: one.rewrites("loop") == 2, 20)
            assert one.ask(b"upper x") is Status.READY
            assert [found.result(30) for found in looping] == [Status.REFUSED] * 2
        assert one.children() == []


def test_program_is_told_later_and_the_next_finds_it_when_a_rewrite_takes_long(tmp_path: pathlib.Path) -> None:
    gate = tmp_path / "gate"
    image = b"wait " + os.fsencode(gate)
    with served(tmp_path, answer_s=0.2) as one:
        begun = time.monotonic()
        assert one.ask(image) is Status.LATER
        assert time.monotonic() - begun < 10
        assert one.ask(image) is Status.LATER
        assert one.cache.load(image_key(image)) is None
        gate.touch()
        until(lambda: one.cache.load(image_key(image)) is not None, 20)
        assert one.ask(image) is Status.READY
        assert one.rewrites("wait") == 1


def test_image_is_rewritten_once_when_many_ask_for_it_at_once(tmp_path: pathlib.Path) -> None:
    gate = tmp_path / "gate"
    image = b"wait " + os.fsencode(gate)
    with served(tmp_path) as one, concurrent.futures.ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(one.ask, image) for _ in range(16)]
        until(lambda: one.rewrites("wait") == 1, 20)
        gate.touch()
        assert [found.result(30) for found in asked] == [Status.READY] * 16
        assert one.rewrites("wait") == 1


def _send(one: Served, data: bytes, descriptors: list[int]) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(str(one.socket))
        socket.send_fds(connection, [data], descriptors)
        try:
            return connection.recv(64)
        except ConnectionResetError:
            return b""


def test_leftovers_of_a_killed_rewriter_go_when_something_was_stored(tmp_path: pathlib.Path) -> None:
    with served(tmp_path) as one:
        assert one.ask(b"upper x") is Status.READY
        left = one.cache.folder / "999999999-x.part"  # of a process that is not there
        left.touch()
        assert one.ask(b"upper y") is Status.READY
        until(lambda: not left.exists(), 20)


def test_only_its_own_connection_ends_when_a_request_is_malformed(tmp_path: pathlib.Path) -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    image = b"upper x"
    good = Request(len(image), image_key(image)).pack()
    with served(tmp_path) as one, sealed_memory(image) as memory:
        open_before = len(os.listdir(f"/proc/{one.process.pid}/fd"))
        for data, count in [(good, 0), (good, 2), (good, 9), (good[:-1], 1), (b"x", 1), (good + b"p" * (1 << 17), 1), (bytes(32), 1)]:
            assert _send(one, data, [memory] * count) == b""
        for _ in range(200):
            damaged = bytearray(good)
            damaged[rng.randrange(8)] ^= 1 << rng.randrange(8)
            assert _send(one, bytes(damaged), [memory]) == b""
        unsealed = os.memfd_create("x")
        os.write(unsealed, image)
        for wrong in (unsealed, os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDWR)):
            assert parse_reply(_send(one, good, [wrong])) is Status.REFUSED
            os.close(wrong)
        longer = Request(len(image) + 1, image_key(image)).pack()
        assert parse_reply(_send(one, longer, [memory])) is Status.REFUSED
        another = Request(len(image), image_key(b"another")).pack()
        assert parse_reply(_send(one, another, [memory])) is Status.LATER
        assert one.cache.load(image_key(b"another")) is None, "a file is only ever of the image that names it"
        assert parse_reply(_send(one, good, [memory])) is Status.READY
        until(lambda: len(os.listdir(f"/proc/{one.process.pid}/fd")) == open_before, 20)


def test_others_are_served_when_a_client_says_nothing_or_goes(tmp_path: pathlib.Path) -> None:
    image = b"wait " + os.fsencode(tmp_path / "gate")
    with served(tmp_path) as one, contextlib.ExitStack() as stack:
        for _ in range(20):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            silent.connect(str(one.socket))
        with sealed_memory(image) as memory, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as gone:
            gone.connect(str(one.socket))
            socket.send_fds(gone, [Request(len(image), image_key(image)).pack()], [memory])
        until(lambda: one.rewrites("wait") == 1, 20)
        assert one.ask(b"upper x") is Status.READY
        (tmp_path / "gate").touch()
        until(lambda: one.cache.load(image_key(image)) is not None, 20)


def test_program_is_told_later_at_once_when_too_many_images_wait(tmp_path: pathlib.Path) -> None:
    gate = tmp_path / "gate"
    images = [b"wait " + os.fsencode(gate) + b"\0%d" % i for i in range(3)]
    with served(tmp_path, jobs_max=3) as one, concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(one.ask, image) for image in images]
        until(lambda: one.rewrites("wait") == 2, 20)  # two workers, and one waits
        until(lambda: sum(path.is_symlink() for path in pathlib.Path(f"/proc/{one.process.pid}/fd").iterdir() if "memfd" in os.readlink(path)) == 3, 20)
        assert one.ask(b"upper x") is Status.LATER
        assert one.ask(b"upper x") is Status.LATER
        gate.touch()
        assert [found.result(30) for found in asked] == [Status.READY] * 3
        assert one.ask(b"upper x") is Status.READY


def test_only_the_client_beyond_the_bound_is_turned_away_when_too_many_connect(tmp_path: pathlib.Path) -> None:
    with served(tmp_path, clients_max=4) as one:
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) for _ in range(4)]
            for connection in silent:
                connection.connect(str(one.socket))
            with pytest.raises((ImageRefused, OSError)):
                one.ask(b"upper x")

        def answers() -> bool:  # once it has seen that they went
            with contextlib.suppress(ImageRefused, OSError):
                return one.ask(b"upper x") is Status.READY
            return False

        until(answers, 20)


def test_every_program_gets_its_own_image_when_many_ask_for_many(tmp_path: pathlib.Path) -> None:
    seed = int(os.environ.get("CONCORDIA_TEST_SEED", "0")) or random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    images = [rng.choice([b"upper %d", b"crash %d", b"raise %d"]) % rng.randrange(12) for _ in range(60)]
    with served(tmp_path) as one, concurrent.futures.ThreadPoolExecutor(16) as pool:
        for image, status in zip(images, pool.map(one.ask, images), strict=True):
            assert status is (Status.READY if image.startswith(b"upper") else Status.REFUSED)
            found = one.cache.load(image_key(image))
            assert (found.image if found else None) == (image.upper() if status is Status.READY else None)
        assert one.rewrites("crash") + one.rewrites("raise") + one.rewrites("upper") == len(set(images))


def test_requests_are_answered_in_turn_when_one_connection_has_several(tmp_path: pathlib.Path) -> None:
    with served(tmp_path) as one, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(str(one.socket))
        for i in range(5):
            image = b"upper %d" % i
            with sealed_memory(image) as memory:
                socket.send_fds(connection, [Request(len(image), image_key(image)).pack()], [memory])
                assert connection.recv(64) == struct.pack("<4sI", b"CNRP", 0)

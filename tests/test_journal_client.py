"""journal/client.py, desk.py: a process's line to the owner.

Invariants: every wait for an owner has an end; one peer that sends rubbish, or no end of a line, harms no other; a client says so when it is used
after a fork, and maps nothing once it and its last stream are closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import pytest

from concordia import abi, config
from concordia.errors import JournalError, JournalRefused
from concordia.journal.client import JournalClient
from concordia.journal.folder import Folder
from concordia.journal.writer import Entry
from concordia.testing.journal import key_payload
from journal_ground import WAIT_S, await_true, open_rank, start, writer_of

pytest_plugins = ["journal_fixtures"]


def test_client_is_refused_in_time_when_there_is_no_owner(journal: Path) -> None:
    with pytest.raises(JournalRefused, match="there is no journal"):
        JournalClient.connect(journal)
    Folder(journal).make()
    began = time.monotonic()
    with pytest.raises(JournalRefused, match="no owner answers"):
        JournalClient.connect(journal, timeout_s=0.2)
    assert time.monotonic() - began < 5.0


def test_owner_answers_others_when_one_peer_sends_rubbish(journal: Path) -> None:
    start(journal)
    rubbish = [
        b"\n", b"{}\n", b"[]\n", b"nonsense\n", b'{"id":1,"op":"cut","args":{"key":-1}}\n', b"\xff\xfe\n",
        b'{"id":1,"op":"open_stream","args":{"nonce":"x"}}\n', b'{"id":1,"op":"__init__","args":{}}\n',
        b'{"id":1,"op":"cut","args":{"key":"1","tokens_known":1,"layout_hash":1,"world":1}}\n',
        b'{"id":1,"op":"match_prefix","args":{"keys":["a"],"layout_hash":1,"world":1}}\n',
        b"[" * 100_000 + b"\n",
    ]  # fmt: skip
    for line in rubbish:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(WAIT_S)
            peer.connect(str(journal / "owner.sock"))
            peer.sendall(line)
            assert "error" in json.loads(peer.makefile().readline()), line[:80]
    with JournalClient.connect(journal) as client:
        assert client.stats()["peers"] >= 1


def test_peer_is_cut_off_when_its_line_has_no_end(journal: Path) -> None:
    start(journal)
    with socket.socket(socket.AF_UNIX) as peer, JournalClient.connect(journal) as client:
        peer.settimeout(WAIT_S)
        peer.connect(str(journal / "owner.sock"))
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 2 * config.SOCKET_MESSAGE_BYTES_MAX:
                sent += peer.send(b"x" * (1 << 20))
        assert sent <= config.SOCKET_MESSAGE_BYTES_MAX + (8 << 20)
        assert client.stats()["peers"] == 1


def test_client_says_so_when_it_is_used_after_fork(journal: Path) -> None:
    start(journal)
    with JournalClient.connect(journal) as client:
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                client.stats()
            except JournalError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        assert b"fork" in os.read(reader, 1000)
        os.close(reader)
        os.wait()
        assert client.stats()["peers"] == 1


def test_key_news_and_finish_work_when_asked_through_the_socket(journal: Path) -> None:
    start(journal)
    with JournalClient.connect(journal) as client:
        opened, writer = open_rank(client, replica=7)
        scheduler = client.open_stream(
            writer_kind=abi.WRITER_SCHEDULER, rank=0, world=1, replica=7, layout_hash=5, label="scheduler"
        )
        big = (1 << 128) - 1
        writer.append(Entry(abi.KIND_KV_BLOCK, big, 1, 0, 4, flags=4), b"block")
        notes = writer_of(scheduler)
        notes.append(Entry(abi.KIND_BLOCK_KEY, big, 1), key_payload({0: big - 1}))
        first = client.key_news(layout_hash=5, world=1)
        assert (first.is_all, first.come) == (True, [big - 1])
        assert client.key_news(layout_hash=6, world=1).come == []
        assert client.key_news(layout_hash=5, world=1, after=first.cursor).is_nothing
        assert client.match_prefix([big - 1, 3], layout_hash=5, world=1).block_keys == [big - 1]
        client.finish(big)
        await_true(lambda: client.stats()["idle_blocks"] == 1, "the block has no request any more")
        assert client.key_news(layout_hash=5, world=1).come == [big - 1]
        writer.append(Entry(abi.KIND_KV_BLOCK, 9, 1, 0, 4, flags=4), b"block")
        notes.append(Entry(abi.KIND_BLOCK_KEY, 9, 1), key_payload({0: 8}))
        news = client.key_news(layout_hash=5, world=1, after=first.cursor)
        assert (news.is_all, news.come, news.gone) == (False, [8], [])
        # of another owner, whose numbers say nothing here
        assert client.key_news(layout_hash=5, world=1, after=news.cursor ^ 1 << 32).is_all
        opened.close()
        scheduler.close()
        assert {s["is_sealed"] for s in client.stats()["streams"] if s["writer_kind"] != abi.WRITER_CLEANER} == {True}


def is_mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


def test_files_are_unmapped_when_the_client_and_its_last_stream_are_closed(journal: Path) -> None:
    start(journal)
    with JournalClient.connect(journal) as client:
        client.map()
        assert is_mapped(journal / "pool")
    assert not is_mapped(journal)
    client = JournalClient.connect(journal)
    opened, writer = open_rank(client)
    client.close()
    writer.append(Entry(abi.KIND_KV_TAIL, 1, 1, 0, 1), b"x")  # an executor may still run
    opened.close()
    del opened, writer
    assert not is_mapped(journal)
    with JournalClient.connect(journal) as other:
        assert other.committed(1) == 1
        assert other.stats()["peers"] == 1, "a closed client hung up for good"

"""serving/run_folder.py, control.py: one living server per port, and only its user talks to it.

Invariants: a claimed folder is found by its port and by being the only one; a dead server's leftovers are removed; an unknown or failing
command is answered; nobody else may enter.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import stat
from collections.abc import Mapping
from multiprocessing import resource_tracker, shared_memory
from typing import Any

import pytest

from concordia.errors import ConcordiaError, UsageError
from concordia.serving.control import ControlServer, ask
from concordia.serving.run_folder import NAMES_FILE, RunFolder, find_control
from concordia.serving.shared_names import SHARED_MEMORY, SharedNames


def test_server_is_found_by_its_port_when_it_lives(tmp_path: pathlib.Path) -> None:
    base = tmp_path / "base"
    with pytest.raises(UsageError, match="no Concordia server"):
        find_control(base, None)
    first = RunFolder.claim(base, 8000)
    assert find_control(base, None) == first.control
    second = RunFolder.claim(base, 8001)
    assert find_control(base, 8001) == second.control
    with pytest.raises(UsageError, match="8000, 8001"):
        find_control(base, None)
    with pytest.raises(UsageError, match="runs already"):
        RunFolder.claim(base, 8000)
    first.release()
    second.release()
    assert not base.exists()


def test_leftovers_go_when_a_dead_servers_port_is_claimed(tmp_path: pathlib.Path) -> None:
    left = tmp_path / "base" / "8000"
    (left / "r1" / "t").mkdir(parents=True)
    (left / "control.sock").touch()
    (tmp_path / "base").chmod(0o700)
    with pytest.raises(UsageError, match="port 8000"):
        find_control(tmp_path / "base", 8000)
    (left / "lock").touch()
    block = shared_memory.SharedMemory(create=True, size=4096)
    name = SHARED_MEMORY / block.name.lstrip("/")
    names = SharedNames(left / "r1" / NAMES_FILE)
    names.note([os.getpid()])
    other = RunFolder.claim(tmp_path / "base", 8001)
    assert left.exists()  # somebody living maps what its engine used
    assert name.exists()
    other.release()
    block.close()
    folder = RunFolder.claim(tmp_path / "base", 8000)
    assert [p.name for p in folder.path.iterdir()] == ["lock"]
    assert not name.exists()
    resource_tracker.unregister(block._name, "shared_memory")  # type: ignore[attr-defined]
    folder.release()


def test_folder_is_refused_when_others_may_enter(tmp_path: pathlib.Path) -> None:
    base = tmp_path / "base"
    base.mkdir(mode=0o755)
    with pytest.raises(UsageError, match="only this user"):
        RunFolder.claim(base, 8000)


async def _answers(path: pathlib.Path) -> list[Any]:
    async def echo(request: Mapping[str, Any]) -> Any:
        return request["word"]

    async def fail(_: Mapping[str, Any]) -> Any:
        raise ConcordiaError("not now")

    server = ControlServer(path, {"echo": echo, "fail": fail})
    await server.start()
    found: list[Any] = [stat.S_IMODE(path.stat().st_mode)]
    for command in ("echo", "fail", "unknown"):
        try:
            found.append(await asyncio.to_thread(ask, path, command, timeout_s=5.0, word="yes"))
        except ConcordiaError as error:
            found.append(str(error))
    await server.close()
    return found


def test_commands_are_answered_when_sent(tmp_path: pathlib.Path) -> None:
    mode, echoed, failed, unknown = asyncio.run(_answers(tmp_path / "c.sock"))
    assert mode == 0o600
    assert echoed == "yes"
    assert failed == "not now"
    assert "no such command" in unknown
    assert not (tmp_path / "c.sock").exists()
    with pytest.raises(UsageError, match="does not answer"):
        ask(tmp_path / "c.sock", "echo", timeout_s=1.0)

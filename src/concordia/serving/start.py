"""From flags to a running server: everything that is checked before anything is started, floor 6.

Owns: the order of the checks and what is printed meanwhile. Promises: a check that fails raises
before a process, file or socket of ours is left; the settings that come out are complete. Called by
`concordia serve`. It knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from concordia.device.compiler import HostCompiler
from concordia.device.policy import AUTO, DEFAULT
from concordia.errors import ConcordiaError, EnvironmentRefused, UsageError
from concordia.journal import fence
from concordia.journal.folder import Folder, fit_size
from concordia.journal.place import Place
from concordia.journal.segment import Board
from concordia.paths import Paths, default_base
from concordia.serving import resources
from concordia.serving.engine_flags import EngineFlags
from concordia.serving.engine_spec import check_socket_room
from concordia.serving.machine import Engine, Machine, find_engine, find_gpu_nodes, read_machine
from concordia.serving.run_folder import RunFolder
from concordia.serving.shared_names import SHARED_MEMORY

log = logging.getLogger("concordia")


def start(options: Mapping[str, Any], engine_arguments: Sequence[str]) -> int:
    """Check, start, serve; returns the exit code. Raises UsageError for what is wrong with the
    request or the machine.
    """
    flags = EngineFlags.parse(engine_arguments)
    engine = find_engine()
    _check_model(options["model"])
    _check_residency(options["residency"], engine)
    journal = _journal_path(options)
    place = Place(options["journal_pool"], options["journal_node"])
    machine = _machine(journal, place)
    plan = resources.divide(
        machine,
        engine,
        flags,
        replicas=options["replicas"],
        standbys=options["standby"],
        weights_bytes=resources.model_bytes(options["model"]),
        journal_bytes=resources.parse_bytes(options["journal_size"])
        if options["journal_size"]
        else None,
    )
    if journal is not None:
        HostCompiler()  # raises when there is no compiler
        _check_journal(journal, plan.journal_bytes, place)
        place = replace(place, near=find_gpu_nodes(machine.gpus))
    resources.check_shared_memory(
        journal_bytes=plan.journal_bytes if journal else 0,
        where=place.pool or journal or pathlib.Path("/"),
    )
    base = (options["run_dir"] or default_base()).absolute()
    check_socket_room(base / str(options["port"]) / "r10000")
    listener = _listen(options["host"], options["port"])
    try:
        folder = RunFolder.claim(base, options["port"])
        try:
            return _run(
                options,
                flags=flags,
                engine=engine,
                plan=plan,
                place=place,
                folder=folder,
                listener=listener,
            )
        finally:
            folder.release()
    finally:
        listener.close()


def api_keys(given: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Keys that clients must send one of: those given, else vLLM's own variable, as with vLLM."""
    fallback = environment.get("VLLM_API_KEY")
    return tuple(given) or ((fallback,) if fallback else ())


def _run(
    options: Mapping[str, Any],
    *,
    flags: EngineFlags,
    engine: Engine,
    plan: resources.Plan,
    place: Place,
    folder: RunFolder,
    listener: socket.socket,
) -> int:
    from rich.console import Console
    from rich.logging import RichHandler

    from concordia.serving.service import Service, ServiceSettings

    console = Console(stderr=True)
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s" if console.is_terminal else "%(asctime)s %(levelname)s %(message)s",
        handlers=[handler],
    )
    for note in plan.notes:
        log.info("%s", note)
    settings = ServiceSettings(
        model=options["model"],
        host=options["host"],
        port=options["port"],
        flags=flags,
        engine=engine,
        plan=plan,
        replicas=options["replicas"],
        api_keys=api_keys(options["api_key"], os.environ),
        served_names=tuple(options["served_model_name"]),
        journal=_journal_path(options),
        place=place,
        residency=options["residency"],
        executor_ctas=options["executor_ctas"],
        commits_before_emit=options["commit"] == "before-emit",
        restores=options["restore"],
        recovery_timeout_s=options["recovery_timeout"],
        drain_timeout_s=options["drain_timeout"],
        log_folder=options["log_dir"],
    )
    first = f"starting {len(plan.shares)} engines of vLLM {engine.version} on {engine.device}"
    log.info("%s", first)

    with console.status(first) as status:

        def show(states: list[str] | None) -> None:
            if states is None:
                status.stop()
            else:
                status.update(f"{first}: {', '.join(states)}")

        async def serve() -> int:
            return await Service(settings, folder, listener, progress=show).run()

        return asyncio.run(serve())


def _check_residency(residency: str, engine: Engine) -> None:
    """A CPU has no kernel that could stay: threads that sleep are all there is."""
    if engine.device != "cuda" and residency not in (DEFAULT, AUTO):
        raise UsageError(
            f"--residency {residency} wants a GPU, and vLLM runs on {engine.device} here: "
            f"leave it out, or use {AUTO}"
        )


def _check_model(model: str) -> None:
    """A name that looks like a path must be a folder with a config.json; any other is a hub's
    business.
    """
    path = pathlib.Path(model)
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1 or path.exists()
    if not looks_local:
        return
    if model.count("/") == 0 and not path.exists() and not model.startswith((".", "~")):
        raise UsageError(
            f"there is no model folder {model!r} here, and a model of the hub is named owner/model"
        )
    if not path.is_dir():
        raise UsageError(f"there is no model folder {model}")
    if not any((path / name).exists() for name in ("config.json", "params.json")):
        raise UsageError(f"{model} holds no config.json: is it a model folder?")


def _journal_path(options: Mapping[str, Any]) -> pathlib.Path | None:
    if not options["protect"]:
        return None
    given: pathlib.Path | None = options["journal_dir"]
    return (given or Paths.default().journal).absolute()


def _machine(journal: pathlib.Path | None, place: Place) -> Machine:
    """This machine, with the room that there is where the journal's records shall lie."""
    if journal is None:
        return read_machine(SHARED_MEMORY)
    place.check_pool(Folder(journal).pool)
    machine, own_bytes = read_machine(place.folder(journal)), place.own_bytes()
    return machine if own_bytes is None else replace(machine, shared_free_bytes=2 * own_bytes)


def _check_journal(journal: pathlib.Path, size_bytes: int, place: Place) -> None:
    """Raise when the journal would not fit, is not ours, or serves another server."""
    home = Folder(journal)
    if journal.exists():
        home.check()
    if home.board.exists():
        user = _living_user(home)
        if user is not None:
            raise UsageError(
                f"{journal} is the journal of the server with process id {user}: name another "
                "--journal-dir"
            )
        return  # what lies there is adopted or removed by the owner
    parent = journal
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise EnvironmentRefused(f"cannot write to {parent}: name another --journal-dir")
    fit_size(place.folder(parent), size_bytes, None, own_bytes=place.own_bytes())


def _living_user(home: Folder) -> int | None:
    try:
        board = Board.attach(home.board)
    except (ConcordiaError, OSError):
        return None
    try:
        routers = {r.router_pid for r in board.registrations().values()}
    finally:
        board.close()
    return next((pid for pid in sorted(routers) if pid and fence.is_alive(pid)), None)


def _listen(host: str, port: int) -> socket.socket:
    """Our listening socket, before anything else is started, so that nobody can take the port
    meanwhile.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror or error}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"port {port} of {host} cannot be used ({error.strerror}): stop what listens "
            "there or set --port"
        ) from None
    return listener

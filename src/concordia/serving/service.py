"""A whole server, from the checks before its start to the last file after its end, floor 6.

Owns: the order in which journal, engines, router and HTTP are started and ended, and the signals in between. Promises: what a person can be
told before anything is started is checked before; whatever ends it, everything that was started is ended, and the exit code says whether
a request was lost. Called by the command line. It decides nothing about requests or faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import uvicorn

from concordia import abi, config
from concordia.checkpoint.checkpointer import Checkpointer
from concordia.errors import ConcordiaError, UsageError
from concordia.journal.client import JournalClient
from concordia.recovery.fault import Fault
from concordia.serving import tokenizer as tokenizers
from concordia.serving.control import ControlServer
from concordia.serving.engine_flags import COUNTER_SAMPLER, EngineFlags
from concordia.serving.engine_spec import EngineSpec
from concordia.serving.machine import Engine
from concordia.serving.metrics import Metrics
from concordia.serving.need import Defaults
from concordia.serving.owner_keeper import OwnerKeeper
from concordia.serving.process_tree import become_subreaper
from concordia.serving.recorder import Recorder
from concordia.serving.replica_set import ReplicaSet
from concordia.serving.request import Sampler
from concordia.serving.resources import Plan
from concordia.serving.router import Router, RouterSettings
from concordia.serving.run_folder import RunFolder
from concordia.serving.server import make_app
from concordia.serving.status import describe_engines

log = logging.getLogger(__name__)

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What the command line asks for, checked."""

    model: str
    host: str
    port: int
    flags: EngineFlags
    engine: Engine
    plan: Plan
    replicas: int = 1
    standbys: int = 1
    api_keys: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ()
    journal: pathlib.Path | None = None
    commits_before_emit: bool = False
    restores: bool = True
    recovery_timeout_s: float = config.RECOVERY_TIMEOUT_S
    drain_timeout_s: float = config.DRAIN_WAIT_S
    log_folder: pathlib.Path | None = None


class Service:
    """One server; `run` returns the exit code."""

    def __init__(
        self,
        settings: ServiceSettings,
        folder: RunFolder,
        listener: socket.socket,
        *,
        progress: Callable[[list[str] | None], None] | None = None,
    ) -> None:
        self.settings = settings
        self._folder = folder
        self._listener = listener
        self._progress = progress
        self._metrics = Metrics()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._keeper: OwnerKeeper | None = None
        self._client: JournalClient | None = None
        self._replicas: ReplicaSet | None = None
        self._router: Router | None = None
        self._started = time.time()

    async def run(self) -> int:
        """Start, serve until a signal or `concordia drain --stop`, end. Raises what the start raised."""
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        become_subreaper()
        try:
            with self._journal():
                await self._start_engines()
                if self._stop.is_set():
                    return 0
                return await self._serve()
        finally:
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)

    # --- start

    @contextlib.contextmanager
    def _journal(self) -> Iterator[None]:
        """The owner and the line to it, for as long as engines may live; engines are ended here whatever happened."""
        path = self.settings.journal
        if path is not None:
            self._keeper = OwnerKeeper(path, size_bytes=self.settings.plan.journal_bytes)
            self._client = JournalClient.connect(path)
        try:
            yield
        finally:
            try:
                if self._replicas is not None:
                    self._replicas.stop()
            finally:
                self._end_journal()

    def _end_journal(self) -> None:
        if self._keeper is None or self._client is None:
            return
        self._keeper.stop()
        try:
            self._client.shutdown()
        except ConcordiaError as error:
            log.error("the journal's owner did not end: %s", error)
        self._client.close()
        if not self._keeper.collect(timeout_s=config.KILL_S):
            log.error("the journal's owner (%d) still runs", self._keeper.pid)

    async def _start_engines(self) -> None:
        settings = self.settings
        sampler = (COUNTER_SAMPLER,) if self._sampler is Sampler.COUNTER else ()
        spec = EngineSpec(
            model=settings.model,
            flags=settings.flags,
            folder=self._folder.path,
            api_key=secrets.token_urlsafe(24),
            journal=settings.journal,
            served_names=settings.served_names,
            processors=sampler,
            log_folder=settings.log_folder,
        )
        self._replicas = ReplicaSet(
            spec,
            settings.plan.shares,
            replicas=settings.replicas,
            journal=self._client,
        )
        await self._unless_stopped(self._replicas.start)

    async def _unless_stopped(self, work: Callable[[], None]) -> None:
        """Run blocking work on a thread; return early when the server is told to stop."""
        working = asyncio.create_task(asyncio.to_thread(work))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            while not working.done() and not stopping.done():
                await asyncio.wait(
                    {working, stopping}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                )
                self._show_progress()
            if working.done():
                working.result()
            else:
                # The thread ends as soon as the replica set is told to stop; its error is then no news.
                working.add_done_callback(lambda task: task.exception())
        finally:
            stopping.cancel()

    @property
    def _sampler(self) -> Sampler:
        """How the engine draws: vLLM's V1 runner, which is all that a CPU has, keeps a generator that nothing restores."""
        return Sampler.COUNTER if self.settings.engine.device == "cpu" else Sampler.POSITION

    # --- serve

    async def _serve(self) -> int:
        assert self._replicas is not None
        settings = self.settings
        flags = settings.flags
        name = flags.value("--tokenizer") or settings.model
        tokenizer = await asyncio.to_thread(
            tokenizers.load,
            name,
            revision=flags.value("--tokenizer-revision") or flags.value("--revision"),
            trusts_remote_code=flags.has("--trust-remote-code"),
        )
        router_settings = RouterSettings(
            recovery_timeout_s=settings.recovery_timeout_s,
            restore=settings.restores,
            commits_before_emit=settings.commits_before_emit,
            sampler=self._sampler,
            defaults=Defaults(
                **flags.generation_defaults(tokenizer.generation if tokenizer else {})
            ),
            chat_blocker=next((n for n in ("--reasoning-parser",) if flags.has(n)), None),
            upstream_headers={"Authorization": f"Bearer {self._replicas.spec.api_key}"},
        )
        with contextlib.ExitStack() as stack:
            recorder = await asyncio.to_thread(self._open_recorder, stack)
            self._router = Router(
                self._replicas, recorder, tokenizer, router_settings, self._metrics
            )
            app = make_app(self._router, api_keys=settings.api_keys, describe=self.describe)
            server = _Server(
                uvicorn.Config(
                    app, log_level="warning", access_log=False, timeout_graceful_shutdown=5
                )
            )
            async with self._listening(server), self._controlled(), self._loads():
                self._say_ready()
                await self._stop.wait()
                return await self._drain_out()

    def _open_recorder(self, stack: contextlib.ExitStack) -> Recorder | None:
        """The router's own stream; without it the server serves, and says what is missing."""
        if self._client is None:
            return None
        appender = None
        try:
            attachment = self._client.open_stream(
                writer_kind=abi.WRITER_ROUTER,
                rank=0,
                world=1,
                replica=0,
                layout_hash=0,
                label="router",
            )
            stack.callback(attachment.close)
            appender = stack.enter_context(Checkpointer.open("host", attachment.target))
        except ConcordiaError as error:
            log.error("the router's own records are not kept: %s", error)
        return stack.enter_context(Recorder(self._client, appender))

    @contextlib.asynccontextmanager
    async def _listening(self, server: uvicorn.Server) -> AsyncIterator[None]:
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        try:
            while not server.started:
                if serving.done():
                    raise UsageError("the HTTP server ended while it started")
                await asyncio.sleep(config.REPLACE_POLL_S)
            yield
        finally:
            server.should_exit = True
            await serving

    @contextlib.asynccontextmanager
    async def _controlled(self) -> AsyncIterator[None]:
        control = ControlServer(
            self._folder.control, {"status": self._on_status, "drain": self._on_drain}
        )
        await control.start()
        try:
            yield
        finally:
            await control.close()

    @contextlib.asynccontextmanager
    async def _loads(self) -> AsyncIterator[None]:
        """Tell replicas how much they have to do, so that one that does nothing about it is noticed."""

        async def keep() -> None:
            assert self._router is not None
            assert self._replicas is not None
            while True:
                for replica in self._replicas.active:
                    replica.requests_in_flight = self._router.load(replica)
                await asyncio.sleep(config.LOAD_PERIOD_S)

        assert self._router is not None
        if self._keeper is not None:
            self._keeper.subscribe(self._count_owner_death)
        task = asyncio.create_task(keep())
        try:
            yield
        finally:
            task.cancel()

    async def _drain_out(self) -> int:
        """No new requests, a bounded wait for the running ones; 1 when some were cut off."""
        assert self._router is not None
        log.info("stopping; %d requests still run", self._router.in_flight)
        draining = asyncio.create_task(self._router.drain(self.settings.drain_timeout_s))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, hurrying):
            task.cancel()
        left = self._router.in_flight
        if left:
            log.error("%d requests were cut off", left)
        return 1 if left else 0

    # --- what is asked and told

    def describe(self) -> dict[str, Any]:
        """What the engines and the journal are, for status."""
        settings = self.settings
        return {
            **describe_engines(self._replicas, settings.engine),
            "model": settings.model,
            "host": settings.host,
            "port": settings.port,
            "uptime_s": round(time.time() - self._started, 1),
            "journal": str(settings.journal) if settings.journal else None,
            "owner_pid": self._keeper.pid if self._keeper else None,
        }

    async def _on_status(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {**(self._router.status() if self._router else {}), **self.describe()}

    async def _on_drain(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._router is not None
        bound_s = float(request.get("bound_s", self.settings.drain_timeout_s))
        left = await self._router.drain(min(bound_s, config.DRAIN_WAIT_MAX_S))
        if request.get("stop"):
            self._stop.set()
        return {"left": left}

    def _on_signal(self) -> None:
        """The first asks for an orderly end, the second does not wait for requests."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    def _count_owner_death(self, fault: Fault) -> None:
        self._metrics.fault(fault)

    def _show_progress(self) -> None:
        if self._progress is not None and self._replicas is not None:
            now = time.monotonic_ns()
            self._progress(
                [
                    f"{r.name} {r.state.value} {(now - r.started_ns) / 1e9:.0f} s"
                    for r in self._replicas.replicas
                ]
            )

    def _say_ready(self) -> None:
        assert self._replicas is not None
        settings = self.settings
        if self._progress is not None:
            self._progress(None)
        log.info(
            "serving %s on http://%s:%d/v1: %d of %d engines serve, %s",
            settings.model,
            settings.host,
            settings.port,
            len(self._replicas.active),
            settings.replicas + settings.standbys,
            f"journal {settings.journal} of {settings.plan.journal_bytes >> 20} MiB"
            if settings.journal
            else "UNPROTECTED",
        )


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

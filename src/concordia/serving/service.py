"""A whole server, from its first process to its last file, floor 6.

Owns: the order in which journal, engines, router and HTTP are started and ended, and the signals
and commands in between. Promises: whatever ends it, everything that was started is ended, in the
opposite order; the exit code says whether a request was lost. Called by `start`, which has checked
what can be checked before. It decides nothing about requests or faults.
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
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from concordia import config
from concordia.device.policy import DEFAULT
from concordia.journal.place import Place
from concordia.serving import tokenizer as tokenizers
from concordia.serving.control import ControlServer
from concordia.serving.engine_flags import COUNTER_SAMPLER, EngineFlags
from concordia.serving.engine_spec import EngineSpec
from concordia.serving.http_server import listening
from concordia.serving.machine import Engine
from concordia.serving.metrics import Metrics
from concordia.serving.need import Defaults
from concordia.serving.process_tree import become_subreaper
from concordia.serving.protection import Protection
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
    api_keys: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ()
    journal: pathlib.Path | None = None
    place: Place | None = None
    residency: str = DEFAULT
    executor_ctas: int = 1
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
        self._protection: Protection | None = None
        self._replicas: ReplicaSet | None = None
        self._router: Router | None = None
        self._started = time.time()

    async def run(self) -> int:
        """Start, serve until a signal or `concordia drain --stop`, end. Raises what the start
        raised.
        """
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        become_subreaper()
        try:
            with contextlib.ExitStack() as stack:
                settings = self.settings
                if settings.journal is not None:
                    size_bytes = settings.plan.journal_bytes
                    opened = Protection.open(
                        settings.journal, size_bytes=size_bytes, place=settings.place
                    )
                    self._protection = stack.enter_context(opened)
                self._replicas = self._make_replicas()
                stack.callback(self._replicas.stop)
                await self._unless_stopped(self._replicas.start)
                if self._stop.is_set():
                    return 0
                return await self._serve()
        finally:
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)

    # --- start

    def _make_replicas(self) -> ReplicaSet:
        settings = self.settings
        spec = EngineSpec(
            model=settings.model,
            flags=settings.flags,
            folder=self._folder.path,
            api_key=secrets.token_urlsafe(24),
            journal=settings.journal,
            residency=settings.residency,
            executor_ctas=settings.executor_ctas,
            served_names=settings.served_names,
            processors=(COUNTER_SAMPLER,) if self._sampler is Sampler.COUNTER else (),
            log_folder=settings.log_folder,
        )
        journal = self._protection.client if self._protection else None
        return ReplicaSet(spec, settings.plan.shares, replicas=settings.replicas, journal=journal)

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
                # The thread ends as soon as the replica set is told to stop; its error is then no
                # news.
                working.add_done_callback(lambda task: task.exception())
        finally:
            stopping.cancel()

    @property
    def _sampler(self) -> Sampler:
        """How the engine draws: vLLM's V1 runner, which is all that a CPU has, keeps a generator
        that nothing restores.
        """
        return Sampler.COUNTER if self.settings.engine.device == "cpu" else Sampler.POSITION

    # --- serve

    async def _serve(self) -> int:
        assert self._replicas is not None
        settings, flags = self.settings, self.settings.flags
        tokenizer = await asyncio.to_thread(
            tokenizers.load,
            flags.value("--tokenizer") or settings.model,
            revision=flags.value("--tokenizer-revision") or flags.value("--revision"),
            trusts_remote_code=flags.is_on("--trust-remote-code"),
        )
        with contextlib.ExitStack() as stack:
            recorder = None
            if self._protection is not None:
                opened = self._protection.recorder()
                recorder = await asyncio.to_thread(stack.enter_context, opened)
                self._protection.subscribe(self._metrics.fault)
            self._router = Router(
                self._replicas, recorder, tokenizer, self._router_settings(tokenizer), self._metrics
            )
            app = make_app(self._router, api_keys=settings.api_keys)
            async with listening(app, self._listener), self._controlled():
                self._say_ready()
                await self._stop.wait()
                return await self._drain_out()

    def _router_settings(self, tokenizer: tokenizers.Tokenizer | None) -> RouterSettings:
        assert self._replicas is not None
        settings, flags = self.settings, self.settings.flags
        defaults = flags.generation_defaults(tokenizer.generation if tokenizer else {})
        return RouterSettings(
            recovery_timeout_s=settings.recovery_timeout_s,
            restore=settings.restores,
            commits_before_emit=settings.commits_before_emit,
            sampler=self._sampler,
            defaults=Defaults(**defaults),
            chat_blocker="--reasoning-parser" if flags.has("--reasoning-parser") else None,
            upstream_headers={"Authorization": f"Bearer {self._replicas.spec.api_key}"},
        )

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
            "owner_pid": self._protection.owner_pid if self._protection else None,
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
            len(settings.plan.shares),
            f"journal {settings.journal} of {settings.plan.journal_bytes >> 20} MiB"
            if settings.journal
            else "UNPROTECTED",
        )

"""A handler that becomes what a name means, floor 3.

Owns: the order of loading, publishing and unloading beside a running executor. Promises: no task is
lost, run twice or run by half an old and half a new handler; where the swap fails the name means
what it meant; nothing is loaded beside a handler that hangs: on a GPU that call of the driver has
no bound of its own. Called by executor.py under its lock. Does not compile, and does not prove.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Final, Protocol

from concordia import config
from concordia.device.driver import Device, Executor, Image, Publication
from concordia.errors import ConcordiaError, WaitTimeout
from concordia.runtime.op_table import Change, Operator, OperatorTable
from concordia.runtime.ring import Ring

logger = logging.getLogger(__name__)

PROGRESS_LOOK_S: Final = 0.0001


class Swappable(Protocol):
    """What a swap needs: one executor's, and how it is kept out and emptied."""

    device: Device
    ring: Ring
    operators: OperatorTable
    executor: Executor

    @property
    def is_parked(self) -> bool:
        """Whether somebody keeps the executor out now."""
        ...

    def parked(self) -> AbstractContextManager[None]:
        """The executor is out."""
        ...

    def drain(self, timeout_s: float) -> None:
        """Wait until everything handed in so far is done; raises WaitTimeout."""
        ...


class Swap:
    """Of one runtime, whose lock whoever makes it holds."""

    def __init__(self, runtime: Swappable) -> None:
        self._runtime = runtime
        self._device, self._ring = runtime.device, runtime.ring
        self._operators, self._executor = runtime.operators, runtime.executor

    def run(self, name: str, image: Image, *, region_address: int) -> Operator:
        """Make `name` mean this image's code, and unload what it meant as soon as that may be."""
        if self._device.needs_parking:
            operator = self._publish(name, image, region_address)
            # Whoever has entered since reads the new entry.
            if self._operators.retired_count > config.RETIRED_MAX:
                with self._device.parked():
                    self._operators.unload_retired()
            return operator
        self._unload_retired()
        operator = self._publish(name, image, region_address)
        try:
            self._unload_retired()
        except WaitTimeout as error:
            logger.warning("%s is swapped, its old code stays loaded for now: %s", name, error)
        return operator

    def _publish(self, name: str, image: Image, region_address: int) -> Operator:
        """Loading waits for a GPU's executor to leave, at the end of its lease, and tasks go on
        meanwhile; only between two of its stays may the table change.
        """
        if self._device.needs_parking:
            self._require_progress()
        code = self._device.load(image)
        prepare = partial(self._operators.prepare, name, image, code, region_address=region_address)
        try:
            change = self._between_stays(prepare) if self._device.needs_parking else None
            if change is None:
                with self._runtime.parked() if self._device.needs_parking else nullcontext():
                    change = prepare()
                    self._operators.publish(change)
            return self._operators.note(change)
        except ConcordiaError:
            code.close()
            raise

    def _between_stays(self, prepare: Callable[[], Change]) -> Change | None:
        """Publish in one go while nobody is inside; None where that cannot be."""
        prepared: list[Change] = []

        def fill_in() -> Publication:
            prepared.append(prepare())
            return prepared[0].publication

        return prepared[0] if self._executor.swap_operator(fill_in) else None

    def _require_progress(self) -> None:
        """Raise WaitTimeout when the task at hand does not end: a driver call that waits for the
        executor would then never return, and it has no bound of its own.
        """
        load = self._ring.load
        done, until = load("done_count"), time.monotonic() + config.WAIT_PARK_S
        while load("left") != load("launched") and load("head") < load("tail"):
            if load("done_count") != done:
                return
            if time.monotonic() > until:
                raise WaitTimeout(
                    f"no code is loaded beside the executor: task {load('head')} has been running "
                    f"for {config.WAIT_PARK_S} s"
                )
            time.sleep(PROGRESS_LOOK_S)

    def _unload_retired(self) -> None:
        """Close replaced code once a task of the newest generation has started, which an empty task
        brings about.
        """
        if not self._operators.has_retired:
            return
        if not self._runtime.is_parked and not self._operators.is_acknowledged():
            self._runtime.drain(config.WAIT_TASK_S)
        self._operators.unload_retired()

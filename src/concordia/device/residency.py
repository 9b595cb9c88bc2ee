"""The executor kernel of one ring on a GPU: sent in, leaves, sent in again, floor 2.

Owns: its state in device memory, and whether it is to be in. Promises: a launch may be put behind
the work of another stream, and then nothing submitted after it is run before that work is done;
what is waited for here has a bound. Called by runtime/executor.py through driver.Executor.
Does not submit tasks. How long a stay is says policy.py; the kernel leaves by itself
(kernels/executor.h): nothing here can hold up the GPU longer than a lease.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from concordia import abi, config
from concordia.device.cuda_call import CudaError
from concordia.device.cuda_context import CudaContext, CudaMemory
from concordia.device.driver_park import DriverPark
from concordia.device.executor_code import ExecutorCode
from concordia.device.launches import SLEEP_S, Launches
from concordia.device.loader import CudaImage
from concordia.device.policy import Policy
from concordia.device.stream_launch import StreamLaunch
from concordia.errors import DeviceError, UsageError, WaitTimeout

if TYPE_CHECKING:
    from concordia.device.driver import ExecutorPlan, Publication
    from concordia.device.host import HostLibrary

# of a CTA: with 128 registers each all of a multiprocessor. Half of it, with twice the registers
# saved and restored or half the loads under way, made scans half as fast.
THREADS: Final = 512
TURN_BYTES: Final = 128
KEEPER_WAIT_S: Final = 1.0  # a keeper that is needed is notified; it looks this often anyway

_OFFSETS: Final = abi.RING_HEADER.offsets()


class CudaExecutor:
    """One executor; launched under a lock, looked after by one thread that sleeps while nothing is
    launched.
    """

    handle = 0  # there is no compiled launcher: whoever submits calls `launch` when told to

    def __init__(
        self,
        *,
        context: CudaContext,
        memory: CudaMemory,
        library: HostLibrary,
        image: CudaImage,
        plan: ExecutorPlan,
        policy: Policy,
    ) -> None:
        if not 1 <= plan.lanes <= config.EXECUTOR_CTAS_MAX:
            raise UsageError(
                f"{plan.lanes} CTAs for the executor: use 1 to {config.EXECUTOR_CTAS_MAX}"
            )
        self._context, self._memory, self._library = context, memory, library
        self._ring, self._plan = plan.ring, plan
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)
        self._park_depth = 0
        self._is_owed = False  # a launch, once the framework's driver call is over
        self._driver_park = DriverPark(library, plan.ring, plan.ring + _OFFSETS["stop"])
        self._is_closed = self._is_hung = False
        self._hurry = threading.Event()  # the keeper looks now
        self.lost: DeviceError | None = None
        with ExitStack() as undo:
            self._code = ExecutorCode(image, threads=THREADS, context=context)
            undo.callback(self._code.close)
            self._launches = Launches(
                context=context, library=library, ring=plan.ring,
                function=self._code.function, ctas=plan.lanes, threads=THREADS,
            )  # fmt: skip
            undo.callback(self._launches.close)
            self._state = self._place(replace(plan, lanes=plan.lanes * THREADS))
            undo.callback(memory.free, self._state)
            self._turn = memory.allocate(TURN_BYTES)
            undo.callback(memory.free, self._turn)
            self._held = undo.pop_all()
        self._adopt(policy)
        self._keeper = threading.Thread(target=self._keep, name="concordia-lease", daemon=True)
        self._keeper.start()
        if policy.stays:
            try:
                self.launch()
            except BaseException:
                self.close(config.WAIT_PARK_S)
                raise

    @property
    def residency(self) -> str:
        """Name of the policy."""
        return self.policy.name

    @property
    def parks_for_driver(self) -> bool:
        """Whether a driver call that waits for the whole GPU must park it first."""
        return self.policy.parks_for_driver and not self._is_closed

    def settle(self, policy: Policy) -> None:
        """Follow another policy from here on. Raises WaitTimeout when it does not leave."""
        if not self.park(config.WAIT_PARK_S):
            raise WaitTimeout(f"the executor did not leave within {config.WAIT_PARK_S} s")
        self._adopt(policy)
        self._hurry.set()
        self.unpark()

    def _adopt(self, policy: Policy) -> None:
        """While nobody is inside: the next launch finds the numbers in the ring."""
        self.policy = policy
        self._library.store(self._ring + _OFFSETS["lease_ns"], policy.lease_ns)
        self._library.store(self._ring + _OFFSETS["idle_ns"], policy.idle_ns)
        turn = self._turn if policy.takes_turns else 0
        self._launches.serve(state=self._state, turn=turn)
        if policy.stays:  # others are late by a lease of milliseconds
            self._driver_park.begin(int(self._code.function))
        else:
            self._driver_park.end()

    def stream_launch(self, ring: int) -> StreamLaunch:
        """The node that runs the tasks of another ring in streams of the framework, under a policy
        that takes turns; raises UsageError under another.
        """
        if not self.policy.takes_turns:
            raise UsageError(
                f"tasks in a framework's stream want residency stream, this is {self.residency}: "
                "two kernels would append to one journal stream"
            )
        made = StreamLaunch(
            context=self._context,
            memory=self._memory,
            function=self._code.stream_function,
            threads=THREADS,
            state=self._place(replace(self._plan, ring=ring, lanes=THREADS)),
            executor=self._state,
            turn=self._turn,
        )
        # nothing to do; what a first launch takes is no part of a graph
        made.enqueue(self._launches.stream)
        return made

    def _place(self, plan: ExecutorPlan) -> int:
        size = self._library.executor_bytes()
        image = ctypes.create_string_buffer(size + 128)
        start = -(-ctypes.addressof(image) // 128) * 128  # the structure holds lines of 128 bytes
        address = self._memory.allocate(size)
        self._library.executor_image(start, plan.pack(), address)
        self._memory.write(address, ctypes.string_at(start, size))
        return address

    def launch(self) -> None:
        """Send the executor in, unless it is in, on its way, or parked."""
        with self._lock:
            self._raise_if_lost()
            if self._driver_park.is_on:
                self._is_owed = True  # the keeper sees to it
                self._wanted.notify()
            elif self._park_depth == 0 and self._launches.are_over():
                self._send()

    def launch_after(self, stream: int, submit_gate: Callable[[int], object]) -> None:
        """Put a launch behind the work that is in `stream` now. `submit_gate(n)` hands in a task
        that no launch below n passes.
        """
        self._launch_behind(lambda: self._launches.wait_for_stream(stream), submit_gate)

    def launch_burst(
        self, enqueue: Callable[[Any], None], submit_gate: Callable[[int], object]
    ) -> None:
        """Put a launch behind what `enqueue` puts into this executor's own stream, which runs
        between two of its stays.
        """
        self._launch_behind(lambda: enqueue(self._launches.stream), submit_gate)

    def _launch_behind(self, put: Callable[[], None], submit_gate: Callable[[int], object]) -> None:
        with self._lock:
            self._raise_if_lost()
            # first: where the ring has no room for it, nothing was put
            submit_gate(self._launches.number + 1)
            put()
            if self._park_depth == 0:
                self._send()

    def _send(self) -> None:
        """Under the lock."""
        try:
            self._launches.send()
        except CudaError as error:
            self.lost = error
            raise
        self._wanted.notify()

    def _raise_if_lost(self) -> None:
        if self._is_closed:
            raise DeviceError("the executor is closed")
        if self.lost is not None:
            raise self.lost

    def _is_needed(self) -> bool:
        """Whether nobody is inside and somebody should be."""
        if self.policy.stays:
            return self._launches.are_over()
        return bool(self._library.needs_launch(self._ring))

    def _keep(self) -> None:
        """A lease may end with work waiting and no producer that looks again, or with an executor
        that is to stay: then this thread sends it in once more.
        """
        seen = 0
        while True:
            with self._wanted:
                while not (self._is_closed or self._is_owed) and self._launches.number == seen:
                    self._wanted.wait(KEEPER_WAIT_S)
                if self._is_closed or self.lost is not None:
                    return
                is_owed, self._is_owed = self._is_owed, False
                seen = self._launches.number
            while is_owed and self._driver_park.is_on and not self._is_closed:
                time.sleep(SLEEP_S)  # as long as the framework's call takes
            # Most launches are over by then, and nobody had to be woken for them.
            if self._hurry.wait(0 if is_owed else self.policy.lease_ns / 1e9):
                self._hurry.clear()
            if self._is_closed:
                return
            try:
                self._launches.wait_over()
                if self._is_needed():
                    self.launch()
            except CudaError as error:
                self.lost = error
                return
            except DeviceError:
                return

    def park(self, timeout_s: float) -> bool:
        """Ask the kernel to leave and keep it out; True once its stream is empty. Where launches in
        other streams take turns with it, those that were inside then are out, too.
        """
        with self._lock:
            self._park_depth += 1
            self._library.store_stop(self._ring, 1)
            if self.policy.takes_turns and self.lost is None:
                # It finds that it is to stop; but it has had its turn.
                self._send()
        if self._launches.wait_empty(timeout_s):
            return True
        self.unpark()
        return False

    def is_stuck(self) -> bool:
        """Whether it did not leave when it was closed, and has not since."""
        return self._is_hung and not self._is_closed and not self._launches.wait_empty(0)

    def unpark(self) -> None:
        """Undo one `park`; what waits in the ring is run."""
        with self._lock:
            self._park_depth -= 1
            if self._park_depth > 0:
                return
            self._library.store_stop(self._ring, 0)
            if self.lost is None and not self._is_closed and self._is_needed():
                self._send()

    def swap_operator(self, prepare: Callable[[], Publication]) -> bool:
        """Publish between two stays without the interpreter in between. Not where launches in other
        streams take turns with ours: only a launch that has its turn proves them out.
        """
        with self._lock:
            if self._park_depth or self.policy.takes_turns or self.lost or self._is_closed:
                return False
            try:
                is_done = self._launches.quick_swap.run(prepare(), stays=self.policy.stays)
            except CudaError as error:
                self.lost = error
                raise
            self._wanted.notify()
            return is_done

    def rescues(self) -> int:
        """Always 0: what the keeper does is part of the protocol here."""
        return 0

    def close(self, timeout_s: float) -> bool:
        """Park for good and release everything; a lost context has nothing left to release."""
        if self._is_closed:
            return True
        try:
            self._is_hung = not (self._driver_park.end(timeout_s) and self.park(timeout_s))
            if self._is_hung:
                return False
        except CudaError as error:
            if not error.context_lost:
                raise
            self.lost = error
        with self._wanted:
            if self._is_closed:
                return True
            self._is_closed = True
            self._wanted.notify_all()
        self._hurry.set()
        self._keeper.join(timeout_s)
        self._held.close()
        return True

"""What a device is to the rest of Concordia, floor 2.

Owns: the protocol `Device` and `open_device`. Promises: everything above this floor works on these
few verbs alone and never imports CUDA; the two devices differ only in what is behind them. Order of
a swap: `build` (slow, beside a running executor), `load`, park, publish the operator table, unpark;
what waits for the whole GPU parks executors that stay by itself. Called by runtime/ and
checkpoint/. Does not know rings, tasks or records: the executor's code does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from concordia.device.policy import DEFAULT, Policy
from concordia.errors import DeviceError, EnvironmentRefused

if TYPE_CHECKING:
    from concordia.device.compiler import HandlerSource
    from concordia.device.host import HostLibrary


@runtime_checkable
class Image(Protocol):
    """Compiled, linked and linted code that is not loaded yet."""

    @property
    def digest(self) -> int:
        """64 bits that name this code: what goes into a record as handler_hash."""


@runtime_checkable
class Code(Protocol):
    """Loaded code, owned explicitly: it stays until `close`, whatever Python forgets meanwhile."""

    @property
    def address(self) -> int:
        """Address of the entry function, as the operator table wants it."""

    def close(self) -> None:
        """Unload; only once no table names the code and no executor can be inside it."""


@dataclass(frozen=True, slots=True)
class ExecutorPlan:
    """Addresses, as the executor sees them, of everything one executor works with; ExecutorPlan of
    kernels/host.cpp, word by word.
    """

    ring: int
    pool: int
    pool_bytes: int
    segment_bytes: int
    control: int
    stage: int
    stage_bytes: int
    ids: int
    digests: int
    digest_bytes: int
    lanes: int

    def pack(self) -> bytes:
        """The words in order."""
        return struct.pack("<11Q", *astuple(self))


class Publication(NamedTuple):
    """What changes the meaning of an opcode: an entry of the table that is filled in already."""

    opcode: int
    entry: int  # its address
    generation: int  # of the table, from then on


class Burst(Protocol):
    """A loaded kernel of the whole device."""

    ctas: int  # that a launch has

    def enqueue(self, stream: Any, words: Sequence[int], *, zeroed: int = 0) -> None:
        """Put it into a stream with these arguments, behind a store of zero to the eight bytes at
        `zeroed`, if that is given.
        """

    def close(self) -> None:
        """Unload it; the executor is parked."""


class Neighbour(Protocol):
    """A kernel that wants the whole device, to see what an executor costs others."""

    def time_us(self) -> float:
        """Microseconds that one run takes now."""

    def close(self) -> None:
        """Unload it; executors are parked."""


class StreamLaunch(Protocol):
    """What runs a ring's tasks as work of the framework's own streams and graphs."""

    def enqueue(self, stream: int) -> None:
        """Put a run into a stream, or into the graph that it is being captured into."""

    def check(self, stream: int) -> None:
        """Raise UsageError while the stream is being captured."""

    def capture_of(self, stream: int) -> int | None:
        """Which capture this stream is part of, by a number of its own; None for none."""

    def ring_bell(self, stream: int, number: int) -> None:
        """Runs that come behind this in the stream may serve all up to `number`."""

    def close(self) -> None:
        """Give it back; nothing that was enqueued runs, or will."""


@runtime_checkable
class Executor(Protocol):
    """The executor of one ring. It leaves by itself at a task boundary, and whoever launches it
    looks at the ring once more then.
    """

    lost: DeviceError | None  # why it will never run again, once that is known
    # a Host* that submission wakes by itself in compiled code; 0: whoever submits calls `launch`
    # when told to
    handle: int

    @property
    def residency(self) -> str:
        """Name of the policy that it follows."""

    def settle(self, policy: Policy) -> None:
        """Follow another policy from here on; raises WaitTimeout when it does not leave for it."""

    def stream_launch(self, ring: int) -> StreamLaunch:
        """A way to run the tasks of another ring in streams of the framework; raises UsageError
        unless the policy allows it.
        """

    def launch(self) -> None:
        """Send the executor in, unless it is in or parked: a producer found that it had left."""

    def launch_after(self, stream: int, submit_gate: Callable[[int], object]) -> None:
        """Send it in once more, behind the work that is in `stream` now; `submit_gate(n)` hands in
        a gate that no launch before n passes.
        """

    def launch_burst(
        self, enqueue: Callable[[Any], None], submit_gate: Callable[[int], object]
    ) -> None:
        """The same behind what `enqueue` puts into the executor's own stream."""

    def park(self, timeout_s: float) -> bool:
        """Ask it to leave and keep it out; True once no lane is inside and none will be. Nests."""

    def unpark(self) -> None:
        """Undo one `park`; what waits in the ring is run."""

    def swap_operator(self, prepare: Callable[[], Publication]) -> bool:
        """Publish what `prepare` gives between two of its stays, in one go; False when it could not
        be done so, and then nothing was published, though `prepare` may have been called.
        """

    def rescues(self) -> int:
        """How often waiting work was found although everybody had kept to the protocol; always 0,
        or it is a bug.
        """

    def close(self, timeout_s: float) -> bool:
        """Park for good and release what runs it; False when it did not leave, and then nothing was
        released.
        """


@runtime_checkable
class Device(Protocol):
    """Memory that an executor reaches, code that it calls, and a way to send it in."""

    name: str  # "host" or "cuda:<index>"
    library: HostLibrary  # compiled submission; on a GPU too it is host threads that submit
    idle_ns: int  # silence after which its executor leaves
    stage_bytes: int  # most that an executor has room for of a payload that is not in its place yet
    needs_parking: bool  # whether the operator table may change only while nobody is inside
    residencies: tuple[str, ...]  # policies that its executors can follow, the default first

    def parked(self) -> AbstractContextManager[None]:
        """No executor that stays is on the device meanwhile: around calls that wait for all of it.
        What of ours waits so (load, free, unshare) does this by itself.
        """

    def share(self, address: int, size: int) -> int:
        """Make a host mapping reachable for the executor; returns its address there."""

    def unshare(self, address: int) -> None:
        """Undo `share` of the mapping at this host address; nobody uses it any more."""

    def check_range(self, address: int, size: int) -> None:
        """Raise UsageError unless an executor could read and write these bytes."""

    def allocate(self, size: int) -> int:
        """Zeroed memory near the executor (device memory on a GPU)."""

    def free(self, address: int) -> None:
        """Undo `allocate`; nobody uses it any more."""

    def write(self, address: int, payload: bytes) -> None:
        """Copy bytes to memory of this device; on a GPU through a stream of its own."""

    def read(self, address: int, size: int) -> bytes:
        """Copy bytes out of memory of this device."""

    def build(self, source: HandlerSource) -> Image:
        """Compile, link and lint, or take it from the cache; raises CompileError or
        HandlerRefused.
        """

    def load(self, image: Any) -> Code:
        """Load code that this device built; on a GPU this waits for leases to end."""

    def build_burst(self, source: HandlerSource) -> Image | None:
        """Compile a kernel of the whole device; None where there is no such thing."""

    def burst(self, image: Any, name: str) -> Burst:
        """Load a kernel that `build_burst` made, while the executor is parked."""

    def neighbour(self) -> Neighbour | None:
        """Load a probe of what executors cost others; None where there is no such thing."""

    def executor(self, plan: ExecutorPlan, residency: str = DEFAULT) -> Executor:
        """Prepare the executor of a ring; launches it only if it is to stay. Raises UsageError for
        a residency that this device has not got.
        """

    def close(self) -> None:
        """Release everything that was not released before."""


def open_device(name: str) -> Device:
    """Open "host", "cuda", "cuda:<index>" or "auto": the first GPU where one can be used, else the
    host.
    """
    if name == "host":
        return _open_host()
    if name == "auto":
        try:
            return _open_cuda(0)
        except (EnvironmentRefused, DeviceError):
            return _open_host()
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise EnvironmentRefused(f"unknown device {name!r}: use auto, host, cuda or cuda:<index>")
    return _open_cuda(int(index or "0"))


def _open_host() -> Device:
    from concordia.device.host import HostDevice

    return HostDevice()


def _open_cuda(index: int) -> Device:
    from concordia.device.cuda import CudaDevice

    return CudaDevice(index)

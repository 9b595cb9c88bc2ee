"""What a device is to the rest of Concordia, floor 2.

Owns: the protocol `Device` and `open_device`. Promises: everything above this floor works on these few verbs alone and never
imports CUDA; the two devices differ only in what is behind them. Order of a swap: `build` (slow, beside a running executor), park,
`load`, publish the operator table, unpark; whatever may wait for the GPU is called only while the executor is out.
Called by runtime/ and checkpoint/. Does not know rings, tasks or records: the executor's code does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from concordia.errors import DeviceError, EnvironmentRefused

if TYPE_CHECKING:
    from concordia.device.compiler import HandlerSource


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
        """Unload; only while the executor is parked and no table names the code."""


@runtime_checkable
class Executor(Protocol):
    """The executor of one ring. It leaves by itself at a task boundary; `launch` sends it in again."""

    def launch(self) -> None:
        """Send the executor in once more; the caller has seen that the one before left (or none ever was)."""

    def wait_left(self, timeout_s: float) -> bool:
        """True once the executor that was launched last is out and its thread or stream is free again."""

    def close(self) -> None:
        """Release what runs it; the executor is out."""


@runtime_checkable
class Device(Protocol):
    """Memory that an executor reaches, code that it calls, and a way to send it in."""

    name: str  # "host" or "cuda:<index>"
    needs_parking: bool  # whether `load` and Code.close must find the executor parked

    def share(self, address: int, size: int) -> int:
        """Make a host mapping reachable for the executor; returns its address there."""

    def unshare(self, address: int) -> None:
        """Undo `share` of the mapping at this host address; the executor is parked."""

    def allocate(self, size: int) -> int:
        """Zeroed memory near the executor (device memory on a GPU)."""

    def free(self, address: int) -> None:
        """Undo `allocate`; the executor is parked."""

    def write(self, address: int, payload: bytes) -> None:
        """Copy bytes to memory of this device; on a GPU through a stream of its own."""

    def read(self, address: int, size: int) -> bytes:
        """Copy bytes out of memory of this device."""

    def build(self, source: HandlerSource) -> Image:
        """Compile, link and lint, or take it from the cache; raises CompileError or HandlerRefused."""

    def load(self, image: Image) -> Code:
        """Load code; on a GPU only while the executor is parked."""

    def executor(self, ring_address: int, *, lanes: int) -> Executor:
        """Prepare the executor of the ring at this address (as the executor sees it); does not launch it."""

    def close(self) -> None:
        """Release everything that was not released before."""


def open_device(name: str) -> Device:
    """Open "host", "cuda", "cuda:<index>" or "auto": the first GPU where one can be used, else the host."""
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

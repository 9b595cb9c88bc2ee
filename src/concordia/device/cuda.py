"""The CUDA device, floor 2.

Owns: how handler source becomes linted, loaded code on one GPU, and what belongs together there
(context, memory, executors). Promises: `build` needs no GPU time and is cached; the lint runs on
cached code too; everything is given back by `close`. Called through driver.open_device. Does not
compile (nvrtc.py), judge code (loader.py) or keep the executor going (residency.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from concordia import config
from concordia.device import neighbour, nvrtc
from concordia.device.burst import Burst
from concordia.device.compiler import KERNELS, HandlerSource, HostCompiler
from concordia.device.cubin import read_facts
from concordia.device.cuda_call import CudaError
from concordia.device.cuda_context import CudaContext, CudaMemory
from concordia.device.host import HostLibrary
from concordia.device.kernel_cache import KernelCache
from concordia.device.loader import CudaCode, CudaImage, lint
from concordia.device.policy import DEFAULT, POLICIES, policy_of
from concordia.device.residency import CudaExecutor
from concordia.errors import ConcordiaError, DeviceError, WaitTimeout

if TYPE_CHECKING:
    from concordia.device.driver import ExecutorPlan, Image

EXECUTOR: Final = HandlerSource.of("executor.cu")
BALLAST: Final = HandlerSource.of("ballast.cu")
KEEP: Final = HandlerSource.of("keep.cu")


class CudaCompiler:
    """NVRTC and nvJitLink behind the same cache as the host compiler; works without a GPU."""

    def __init__(self, architecture: str, cache: KernelCache | None = None) -> None:
        self._architecture = architecture
        self._cache = cache or KernelCache()

    def handler(self, source: HandlerSource) -> CudaImage:
        """A linted handler; raises CompileError or HandlerRefused."""
        ptx, key = self._ptx(source)
        cubin = self._cubin([ptx], name=source.file, key=key)
        if read_facts(cubin).dangling_calls:
            # With a kernel the linker keeps what the handler calls; only then, for it makes loading
            # three times slower.
            keep, keep_key = self._ptx(KEEP)
            key = f"{key[:32]}{keep_key[:32]}"
            cubin = self._cubin([ptx, keep], name=source.file, key=key)
        lint(source.file, ptx=ptx, cubin=cubin, registers_max=nvrtc.REGISTERS_MAX)
        return CudaImage(name=source.file, cubin=cubin, digest=int(key[:16], 16))

    def kernel(self, source: HandlerSource) -> CudaImage:
        """A kernel that is launched by itself."""
        ptx, key = self._ptx(source)
        return CudaImage(
            name=source.file,
            cubin=self._cubin([ptx], name=source.file, key=key),
            digest=int(key[:16], 16),
        )

    def executor(self) -> CudaImage:
        """The executor, linked with the ballast so that its launch gives handlers what they may
        need.
        """
        (ptx, key), (ballast, ballast_key) = self._ptx(EXECUTOR), self._ptx(BALLAST)
        key = f"{key[:32]}{ballast_key[:32]}"
        cubin = self._cubin([ptx, ballast], name=EXECUTOR.file, key=key)
        return CudaImage(name=EXECUTOR.file, cubin=cubin, digest=int(key[:16], 16))

    def _ptx(self, source: HandlerSource) -> tuple[bytes, str]:
        registers = nvrtc.REGISTERS_MAX
        key = source.key(f"{nvrtc.versions()} {self._architecture} {registers} registers")
        path = self._cache.get(
            key,
            ".ptx",
            lambda target: _write(
                target,
                nvrtc.compile_ptx(
                    source.code(),
                    name=source.file,
                    architecture=self._architecture,
                    include=KERNELS,
                    defines=source.defines(),
                ),
            ),
        )
        return path.read_bytes(), key

    def _cubin(self, parts: list[bytes], *, name: str, key: str) -> bytes:
        path = self._cache.get(
            key,
            ".cubin",
            lambda target: _write(
                target, nvrtc.link_cubin(parts, name=name, architecture=self._architecture)
            ),
        )
        return path.read_bytes()


class CudaDevice:
    """One GPU, in the context that the rest of the process uses too."""

    needs_parking = True
    idle_ns = config.IDLE_NS
    stage_bytes = config.STAGE_BYTES
    residencies: tuple[str, ...] = tuple(POLICIES)

    def __init__(self, index: int = 0) -> None:
        self.name = f"cuda:{index}"
        self._context = CudaContext(index)
        try:
            self.library = HostLibrary(HostCompiler())
            self._memory = CudaMemory(self._context)
        except ConcordiaError:
            self._context.close()
            raise
        self._compiler = CudaCompiler(self._context.architecture())
        self._executors: list[CudaExecutor] = []
        self._code: list[CudaCode] = []
        self._bursts: list[Burst] = []
        self.share, self.allocate = self._memory.share, self._memory.allocate
        self.write, self.read = self._memory.write, self._memory.read
        self.check_range = self._memory.check_range

    @contextmanager
    def parked(self) -> Iterator[None]:
        """No executor of ours that stays is on the GPU meanwhile: for driver calls that wait for
        all that runs. A leased one is not parked; it leaves by itself within its lease. Raises
        DeviceError while one is inside that never will.
        """
        with ExitStack() as parked:
            for executor in tuple(self._executors):
                if executor.is_stuck():
                    raise DeviceError(
                        f"{self.name}: a task that does not end is on the GPU, and what waits for "
                        "all that runs there would not return: start the process anew"
                    )
                if not executor.parks_for_driver:
                    continue
                try:
                    is_out = executor.park(config.WAIT_PARK_S)
                except CudaError as error:
                    if not error.context_lost:
                        raise
                    continue  # nothing runs in a lost context
                if not is_out:
                    raise WaitTimeout(
                        f"{self.name}: an executor did not leave within {config.WAIT_PARK_S} s"
                    )
                parked.callback(executor.unpark)
            yield

    def unshare(self, address: int) -> None:
        """Undo `share`: waits for all that runs."""
        with self.parked():
            self._memory.unshare(address)

    def free(self, address: int) -> None:
        """Undo `allocate`: waits for all that runs."""
        with self.parked():
            self._memory.free(address)

    def build(self, source: HandlerSource) -> CudaImage:
        """A linked and linted handler, from the cache when it is there."""
        return self._compiler.handler(source)

    def load(self, image: Image) -> CudaCode:
        """Load a handler; this list, not Python's references, keeps it."""
        assert isinstance(image, CudaImage)
        with self.parked():
            code = CudaCode(image, context=self._context, memory=self._memory)
        self._code.append(code)
        return code

    def build_burst(self, source: HandlerSource) -> CudaImage:
        """A kernel of the whole GPU, from the cache when it is there."""
        return self._compiler.kernel(source)

    def burst(self, image: Image, name: str) -> Burst:
        """Load such a kernel; the executor is parked."""
        assert isinstance(image, CudaImage)
        with self.parked():
            burst = Burst(image, name, context=self._context)
        self._bursts.append(burst)
        return burst

    def neighbour(self) -> neighbour.Neighbour:
        """A probe of what executors cost others; its user closes it, parked."""
        image = self._compiler.kernel(neighbour.SOURCE)
        with self.parked():
            return neighbour.Neighbour(image, context=self._context)

    def executor(self, plan: ExecutorPlan, residency: str = DEFAULT) -> CudaExecutor:
        """The executor of a ring; `plan.lanes` counts its CTAs here."""
        policy, image = policy_of(residency), self._compiler.executor()
        with self.parked():
            executor = CudaExecutor(
                context=self._context,
                memory=self._memory,
                library=self.library,
                image=image,
                plan=plan,
                policy=policy,
            )
        self._executors.append(executor)
        return executor

    def close(self) -> None:
        """End what runs, then give everything back."""
        with self.parked():
            for executor in self._executors:
                if not executor.close(config.WAIT_PARK_S):
                    raise DeviceError(
                        f"{self.name}: an executor did not leave; nothing was released"
                    )
        for code in self._code:
            code.close()
        for burst in self._bursts:
            burst.close()
        self._memory.close()
        self._context.close()


def _write(path: Path, payload: bytes) -> None:
    path.write_bytes(payload)

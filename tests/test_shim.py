"""native/, shim_build.py, driver.py: what stands before the driver is invisible to whoever calls it.

Invariants: the shim has the driver's SONAME, needs it by a private name and no CUDA runtime, and exports hooks that the driver has and
nothing else; whatever way a program comes to a function, hooked ones are ours and all others the driver's; each call reaches the driver
exactly once; the file that the loader would take is the one found.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from concordia import abi
from concordia.errors import EnvironmentRefused
from concordia.integrations.program.driver import find_driver
from concordia.integrations.program.shim_build import NATIVE, hook_names
from shim_ground import ShimGround, build_driver, compile_c, make_ground

pytest_plugins = ["shim_fixtures"]

VENDOR_HEADERS = (
    Path("/usr/local/cuda/include/cuda.h"),
    Path("/usr/local/cuda-13.0/include/cuda.h"),
    Path(sysconfig.get_path("purelib"), "triton/backends/nvidia/include/cuda.h"),
)

WAYS = ("needed", "dlopen", "dlopen_so", "default", "resolver", "resolver_ptsz")
LAUNCHES = ("kernel", "kernel_ex", "cooperative", "kernel_ptsz", "kernel_ex_ptsz", "cooperative_ptsz")


def readelf(*arguments: str) -> str:
    return subprocess.run(["readelf", "-W", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


def test_shim_has_the_name_and_needs_of_a_driver_when_it_is_built(shim_ground: ShimGround) -> None:
    said = readelf("-d", str(shim_ground.run / "libcuda.so.1"))
    assert "SONAME" in said
    assert "[libcuda.so.1]" in said.partition("SONAME")[2].splitlines()[0]
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", said))
    assert "libcuda-real.so" in needed
    system = {"libc.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert needed <= {"libcuda-real.so", *system}, needed
    assert "RUNPATH" in said
    assert "$ORIGIN" in said


def test_shim_exports_hooks_and_nothing_else_when_it_is_built(shim_ground: ShimGround) -> None:
    rows = readelf("--dyn-syms", str(shim_ground.run / "libcuda.so.1")).splitlines()
    defined = {row.split()[7] for row in rows if len(row.split()) >= 8 and row.split()[6].isdigit()}
    hooks = {name for name in defined if not name.startswith("concordia_")}
    assert hooks <= set(hook_names())
    assert {"cuGetProcAddress", "cuGetProcAddress_v2", "cuLibraryLoadData", "cuLaunchKernel_ptsz"} <= hooks


def test_shim_hides_a_hook_when_the_driver_lacks_the_function(shim_ground: ShimGround, tmp_path: Path) -> None:
    old = build_driver(tmp_path / "old", "-DFAKE_OLD")
    ground = make_ground(tmp_path, old, shim_ground.user)
    assert ground.do("begin", "has:cuCtxCreate_v4", "has:cuCtxCreate_v3") == ["has cuCtxCreate_v4 0", "has cuCtxCreate_v3 1"]


@pytest.mark.parametrize("way", WAYS)
def test_each_launch_reaches_the_driver_once_when_called(shim_ground: ShimGround, way: str) -> None:
    image = shim_ground.run.parent / "image.ptx"
    image.write_text(".version 8.0\n")
    words = ["begin", "context", f"load:{image}", *(f"launch:{how}" for how in LAUNCHES), "graph", "cell", "new"]
    lines = shim_ground.do(*words, CALLS=way)
    assert lines == ["cell 7", "new 42"]
    assert lines == shim_ground.do(*words, CALLS=way, shimmed=False)


@pytest.mark.parametrize("way", WAYS)
def test_program_has_both_libraries_once_when_it_asks_for_the_driver(shim_ground: ShimGround, way: str) -> None:
    lines = shim_ground.do("begin", f"mapped:{shim_ground.run}", f"mapped:{shim_ground.driver.parent}", CALLS=way)
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["1", "1"]


def loader_cache(folder: Path, *libraries: Path) -> Path:
    """A cache as the loader has it, made by the system's own tool from these folders in this order."""
    configuration = folder / "ld.so.conf"
    configuration.write_text("".join(f"{library.parent}\n" for library in libraries))
    cache = folder / "ld.so.cache"
    subprocess.run(["/sbin/ldconfig", "-X", "-C", str(cache), "-f", str(configuration)], check=True, timeout=60, capture_output=True)
    return cache


def test_driver_found_is_the_first_in_the_search_path_when_there_are_several(shim_ground: ShimGround, tmp_path: Path) -> None:
    other = build_driver(tmp_path / "other")
    cache = loader_cache(tmp_path, other)
    search = f"{tmp_path}:{shim_ground.driver.parent}:{other.parent}"
    assert find_driver({"LD_LIBRARY_PATH": search}, cache=cache) == shim_ground.driver.resolve()


def test_driver_found_is_the_compatibility_one_when_the_cache_has_it_first(shim_ground: ShimGround, tmp_path: Path) -> None:
    compat = build_driver(tmp_path / "compat")
    assert find_driver({}, cache=loader_cache(tmp_path, compat, shim_ground.driver)) == compat.resolve()
    assert find_driver({}, cache=loader_cache(tmp_path, shim_ground.driver, compat)) == shim_ground.driver.resolve()


def test_driver_found_is_never_a_shim_when_a_run_starts_inside_a_run(shim_ground: ShimGround, tmp_path: Path) -> None:
    search = f"{shim_ground.run}:{shim_ground.driver.parent}"
    assert find_driver({"LD_LIBRARY_PATH": search}, cache=tmp_path / "none") == shim_ground.driver.resolve()


def test_driver_of_another_machine_is_passed_over_when_it_comes_first(shim_ground: ShimGround, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong" / "libcuda.so.1"
    wrong.parent.mkdir()
    wrong.write_bytes(b"\x7fELF\x01" + bytes(100))
    search = f"{wrong.parent}:{shim_ground.driver.parent}"
    assert find_driver({"LD_LIBRARY_PATH": search}, cache=tmp_path / "none") == shim_ground.driver.resolve()


@pytest.mark.parametrize("damage", [b"", b"glibc-ld.so.cache1.1", b"glibc-ld.so.cache1.1" + b"\xff" * 60])
def test_driver_is_refused_in_one_line_when_there_is_none(tmp_path: Path, damage: bytes) -> None:
    if Path("/lib/x86_64-linux-gnu/libcuda.so.1").exists():
        pytest.skip("a driver lies in the loader's default folder")
    cache = tmp_path / "cache"
    cache.write_bytes(damage)
    with pytest.raises(EnvironmentRefused, match="no NVIDIA driver") as refusal:
        find_driver({}, cache=cache)
    assert "\n" not in str(refusal.value)


def test_control_block_is_the_generated_one_when_committed() -> None:
    assert (NATIVE / "control.h").read_text("utf-8") == abi.control_header(), "regenerate: python -m concordia.abi"
    assert set(abi.CONTROL.offsets()) == {"magic", "window_base", "window_bytes", "map", "page_shift", "flags", "map_stride", "map_last", "reserved"}
    taken = abi.CONTROL_MAP_COPIES * (abi.CONTROL_MAP_STRIDE + abi.CONTROL_MAP_BYTES) >> 20
    prose = (NATIVE.parents[2] / "docs" / "program.md").read_text("utf-8")
    assert f"{taken} MiB of the GPU for marks" in prose
    assert f"all {abi.CONTROL_MAP_COPIES} copies of their map" in prose
    assert abi.CONTROL_EXIT_OFFSET + abi.CONTROL_PROGRESS_WORDS * abi.CONTROL_PROGRESS_STRIDE <= abi.CONTROL_ALLOCATED_BYTES


def test_declarations_are_the_vendors_when_its_header_is_installed(tmp_path: Path) -> None:
    header = next((path for path in VENDOR_HEADERS if path.is_file()), None)
    if header is None:
        pytest.skip("no cuda.h of the vendor's: neither CUDA's toolkit nor triton is installed")
    text = (NATIVE / "cuda_abi.h").read_text("utf-8")
    numbers = re.findall(r"^  (CU\w+) = \d+,", text, re.MULTILINE)
    structs = {
        "CUlaunchConfig": ("gridDimX", "blockDimZ", "sharedMemBytes", "hStream", "attrs", "numAttrs"),
        "CUmemAllocationProp": ("type", "requestedHandleTypes", "location", "win32HandleMetaData", "allocFlags"),
        "CUmemAccessDesc": ("location", "flags"), "CUlaunchParams": ("function", "gridDimX", "sharedMemBytes", "hStream", "kernelParams"),
        "CUmemLocation": ("type", "id"),
    }
    types = [*structs, *set(re.findall(r"^typedef [\w ]+ \*?(CU\w+);", text, re.MULTILINE))]
    assert len(numbers) > 15
    assert len(types) > 12
    body = "".join(f'printf("{name} %d\\n", (int){name});' for name in numbers)
    body += "".join(f'printf("{name} %zu\\n", sizeof({name}));' for name in types)
    body += "".join(
        f'printf("{name}.{member} %zu\\n", offsetof({name}, {member}));' for name, members in structs.items() for member in members
    )
    said = []
    ours, theirs = NATIVE / "cuda_abi.h", header
    for include, renamed in ((ours, ""), (theirs, "#define CUlaunchParams CUDA_LAUNCH_PARAMS")):
        source, program = tmp_path / "facts.c", tmp_path / "facts"
        source.write_text(f'#include "{include}"\n{renamed}\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{ {body} return 0; }}\n')
        compile_c([str(source)], program)
        said.append(subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=True).stdout)
    assert said[0] == said[1]

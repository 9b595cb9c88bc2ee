"""The kernel cache and the system compiler.

Invariants: what the cache holds is complete, whenever a compilation is killed; its name changes with everything that could change the code;
folders that others can write are refused; the oldest files go, and so does what a killed compilation left.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from concordia import config
from concordia.device.compiler import HandlerSource, HostCompiler
from concordia.device.kernel_cache import KernelCache
from concordia.errors import CompileError, EnvironmentRefused

TINY = 'extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }'


def tiny(answer: int) -> HandlerSource:
    return HandlerSource.of("tiny.cu", {"ANSWER": answer}, text=TINY)


def answer_of(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path / "kernels")


def test_file_is_compiled_once_when_asked_for_twice(cache: KernelCache) -> None:
    path, key = HostCompiler(cache).compile(tiny(41))
    before = path.stat()
    again, same = HostCompiler(cache).compile(tiny(41))
    assert (again, same) == (path, key)
    assert (again.stat().st_ino, again.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert answer_of(path) == 41
    assert [entry.name for entry in cache.folder.iterdir()] == [path.name]


def test_name_changes_when_anything_that_makes_the_code_changes(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny(1)
    keys = {
        base.key("gcc"),
        tiny(2).key("gcc"),
        base.key("clang"),
        HandlerSource.of("tiny.cu", {"ANSWER": 1}, text=TINY + " ").key("gcc"),
        HandlerSource.of("tiny.cu", {"ANSWE": 1}, text=TINY).key("gcc"),
    }
    plain, fast = HostCompiler(cache), HostCompiler(cache, flags=("-Ofast",))
    keys |= {plain.compile(base)[1], fast.compile(base)[1]}
    monkeypatch.setattr("concordia.abi.ABI_VERSION", 99)
    keys.add(base.key("gcc"))
    assert len(keys) == 8


def test_name_changes_when_a_header_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("concordia.device.compiler.KERNELS", tmp_path)
    (tmp_path / "a.h").write_text("int a;")
    before = tiny(1).key("gcc")
    (tmp_path / "a.h").write_text("int b;")
    assert tiny(1).key("gcc") != before


def test_nothing_is_kept_when_the_source_does_not_compile(cache: KernelCache) -> None:
    with pytest.raises(CompileError, match="not_a_type"):
        HostCompiler(cache).compile(HandlerSource.of("bad.cu", text="not_a_type x;"))
    assert list(cache.folder.iterdir()) == []


def test_cache_is_refused_when_others_can_write_it(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o770)
    with pytest.raises(EnvironmentRefused, match="nobody else can write"):
        KernelCache(folder)


def test_cache_is_refused_when_its_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentRefused, match="set CONCORDIA_CACHE"):
        KernelCache(tmp_path / "file" / "kernels")


# A child that is killed in the middle of making the file: after the compiler wrote a part of it, before the rename.
KILLED = """
import os, signal, sys
from pathlib import Path
from concordia.device.kernel_cache import KernelCache
def build(path):
    Path(path).write_bytes(b"half of a shared object")
    os.kill(os.getpid(), signal.SIGKILL)
KernelCache(Path(sys.argv[1])).get("victim", ".so", build)
"""


def test_cache_has_no_torn_file_when_a_compilation_is_killed(cache: KernelCache) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(cache.folder)], check=False, timeout=60
    )
    assert child.returncode == -signal.SIGKILL
    (left,) = cache.folder.iterdir()
    assert left.suffix == ".part"
    # The next one proves life: it makes the file, and clears away what was left.
    path = cache.get("victim", ".so", lambda target: target.write_bytes(b"whole") and None)
    assert path.read_bytes() == b"whole"
    assert [entry.name for entry in cache.folder.iterdir()] == ["victim.so"]


def test_both_get_the_whole_file_when_two_processes_race(cache: KernelCache) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from concordia.device.compiler import HandlerSource, HostCompiler\nfrom concordia.device.kernel_cache import KernelCache\n"
        f"text = {TINY!r}\n"
        "cache = KernelCache(Path(sys.argv[1]))\n"
        "print(HostCompiler(cache).compile(HandlerSource.of('tiny.cu', {'ANSWER': 7}, text=text))[0])\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(cache.folder)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    paths = {child.communicate(timeout=120)[0].strip() for child in children}
    assert len(paths) == 1
    assert answer_of(Path(paths.pop())) == 7
    assert len(list(cache.folder.iterdir())) == 1


def test_oldest_file_goes_when_the_cache_is_full(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "KERNEL_CACHE_FILES_MAX", 3)
    for number in range(5):
        path = cache.get(f"k{number}", ".so", lambda target: target.write_bytes(b"x") and None)
        os.utime(path, (number, number))
    assert sorted(entry.name for entry in cache.folder.iterdir()) == ["k2.so", "k3.so", "k4.so"]


def test_compiler_is_refused_when_there_is_none(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EnvironmentRefused, match="install g\\+\\+"):
        HostCompiler(cache)


def test_compilation_ends_when_it_takes_too_long(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = HostCompiler(cache)
    monkeypatch.setattr(config, "COMPILE_WAIT_S", 0.01)
    with pytest.raises(CompileError, match="no result after"):
        compiler.compile(HandlerSource.of("kv.cu", text='#include "host.cpp"'))
    assert list(cache.folder.iterdir()) == []

"""integrations/program/{native_build,find_program}.py: which compiler there is, and what a program's name means.

Invariants: a name is looked for as the system does that starts it; another compiler, or the same one changed, is another identity; a call of the compiler
that fails is one error with what it said.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from concordia.errors import CompileError, EnvironmentRefused
from concordia.integrations.program.find_program import find_program
from concordia.integrations.program.native_build import compile_c, find_compiler, identity_of


def _program(folder: Path, name: str, *, mode: int = 0o755) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\necho $0\n")
    path.chmod(mode)
    return path


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`first` has what may not be started, `second` has the program, and the working folder another."""
    _program(tmp_path / "first", "tool", mode=0o644)
    _program(tmp_path / "second", "tool")
    _program(tmp_path / "here", "tool")
    (tmp_path / "here" / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PATH", f"{tmp_path}/first:{tmp_path}/second")
    return tmp_path


def test_program_is_the_first_that_can_be_started_when_path_names_several(folders: Path) -> None:
    assert find_program("tool") == str(folders / "second" / "tool")


@pytest.mark.parametrize(
    ("name", "found"),
    [("here/tool", None), ("./tool", "./tool"), ("../second/tool", "../second/tool"), ("../first/tool", None), ("./folder", None), ("folder", None), ("", None), ("other", None)],
)
def test_name_with_a_folder_is_itself_when_it_can_be_started(folders: Path, name: str, found: str | None) -> None:
    assert find_program(name) == found


@pytest.mark.parametrize("path", ["", ":/nonexistent", "/nonexistent:", "/nonexistent::/other", None])
def test_program_is_what_the_system_starts_when_path_is_odd(folders: Path, monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    assert find_program("tool") == (None if path is None else "./tool")
    assert find_program("sh") == ("/bin/sh" if path is None else None)
    for name in ("tool", "sh"):
        found = find_program(name)
        if found is None:
            with pytest.raises(FileNotFoundError):
                os.posix_spawnp(name, [name], os.environ)
        else:
            assert os.waitpid(os.posix_spawnp(name, [name, "-c", "exit 0"], os.environ), 0)[1] == 0


def test_compiler_is_the_one_that_is_named_when_it_is_there(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "tool")
    assert find_compiler() == "tool"
    monkeypatch.setenv("CC", "/nonexistent/cc")
    with pytest.raises(EnvironmentRefused, match="no C compiler"):
        find_compiler()
    _program(folders / "second", "gcc")
    assert find_compiler() == "gcc"


def test_identity_is_another_when_the_compiler_is(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folders / "second" / "tool"
    first = identity_of("tool")
    assert first == identity_of("tool") == identity_of(str(tool))
    os.utime(tool, ns=(0, tool.stat().st_mtime_ns + 1))
    touched = identity_of("tool")
    with tool.open("a") as file:
        file.write("#\n")
    os.utime(tool, ns=(0, 0))
    longer = identity_of("tool")
    monkeypatch.setenv("PATH", str(folders / "here"))
    assert len({first, touched, longer, identity_of("tool"), identity_of("missing")}) == 5


def test_identity_is_another_when_one_cache_stands_before_both(folders: Path) -> None:
    for name in ("gcc", "clang"):
        (folders / "second" / name).symlink_to("tool")
    assert identity_of("gcc") != identity_of("clang")


def test_error_has_what_the_compiler_said_when_it_fails() -> None:
    compile_c("a thing", [sys.executable, "-c", "print('fine')"])
    with pytest.raises(CompileError, match=r"^a thing: .* gave 3\nno such luck"):
        compile_c("a thing", [sys.executable, "-c", "import sys; sys.stderr.write('no such luck'); sys.exit(3)"])


def test_error_is_said_when_the_compiler_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("cc", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(CompileError, match=r"^a thing: no result after"):
        compile_c("a thing", ["cc"])

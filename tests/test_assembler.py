"""native/assembler/, integrations/program/assembler.py, instrument/assembled.py: kernels that an assembler compiles have their marks.

Invariants: what the stand-in says, writes and returns is the real assembler's; whatever goes wrong, it is the real assembler on the original
text, in bounded time; its version text is another one than without us, and another one for other options; a marked cubin says which of its
kernels have which hooks, and takes the control block's address in one word, which the shim fills in; a cubin for other options, or a damaged
one, is ordinary code.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from concordia import config
from concordia.errors import ImageRefused
from concordia.instrument import assembled
from concordia.instrument.cache import ImageCache, image_key
from concordia.instrument.elf import read_cubin
from concordia.instrument.options import Options
from concordia.instrument.proof import first_difference
from concordia.instrument.report import Hook, KernelReport, Slot, SlotKind, fill
from concordia.instrument.rewrite import rewrite
from concordia.integrations.program.assembler import VARIABLES, StandIn, build, place_stand_in
from concordia.integrations.program.run_folder import ProgramRun
from concordia.paths import Paths
from shim_ground import folder_of_length, make_ground
from waiting import until

pytest.importorskip("triton", reason="triton is not installed: its wheel has the assembler")
sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu"))

pytest_plugins = ["shim_fixtures"]

ROOT = pathlib.Path(__file__).parents[1]
OPTIONS = Options(arch=90, entry=True, exit=True, marks=True)
CONTROL = 0x7F12_3456_7800
BOUND_S = 120.0
TAG = "TORCH_COMPILE_CACHE_KEY_TAG"
NAME = "ptxas-blackwell"  # the one that Triton takes for sm_90


@dataclass
class Ground:
    """A run folder with a stand-in, and a rewriter when it was started."""

    run: ProgramRun
    cache: pathlib.Path
    options: Options = OPTIONS
    environment: dict[str, str] = field(default_factory=dict)
    stand_in: StandIn = field(default_factory=StandIn)
    rewriter: subprocess.Popen[bytes] | None = None

    def place(self, **settings: object) -> None:
        self.stand_in = place_stand_in(self.run.path, self.options, self.environment)
        assert not self.stand_in.why_not
        self.run.settle({**self.stand_in.settings, **settings})

    def start_rewriter(self) -> None:
        self.rewriter = subprocess.Popen(
            [sys.executable, "-m", "concordia.instrument.rewriter", "--run", str(self.run.path), "--cache", str(self.cache),
             "--options", self.options.to_json()], env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
        until(self.run.socket.exists, 30)

    def close(self) -> None:
        if self.rewriter:
            self.rewriter.terminate()
            self.rewriter.wait(timeout=30)

    def assemble(self, source: pathlib.Path, *options: str, name: str = NAME, **environment: str) -> subprocess.CompletedProcess[str]:
        return assemble(self.stand_in.paths[name], source, *options, **environment)

    def notes(self) -> list[str]:
        found = [json.loads(line) for path in self.run.modules.iterdir() for line in path.read_text().splitlines()]
        return [line["why"] for line in found if line["event"] == "note"]


def assemble(program: pathlib.Path | str, source: pathlib.Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As Triton calls it; the result lies beside the source."""
    output(source).unlink(missing_ok=True)
    words = [str(program), "-lineinfo", "-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a", *options, str(source), "-o", str(output(source))]
    return subprocess.run(words, capture_output=True, text=True, timeout=BOUND_S, check=False, env=os.environ | environment)


def output(source: pathlib.Path) -> pathlib.Path:
    return source.with_suffix(".ptx.o")


def is_marked(source: pathlib.Path) -> bool:
    return assembled.read_assembled(output(source).read_bytes()) is not None


@pytest.fixture(scope="session")
def real() -> str:
    import triton

    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / NAME)


@pytest.fixture(scope="session")
def text() -> str:
    import triton_kernel

    found = triton_kernel.compiled().asm["ptx"]
    assert isinstance(found, str)
    return found


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def ground(built: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    monkeypatch.setenv("CONCORDIA_CACHE", str(built))
    for variable in ("CONCORDIA_DISABLE", "CONCORDIA_RUN", *VARIABLES.values()):
        monkeypatch.delenv(variable, raising=False)
    with tempfile.TemporaryDirectory(prefix="cnc-", dir="/tmp") as folder:  # a socket's path is short
        run = ProgramRun(pathlib.Path(folder, "run"))
        run.path.mkdir(mode=0o700)
        run.modules.mkdir(mode=0o700)
        made = Ground(run, Paths.default().image_cache)
        yield made
        made.close()


@pytest.fixture
def source(tmp_path: pathlib.Path, text: str) -> pathlib.Path:
    """Triton's text, which no cache has."""
    path = tmp_path / "source.ptx"
    path.write_text(f"{text}// {random.randrange(1 << 60)}\n")
    return path


@pytest.fixture
def original(real: str, source: pathlib.Path) -> bytes:
    done = assemble(real, source)
    assert done.returncode == 0, done.stderr
    return output(source).read_bytes()


def test_stand_in_compiles_without_a_warning(tmp_path: pathlib.Path) -> None:
    build(tmp_path / "program", flags=("-Werror",))


def test_kernel_has_its_hooks_and_one_slot_when_triton_compiles_it(ground: Ground, tmp_path: pathlib.Path) -> None:
    ground.place()
    ground.start_rewriter()
    code = (
        "import sys, hashlib, triton_kernel\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import make_backend\n"
        "found = triton_kernel.compiled()\n"
        "open(sys.argv[1], 'wb').write(found.asm['cubin'])\n"
        "print(repr(make_backend(GPUTarget('cuda', 90, 32)).hash()), found.asm['ptx'].count('concordia'))\n"
    )
    said = []
    for index, environment in enumerate(({}, ground.stand_in.environment({}))):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / str(index))], capture_output=True, text=True, timeout=BOUND_S, check=False,
            env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests' / 'gpu'}", "TRITON_CACHE_DIR": str(tmp_path / "triton")} | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert ground.notes() == []
    assert said[0] != said[1], "Triton would take the kernels of one for the other"
    assert "Store marks of Concordia, options" in said[1]
    assert all(line.endswith(" 0\n") for line in said), "the text that Triton keeps is its own"
    plain, hooked = ((tmp_path / name).read_bytes() for name in "01")
    assert assembled.read_assembled(plain) is None
    check_taken(hooked)


def check_taken(cubin: bytes) -> None:
    """A rewrite fills in one word and changes nothing else."""
    done = rewrite(cubin, OPTIONS)
    (kernel,), (slot,) = done.kernels, done.slots
    assert (kernel.name, kernel.hooks, kernel.reason) == ("softmax_rows", Hook.ENTRY | Hook.EXIT | Hook.MARKS, "")
    assert kernel.registers > 0
    assert slot.kind is SlotKind.RAW
    assert done.image == cubin
    ready = fill(done.image, done.slots, CONTROL)
    assert [at for at in range(len(cubin)) if cubin[at] != ready[at]] == [slot.offset + at for at in range(1, 6)]
    constants = [section for section in read_cubin(ready).sections if section.name == ".nv.constant3"]
    assert bytes(read_cubin(ready).bytes_of(constants[0])) == CONTROL.to_bytes(8, "little")


def test_calls_are_answered_as_by_the_real_one(ground: Ground, real: str, source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ground.place()
    ground.start_rewriter()
    stand_in = str(ground.stand_in.paths[NAME])

    def said(program: str, *words: str) -> tuple[int, str, str]:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=BOUND_S, check=False, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    broken = tmp_path / "broken.ptx"
    broken.write_text(".version 8.0\n.target sm_90\n.visible .entry k() { no.such.thing %r1; }\n")
    for words in (["--help"], ["--no-such-option"], [str(tmp_path / "none.ptx")], [str(broken)], []):
        assert said(stand_in, *words) == said(real, *words), words
    code, out, err = said(stand_in, "--version")
    assert (code, err) == (0, "")
    assert out.startswith(said(real, "--version")[1])
    done = ground.assemble(source)
    assert done.returncode == 0
    assert "Used" in done.stderr
    assert is_marked(source)
    check_taken(output(source).read_bytes())


@pytest.mark.parametrize("words", [["-c"], ["--compile-only"], ["-g"], ["--device-debug"], ["-ewp"]])
def test_text_stays_as_it_is_when_it_is_linked_or_debugged(ground: Ground, real: str, source: pathlib.Path, words: list[str]) -> None:
    ground.place()
    ground.start_rewriter()
    expected = assemble(real, source, *words)
    wanted = output(source).read_bytes() if output(source).exists() else None
    done = ground.assemble(source, *words)
    assert done.returncode == expected.returncode
    assert (output(source).read_bytes() if output(source).exists() else None) == wanted


@pytest.mark.parametrize("sanitizer", ["address,undefined"])
def test_no_sanitizer_complains_when_the_stand_in_is_called(ground: Ground, source: pathlib.Path, original: bytes, sanitizer: str) -> None:
    ground.place(image_wait_ms=2000, assembler_wait_ms=2000)
    build(ground.stand_in.paths[NAME], flags=(f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"))
    done = ground.assemble(source)
    assert (done.returncode, output(source).read_bytes()) == (0, original), done.stderr
    ground.start_rewriter()
    for words in ([], ["--no-such-option"], ["--version"], ["x" * 500] * 1100):
        done = ground.assemble(source, *words)
        assert "Sanitizer" not in done.stderr, done.stderr
        assert "runtime error" not in done.stderr, done.stderr
    done = ground.assemble(source)
    assert done.returncode == 0
    assert is_marked(source)
    (ground.run.path / "settings").write_bytes(b"assembler_key=" + bytes(range(1, 256)) * 40)
    assert "Sanitizer" not in ground.assemble(source).stderr


def test_prose_states_the_bound_when_it_changes() -> None:
    page = (ROOT / "docs" / "instrument.md").read_text("utf-8")
    assert f"none in {config.ASSEMBLER_WAIT_S:.0f} s" in page


def test_version_is_another_when_options_are(ground: Ground, tmp_path: pathlib.Path) -> None:
    found = set()
    for options in (OPTIONS, OPTIONS.replaced(exit=False), OPTIONS.replaced(page_shift=12), OPTIONS.replaced(deny=("a",))):
        shutil.rmtree(ground.run.path)
        ground.run.path.mkdir(mode=0o700)
        ground.options = options
        ground.place()
        done = subprocess.run([str(ground.stand_in.paths["ptxas"]), "--version"], capture_output=True, text=True, timeout=BOUND_S, check=True)
        found.add(done.stdout)
    assert len(found) == 4


def test_original_comes_out_when_there_is_no_rewriter(ground: Ground, source: pathlib.Path, original: bytes) -> None:
    ground.place()
    assert ground.assemble(source).returncode == 0
    assert output(source).read_bytes() == original
    assert ground.notes() == ["no rewriter"]


@pytest.mark.parametrize("size", [120, config.RUN_PATH_BYTES_MAX])
def test_text_is_marked_when_the_path_of_the_run_is_long(ground: Ground, source: pathlib.Path, size: int) -> None:
    ground.run = ProgramRun(folder_of_length(ground.run.path, size))
    ground.run.modules.mkdir(parents=True, mode=0o700)
    ground.run.path.chmod(0o700)
    ground.place()
    ground.start_rewriter()
    assert ground.assemble(source).returncode == 0
    assert ground.notes() == []
    assert is_marked(source)


def test_original_comes_out_when_the_rewriter_is_too_slow(ground: Ground, source: pathlib.Path, original: bytes) -> None:
    ground.place(image_wait_ms=200, assembler_wait_ms=400)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(ground.run.socket))
        silent.listen(8)
        began = time.monotonic()
        assert ground.assemble(source).returncode == 0
        assert time.monotonic() - began < 30
    assert output(source).read_bytes() == original
    assert ground.notes() == ["the rewriter was too slow"]


def test_original_comes_out_when_it_is_switched_off_or_has_no_run(ground: Ground, real: str, source: pathlib.Path, original: bytes) -> None:
    ground.place()
    ground.start_rewriter()
    version = subprocess.run([real, "--version"], capture_output=True, text=True, timeout=BOUND_S, check=True).stdout
    stand_in = str(ground.stand_in.paths[NAME])

    def check(**environment: str) -> None:
        assert ground.assemble(source, **environment).returncode == 0
        assert output(source).read_bytes() == original
        words = [stand_in, "--version"]
        assert subprocess.run(words, capture_output=True, text=True, timeout=BOUND_S, check=True, env=os.environ | environment).stdout == version

    check(CONCORDIA_DISABLE="1")
    ground.run.path.chmod(0o755)
    check()
    ground.run.path.chmod(0o700)
    (ground.run.path / "settings").unlink()
    check()


def test_original_comes_out_when_the_cache_is_damaged(ground: Ground, source: pathlib.Path, original: bytes) -> None:
    ground.place()
    cache = ImageCache(ground.cache, OPTIONS.replaced(assembler=True).key())
    cache.path(image_key(source.read_bytes())).write_bytes(b"CNCIMG01 and something else")
    assert ground.assemble(source).returncode == 0
    assert output(source).read_bytes() == original
    ground.start_rewriter()
    assert ground.assemble(source).returncode == 0
    assert is_marked(source), "a rewriter makes it anew"


def script(folder: pathlib.Path, body: str) -> str:
    path = folder / "their-ptxas"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


OF_OURS = 'for word in "$@"; do case "$word" in /proc/self/fd/*) {act};; esac; done; '


@pytest.mark.parametrize("act", ["exit 3", "kill -SEGV $$", "sleep 600"])
def test_original_comes_out_when_the_assembler_fails_on_marks(
    ground: Ground, real: str, source: pathlib.Path, original: bytes, act: str
) -> None:
    ground.environment = {VARIABLES[NAME]: script(source.parent, f'{OF_OURS.format(act=act)} echo by the real one >&2; exec {real} "$@"')}
    ground.place(assembler_run_ms=2000)
    ground.start_rewriter()
    done = ground.assemble(source)
    assert done.returncode == 0
    assert done.stderr.count("by the real one\n") == 1
    assert output(source).read_bytes() == original
    assert ground.notes() == ["the assembler was too slow" if "sleep" in act else "the assembler refused it"]


def test_failure_is_the_real_ones_when_it_always_fails(ground: Ground, source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ground.environment = {VARIABLES[NAME]: script(tmp_path, "echo out; echo no >&2; exit 255")}
    ground.place()
    ground.start_rewriter()
    done = ground.assemble(source)
    assert (done.returncode, done.stdout, done.stderr) == (255, "out\n", "no\n")
    words = [str(ground.stand_in.paths[NAME]), "--version"]
    assert subprocess.run(words, capture_output=True, timeout=BOUND_S, check=False).stdout == b"", "Triton goes on to its own"


def test_assembler_of_triton_does_the_work_when_the_users_has_gone(ground: Ground, source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    theirs = pathlib.Path(script(tmp_path, "exit 9"))
    ground.environment = {VARIABLES[NAME]: str(theirs)}
    ground.place()
    ground.start_rewriter()
    theirs.unlink()
    assert ground.assemble(source).returncode == 0
    assert is_marked(source)


def test_users_assembler_is_the_real_one_when_a_run_is_inside_a_run(ground: Ground, built: pathlib.Path, tmp_path: pathlib.Path) -> None:
    theirs = script(tmp_path, "exit 9")
    ground.environment = {VARIABLES[NAME]: theirs}
    ground.place()
    inner = tmp_path / "inner"
    inner.mkdir(mode=0o700)
    placed = place_stand_in(inner, OPTIONS, ground.stand_in.environment({}))
    assert placed.settings[f"real_{NAME}"] == theirs
    assert f"real_{'ptxas'}" not in placed.settings


def test_triton_is_not_told_when_the_stand_in_does_not_start(ground: Ground) -> None:
    ground.place()
    told = ground.stand_in.environment({TAG: "mine"})
    assert set(told) == {TAG, *VARIABLES.values()}
    assert told[TAG].startswith("mine+concordia-")
    assert StandIn().environment({TAG: "mine"}) == {}
    ground.stand_in.paths[NAME].chmod(0o600)
    if os.geteuid() == 0:
        ground.stand_in.paths[NAME].write_bytes(b"#!/no/such/interpreter\n")
    assert ground.stand_in.environment({}) == {}


def test_nothing_is_placed_when_machine_code_cannot_be_read(tmp_path: pathlib.Path) -> None:
    assert place_stand_in(tmp_path, OPTIONS.replaced(arch=100), {}) == StandIn(why_not="machine code for sm_100 cannot be read")


def test_all_are_marked_when_many_are_assembled_at_once(ground: Ground, text: str, tmp_path: pathlib.Path) -> None:
    ground.place()
    ground.start_rewriter()
    seed = random.randrange(1 << 60)
    sources = [tmp_path / f"{i}.ptx" for i in range(12)]
    for i, path in enumerate(sources):
        path.write_text(f"{text}// {seed} {i // 2}\n")  # each twice
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        codes = [done.returncode for done in pool.map(ground.assemble, sources)]
    assert codes == [0] * 12
    assert ground.notes() == []
    assert all(map(is_marked, sources))


def test_modules_are_marked_when_a_program_runs_triton_under_us(
    shim_parts: tuple[pathlib.Path, pathlib.Path], built: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """All of it: the command line, Triton in a child, the fake driver that loads what came out."""
    driver, user = shim_parts
    cubin, folder = tmp_path / "out.cubin", tmp_path / "handed"
    folder.mkdir()
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys, triton_kernel\n"
        f"open({str(cubin)!r}, 'wb').write(triton_kernel.compiled().asm['cubin'])\n"
        f"sys.exit(subprocess.call([{str(user)!r}, 'begin', 'context', {f'load:{cubin}'!r}, 'launch:kernel', {f'dump:{folder}'!r}]))\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CONCORDIA", "LD_", "FAKE", "TRITON"))}
    with tempfile.TemporaryDirectory(prefix="cnc-", dir="/tmp") as base:
        environment = clean | {
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests' / 'gpu'}", "LD_LIBRARY_PATH": str(driver.parent), "CONCORDIA_CACHE": str(built),
            "CONCORDIA_RUN_DIR": base, "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        }  # fmt: skip

        def concordia(*words: str) -> str:
            words = (sys.executable, "-m", "concordia.cli", *words)
            done = subprocess.run(words, capture_output=True, text=True, timeout=BOUND_S, check=False, env=environment)
            assert done.returncode == 0, done.stderr
            return done.stdout

        def images() -> list[dict[str, object]]:
            found = json.loads(concordia("modules", "--json"))
            assert found["notes"] == []
            listed: list[dict[str, object]] = found["images"]
            return listed

        for _ in range(2):  # the second time from Triton's cache, in another run folder
            concordia("run", "--hooks", "entry,marks", "--", sys.executable, str(program))
            assert len(list((tmp_path / "triton").rglob("*.cubin"))) == 1
        (image,) = images()
        assert (image["outcome"], image["kind"]) == ("rewritten", "cubin")
        assert [(kernel["name"], kernel["hooks"]) for kernel in image["kernels"]] == [("softmax_rows", ["entry", "marks"])]  # type: ignore[attr-defined]
        marked = cubin.read_bytes()
        concordia("run", "--hooks", "entry", "--", sys.executable, str(program))
        (image,) = images()
        assert [(kernel["name"], kernel["hooks"]) for kernel in image["kernels"]] == [("softmax_rows", ["entry"])]  # type: ignore[attr-defined]
        assert assembled.read_assembled(cubin.read_bytes()) is None, "Triton kept both apart"
        assert assembled.read_assembled(marked) is not None


# --- what a cubin says


@pytest.fixture(scope="session")
def hooked(text: str, real: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    source = tmp_path_factory.mktemp("hooked") / "hooked.ptx"
    source.write_bytes(rewrite(text.encode(), OPTIONS.replaced(assembler=True)).image)
    done = assemble(real, source)
    assert done.returncode == 0, done.stderr
    return output(source).read_bytes()


OTHERS = [OPTIONS.replaced(page_shift=12), OPTIONS.replaced(marks=False), OPTIONS.replaced(deny=("softmax*",))]


@pytest.mark.parametrize("options", OTHERS)
def test_code_is_ordinary_when_its_hooks_are_for_other_options(hooked: bytes, options: Options) -> None:
    done = rewrite(hooked, options)
    assert not any(slot.kind is SlotKind.RAW for slot in done.slots)
    assert not any(kernel.hooks & Hook.MARKS for kernel in done.kernels)
    if not options.deny:
        assert done.kernels[0].hooks == Hook.ENTRY | Hook.EXIT, "in machine code"
        assert first_difference(hooked, done.image) is None


def test_table_is_read_as_it_was_written_or_not_at_all(hooked: bytes) -> None:
    found = assembled.read_assembled(hooked)
    assert found is not None
    assert found.kernels == (KernelReport("softmax_rows", Hook.ENTRY | Hook.EXIT | Hook.MARKS),)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    at = hooked.index(b"CNCHOOK1")
    for _ in range(60):
        damaged = bytearray(hooked)
        damaged[at + rng.randrange(40)] ^= 1 << rng.randrange(8)
        assert assembled.read_assembled(bytes(damaged)) is None
    for _ in range(60):  # anywhere: never an error
        damaged = bytearray(hooked)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        rewrite(bytes(damaged), OPTIONS)
    filled_in = bytearray(hooked)
    filled_in[found.control_at] = 1
    assert assembled.read_assembled(bytes(filled_in)) is None


def test_kernel_without_marks_gets_hooks_in_machine_code_when_another_has_marks(real: str, tmp_path: pathlib.Path) -> None:
    head = ".version 8.0\n.target sm_90\n.address_size 64\n"
    kernels = "".join(
        f".visible .entry {name}(.param .u64 p) {{ .reg .b64 %rd<3>; ld.param.u64 %rd1, [p]; {call} st.global.u64 [%rd1], %rd1; ret; }}\n"
        for name, call in (("clear", ""), ("unclear", "ld.global.u64 %rd2, [%rd1]; call %rd2, (), proto;"))
    ).replace("{ .reg", "{ proto: .callprototype _ (); .reg")
    done = rewrite((head + kernels).encode(), OPTIONS.replaced(assembler=True))
    assert [bool(kernel.hooks & Hook.MARKS) for kernel in done.kernels] == [True, False]
    source = tmp_path / "two.ptx"
    source.write_bytes(done.image)
    assert assemble(real, source).returncode == 0
    taken = rewrite(output(source).read_bytes(), OPTIONS.replaced(exit=False))
    found = {kernel.name: kernel for kernel in taken.kernels}
    assert found["clear"].hooks & Hook.MARKS
    assert not found["unclear"].hooks & Hook.MARKS
    assert "stores are not marked: an indirect call" in found["unclear"].reason
    assert found["unclear"].hooks == Hook.ENTRY, found["unclear"]
    assert sorted(slot.kind for slot in taken.slots) == [SlotKind.LOW, SlotKind.HIGH, SlotKind.RAW]
    (word,) = (section for section in read_cubin(taken.image).sections if section.name == ".nv.constant3")
    assert Slot(word.offset, SlotKind.RAW) in taken.slots, "the splice moved it"


def test_text_is_refused_when_it_has_been_here_before(text: str) -> None:
    once = rewrite(text.encode(), OPTIONS.replaced(assembler=True))
    again = rewrite(once.image, OPTIONS.replaced(assembler=True))
    assert not again.is_changed
    assert again.kernels[0].reason == "PTX that has been here before"


def test_table_is_refused_when_it_is_too_long() -> None:
    with pytest.raises(ImageRefused):
        assembled.declarations(16, [KernelReport("k" * 4000, Hook.MARKS)] * 20)


def test_shim_fills_the_word_when_a_marked_cubin_is_loaded(
    hooked: bytes, shim_parts: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    ground = make_ground(tmp_path, *shim_parts)
    cache = ImageCache(tmp_path / "images", OPTIONS.key())
    cache.store(image_key(hooked), rewrite(hooked, OPTIONS))
    ground.settle(mode="rewrite", cache=cache.folder)
    image, folder = tmp_path / "kernel.cubin", tmp_path / "handed"
    image.write_bytes(hooked)
    folder.mkdir()
    ground.do("begin", f"load:{image}", "context", f"load:{image}", f"dump:{folder}")
    before, after = ((folder / name).read_bytes() for name in "01")
    found = assembled.read_assembled(hooked)
    assert found is not None
    end = len(before)  # the fake driver keeps what lies in front of the table of segments
    assert found.control_at + 8 < end == len(after) <= len(hooked)
    assert before == hooked[:end], "without a control block the word stays 0"
    word = after[found.control_at : found.control_at + 8]
    assert int.from_bytes(word, "little") != 0
    assert after == hooked[: found.control_at] + word + hooked[found.control_at + 8 : end]

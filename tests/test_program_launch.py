"""integrations/program/{launch,supervisor,run_folder,coverage}.py, cli_program.py: a program runs as it would without us.

Invariants: exit code, signals, terminal streams and environment are the program's own; what is wrong is one line and exit code 2 before
anything is started; no rewriter, no half-made folder is left; the run folder stays and says what was loaded; old ones go, living ones never.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from concordia import config
from concordia.errors import UsageError
from concordia.instrument.request import Status, ask
from concordia.integrations.program import architecture as architecture_room
from concordia.integrations.program.coverage import read_run
from concordia.integrations.program.run_folder import ProgramRun, find_run, make_run, remove_old
from shim_ground import folder_of_length
from waiting import until

pytest_plugins = ["shim_fixtures"]

SOURCE = Path(__file__).parents[1] / "src"
PTX = """.version 8.0
.target sm_90
.address_size 64
.visible .entry add(.param .u64 p, .param .u64 v)
{
  .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [p];
  ld.param.u64 %rd2, [v];
  cvta.to.global.u64 %rd1, %rd1;
  st.global.u64 [%rd1], %rd2;
  ret;
}
"""

LONG = "/nonexistent" + 5 * ("/" + 200 * "é")  # in bytes: its letters are fewer


class Command:
    """The command line, with the fake driver where the loader looks."""

    def __init__(self, folder: Path, base: Path, cache: Path, driver: Path, user: Path) -> None:
        self.folder, self.base, self.cache, self.driver, self.user = folder, base, cache, driver, user
        self.ptx = folder / "kernel.ptx"
        self.text = f"{PTX}// {base}\n"  # not in the cache
        self.ptx.write_text(self.text)

    def environment(self, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("CONCORDIA", "LD_", "FAKE"))}
        return {
            **clean,
            "PYTHONPATH": str(SOURCE),
            "LD_LIBRARY_PATH": str(self.driver.parent),
            "CONCORDIA_CACHE": str(self.cache),
            "CONCORDIA_RUN_DIR": str(self.base),
            **more,
        }

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "concordia.cli", *words],
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            preexec_fn=_hears_interrupts,
        )

    def do(self, *words: str, said: str | None = None, **environment: str) -> tuple[int, str, str]:
        process = self.start(*words, **environment)
        out, err = process.communicate(said, timeout=60)
        return process.returncode, out, err

    @property
    def runs(self) -> list[Path]:
        folder = self.base / "runs"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def rewriters(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "concordia.instrument.rewriter" in words and str(self.base) in " ".join(words):
                found.append(process)
        return found


def _hears_interrupts() -> None:
    """Whoever runs the tests in the background ignores SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of compiled code, so that the shim is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cnc-", dir="/tmp") as folder:  # a socket's path is short
        yield Path(folder) / "base"


@pytest.fixture
def command(shim_parts: tuple[Path, Path], built: Path, base: Path, tmp_path: Path) -> Iterator[Command]:
    made = Command(tmp_path, base, built, *shim_parts)
    yield made
    until(lambda: not made.rewriters(), 20)


def test_program_has_the_driver_and_is_looked_at_when_it_runs(command: Command) -> None:
    code, out, err = command.do("run", "--verbose", "--", str(command.user), "begin", "context", f"load:{command.ptx}", "launch:kernel", "cell")
    assert (code, out) == (0, "cell 1\n"), err
    assert err.startswith("concordia: 1 images in 1 processes: 0 hooked, 1 left alone (look only)")
    assert len(err.splitlines()) == 1
    run = find_run(base=command.base)
    (image,) = read_run(run).images
    assert (image.kind, image.library, image.why) == ("ptx", str(command.user), "look only")
    assert image.kernels is not None
    assert [kernel.name for kernel in image.kernels] == ["add"]


def test_image_is_hooked_and_second_start_takes_the_cache_when_hooks_are_asked_for(command: Command) -> None:
    handed = command.folder / "handed"
    handed.mkdir()
    words = ("run", "--hooks", "entry,marks", "--", str(command.user), "begin", "context", f"load:{command.ptx}", f"dump:{handed}")
    times = []
    for _ in range(2):
        code, _, err = command.do(*words)
        assert code == 0, err
        (image,) = read_run(find_run(base=command.base)).images
        assert (image.outcome, image.why) == ("rewritten", "")
        times.append(image.own_us)
        assert 0 < image.own_us <= image.us
        text = (handed / "0").read_text()
        assert text != command.text
        assert "st.global.u64" in text
    assert times[1] < times[0]


@pytest.mark.parametrize("size", [120, config.RUN_PATH_BYTES_MAX])
def test_image_is_hooked_when_the_path_of_the_run_is_long(command: Command, size: int) -> None:
    room = size - len(f"/runs/20261130-000000-{2**22}")  # a longer pid than any
    base = folder_of_length(command.base.parent, room)
    code, _, err = command.do(*_load(command), CONCORDIA_RUN_DIR=str(base))
    assert code == 0, err
    (image,) = read_run(find_run(base=base)).images
    assert (image.outcome, image.why) == ("rewritten", "")


def test_program_starts_others_under_us_when_the_run_folder_was_named_from_here(command: Command) -> None:
    folder = Path.cwd() / os.path.relpath(command.base)
    code, out, err = command.do("run", "--run-dir", os.path.relpath(command.base), "--", "sh", "-c", 'cd / && cat "$CONCORDIA_RUN/settings" && echo "$LD_LIBRARY_PATH"')
    assert code == 0, err
    assert out.startswith("mode=look\n")
    assert out.splitlines()[-1].startswith(f"{folder}/runs/")


def test_run_is_refused_and_leaves_nothing_when_its_folder_is_too_long_behind_a_link(base: Path) -> None:
    target = folder_of_length(base.parent, config.RUN_PATH_BYTES_MAX - 20)
    target.mkdir(parents=True, mode=0o700)
    base.symlink_to(target)
    with pytest.raises(UsageError, match=r"\.\.\. has \d+ bytes, and a program uses \d+; name a shorter --run-dir$"):
        make_run(base / "inside")
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("code", [0, 1, 3, 42, 255])
def test_exit_code_is_the_programs_when_it_ends(command: Command, code: int) -> None:
    assert command.do("run", "--", "sh", "-c", f"exit {code}")[0] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGINT])
def test_signal_is_the_programs_when_one_ends_it(command: Command, number: int) -> None:
    assert command.do("run", "--", "sh", "-c", f"kill -{int(number)} $$")[0] == -number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signal_reaches_the_program_once_when_it_is_sent_to_us(command: Command, number: signal.Signals) -> None:
    script = (
        "import signal, sys, time\nseen = []\n"
        f"signal.signal({int(number)}, lambda *_: seen.append(1))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\nprint(len(seen), flush=True)\n"
    )
    process = command.start("run", "--", sys.executable, "-c", script)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    (program,) = [child for child in psutil.Process(process.pid).children() if script in child.cmdline()]
    until(lambda: not int(_status(program.pid, "SigPnd"), 16) and not int(_status(process.pid, "ShdPnd"), 16))
    out, err = process.communicate("go\n", timeout=60)
    assert (process.returncode, out) == (0, "1\n"), err


def _status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def test_signal_reaches_the_program_once_when_the_terminal_sends_it(command: Command) -> None:
    script = (
        "import signal, sys\nseen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        "print('ready', flush=True)\nsys.stdin.readline()\nprint('seen', len(seen), flush=True)\n"
    )
    leader, follower = os.openpty()
    words = [sys.executable, "-m", "concordia.cli", "run", "--", sys.executable, "-c", script]

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, 0x540E, 0)  # TIOCSCTTY

    process = subprocess.Popen(words, env=command.environment(), stdin=follower, stdout=follower, stderr=follower, preexec_fn=take_terminal)
    os.close(follower)
    text = _read_until(leader, "ready")
    os.write(leader, b"\x03")
    os.write(leader, b"go\n")
    text = _read_until(leader, "seen")
    assert "seen 1" in text
    assert process.wait(60) == 0
    os.close(leader)


def _read_until(descriptor: int, word: str) -> str:
    text, deadline = "", time.monotonic() + 30
    while f"{word}" not in text or not text.endswith("\n"):
        assert time.monotonic() < deadline, text
        text += os.read(descriptor, 4096).decode()
    return text


def test_program_has_its_input_mask_and_environment_when_it_runs(command: Command) -> None:
    script = "import os, signal, sys; print(sys.stdin.read(), sorted(signal.pthread_sigmask(0, [])), os.environ['MINE'], os.environ['LD_LIBRARY_PATH'], 'TRITON_LIBCUDA_PATH' in os.environ)"
    code, out, err = command.do("run", "--", sys.executable, "-c", script, said="hello", MINE="yes")
    assert code == 0, err
    assert out == f"hello [] yes {command.runs[-1]}:{command.driver.parent} False\n"


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_program_ignores_the_signals_that_it_would_ignore_without_us(command: Command, disabled: str) -> None:
    words = ["sed", "-n", "s/^SigIgn:.*\\(.\\{8\\}\\)$/\\1/p", "/proc/self/status"]  # what is above is the C library's own
    plain = subprocess.run(words, capture_output=True, text=True, check=True, preexec_fn=_hears_interrupts)
    code, out, err = command.do("run", "--", *words, CONCORDIA_DISABLE=disabled)
    assert (code, err) == (0, "")
    assert int(out, 16) & 0x7FFFFFFF == int(plain.stdout, 16) & 0x7FFFFFFF


def test_nothing_stands_before_the_driver_when_switched_off(command: Command) -> None:
    code, out, _ = command.do("run", "--", str(command.user), "begin", f"mapped:{command.base}", CONCORDIA_DISABLE="1")
    assert (code, out) == (0, f"mapped {command.base} 0\n")
    assert command.runs == []


def test_children_are_seen_when_a_program_forks_and_starts_others(command: Command) -> None:
    user = command.user
    words = [str(user), "begin", "fork", "context", f"load:{command.ptx}"]
    code, _, err = command.do("run", "--", "sh", "-c", f"{' '.join(words)}; {user} begin context library:{command.ptx} & wait")
    assert code == 0, err
    found = read_run(find_run(base=command.base))
    assert len({image.pid for image in found.images}) == 2


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (("run", "--", "/nonexistent/program"), {}, "there is no program /nonexistent/program"),
        (("run", "--hooks", "entry,other", "--", "true"), {}, "--hooks entry,other: give some of entry, exit, marks"),
        (("run", "--hooks", "entry", "--", "true"), {"CUDA_FORCE_PTX_JIT": "1"}, "CUDA_FORCE_PTX_JIT=1 runs code that has no hooks"),
        (("run", "--policy", "entry.toml", "--", "true"), {"CUDA_FORCE_PTX_JIT": "1"}, "CUDA_FORCE_PTX_JIT=1 runs code that has no hooks"),
        (("run",), {}, "name a program behind --"),
        (("run", "--policy", "/nonexistent.toml", "--", "true"), {}, "/nonexistent.toml: No such file"),
        (("run", "--", "true"), {"LD_LIBRARY_PATH": ""}, "no NVIDIA driver"),
        (("run", "--", "true"), {"CONCORDIA_RUN_DIR": "/proc/none"}, "no folder /proc/none"),
        (("run", "--", "true"), {"CC": "/nonexistent", "PATH": "/nonexistent"}, "there is no program true"),
        (("run", "--verbose"), {}, "name a program behind --"),
        (("run", "--", "true"), {"CONCORDIA_RUN_DIR": LONG}, f"bytes, and a program uses {config.RUN_PATH_BYTES_MAX}; name a shorter --run-dir"),
        (("run", "--", "true"), {"CONCORDIA_CACHE": LONG}, f"bytes, and a program uses {config.RUN_PATH_BYTES_MAX}; set CONCORDIA_CACHE to a shorter"),
        (("run", "--", "true"), {"CONCORDIA_RUN_DIR": "/nonexistent/a:b"}, "would be cut at its : or ; by the loader; name another --run-dir"),
        (("modules",), {}, "start one with `concordia run -- PROGRAM`"),
        (("modules", "nothing"), {}, "nothing is no run"),
    ],
)
def test_mistake_is_one_line_and_nothing_is_left_when_it_is_made(command: Command, words: tuple[str, ...], environment: dict[str, str], says: str) -> None:
    if says == "no NVIDIA driver" and Path("/lib/x86_64-linux-gnu/libcuda.so.1").exists():
        pytest.skip("a driver lies in the loader's default folder")
    (command.folder / "entry.toml").write_text("[images]\nentry_hooks = true\n")
    code, out, err = command.do(*(str(command.folder / word) if word == "entry.toml" else word for word in words), **environment)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert command.runs == []


def test_help_teaches_when_no_program_is_named(command: Command) -> None:
    code, out, _ = command.do("run")
    assert code in (0, 2)
    _, out, _ = command.do("run", "--help")
    for word in ("--policy", "CONCORDIA_DISABLE=1", "concordia modules", "look at its kernels"):
        assert word in out


def test_rewriter_is_started_once_more_and_the_program_goes_on_when_it_dies(command: Command) -> None:
    script = "import sys\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    process = command.start("run", "--", sys.executable, "-c", script)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    dead: set[int] = set()
    for left in (1, 0):
        until(lambda: bool({p.pid for p in command.rewriters()} - dead), 20)
        for rewriter in command.rewriters():
            if rewriter.pid not in dead:
                dead.add(rewriter.pid)
                rewriter.kill()
        until(lambda: not {p.pid for p in command.rewriters()} & dead, 20)
        until(lambda left=left: bool(command.rewriters()) == bool(left), 20)
    _, err = process.communicate("go\n", timeout=60)
    assert process.returncode == 0, err
    assert find_run(base=command.base).about()["rewriter_deaths"] == 2


def _takes_connections(run: Path) -> bool:
    """Whether a rewriter answers; its launcher alone lets wait."""
    return ask(run / "rewriter.sock", b"no image", timeout_s=20) is Status.READY


def test_rewriter_ends_when_the_launcher_is_killed(command: Command) -> None:
    process = command.start("run", "--", "sh", "-c", "echo ready; exec sleep 1000")
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    until(lambda: len(command.rewriters()) > 0, 20)
    rewriters = {rewriter.pid for rewriter in command.rewriters()}
    (program,) = [child for child in psutil.Process(process.pid).children() if child.pid not in rewriters]
    until(lambda: _takes_connections(command.runs[-1]), 20)
    process.kill()
    process.wait(60)
    until(lambda: not command.rewriters(), 20)
    assert not (command.runs[-1] / "rewriter.sock").exists()
    program.kill()  # nobody but us ends it
    process.communicate(timeout=60)


def test_table_names_library_kind_and_reason_when_modules_are_listed(command: Command) -> None:
    command.do("run", "--", str(command.user), "begin", "context", f"load:{command.ptx}", f"load_file:{command.ptx}")
    code, out, err = command.do("modules", "--kernels")
    assert code == 0, err
    head, user, *_ = [line for line in out.splitlines() if line.startswith(("LIBRARY", "user"))]
    assert head.split() == ["LIBRARY", "IMAGE", "COUNT", "KERNELS", "REGISTERS", "HOOKED", "OUTCOME"]
    assert user.split(maxsplit=6) == ["user", "ptx", "1", "1", "-", "0", "original: look only"]
    assert any(line.split()[:2] == ["add", "ptx"] for line in out.splitlines())
    found = json.loads(command.do("modules", "--json")[1])
    assert [image["why"] for image in found["images"]] == ["look only"] * 2
    assert found["images"][0]["kernels"][0]["name"] == "add"
    assert found["launches"] == 0


def test_lines_that_are_none_are_counted_when_a_log_is_damaged(base: Path) -> None:
    run = make_run(base)
    lines = [b'{"event":"image"}', b"\xff\xfe garbage", b'{"event":"image","key', b"[]", b'{"event":"process"}']
    (run.modules / "77.log").write_bytes(b"\n".join(lines))
    (run.modules / "other").write_bytes(b"x")
    found = read_run(run)
    assert (found.images, found.lines_lost) == ((), 4)
    assert "0 images in 0 processes" in found.text(with_kernels=True)
    run.close()


def test_old_runs_go_and_living_ones_stay_when_a_new_one_is_made(base: Path) -> None:
    living = make_run(base)
    made = []
    for index in range(config.RUNS_KEPT + 5):
        path = base / "runs" / f"run{index:03}"
        (path / "modules").mkdir(parents=True)
        os.utime(path, (time.time() - 1000 + index,) * 2)
        made.append(path)
    ancient = made[-1]
    os.utime(ancient, (1, 1))
    os.utime(living.path, (1, 1))
    for gone in (config.RUNS_REMOVED_MAX, 5, 5):
        remove_old(base / "runs")
        assert living.path.exists()
        assert not ancient.exists()
        left = [path for path in made if path.exists()]
        assert left == made[gone - 1 : -1]
    assert len(left) == config.RUNS_KEPT
    living.close()
    remove_old(base / "runs")
    assert not living.path.exists()


def test_old_runs_go_a_few_at_a_time_when_programs_are_started(command: Command) -> None:
    made = []
    for index in range(config.RUNS_KEPT + 5):
        path = command.base / "runs" / f"run{index:03}"
        (path / "modules").mkdir(parents=True)
        os.utime(path, (time.time() - 1000 + index,) * 2)
        made.append(path)
    for folder in (command.base, command.base / "runs"):
        folder.chmod(0o700)
    for gone in (config.RUNS_REMOVED_MAX, 7, 8):
        assert command.do("run", "--", "true") == (0, "", "")
        assert [path for path in made if path.exists()] == made[gone:]
    assert len(command.runs) == config.RUNS_KEPT


def test_run_is_refused_and_leaves_nothing_when_its_folder_can_have_no_lock(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match=r"^no lock in \S+: No locks available; name another --run-dir$"):
        make_run(base)
    assert list((base / "runs").iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_settings_are_refused_when_a_path_has_a_line_break(base: Path) -> None:
    run = make_run(base)
    with pytest.raises(UsageError, match="line break"):
        run.settle({"cache": "a\nmode=rewrite"})
    run.settle({"cache": "a=b", "n": 3})
    assert ProgramRun(run.path).settings() == {"cache": "a=b", "n": "3"}
    run.close()


def test_interrupt_before_the_program_starts_ends_us_when_it_comes_then() -> None:
    script = (
        "import os, signal\nfrom concordia.integrations.program.supervisor import Supervisor, end_as\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "os.kill(os.getpid(), signal.SIGINT)\nend_as(Supervisor().run(['echo', 'started'], os.environ))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, ""), done.stderr


def test_program_runs_to_its_end_when_no_rewriter_can_be_started(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom concordia.integrations.program.supervisor import Supervisor\n"
        "found = Supervisor(['/nonexistent/python'], os.environ, Path(sys.argv[1]))\n"
        "status = found.run(['sh', '-c', 'echo started; exit 3'], os.environ)\nprint(status >> 8, found.rewriter_deaths, found.rewriter_error)\n"
    )
    socket = tmp_path / "rewriter.sock"
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    words = [sys.executable, "-c", script, str(socket)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "started\n3 0 /nonexistent/python cannot be started: No such file or directory\n"
    assert not socket.exists()


def test_program_is_watched_to_its_end_when_what_runs_beside_it_fails() -> None:
    script = (
        "import os, signal\nfrom concordia.integrations.program.supervisor import Supervisor\n"
        "def fail():\n    raise RuntimeError('of ours')\n"
        "words = ['sh', '-c', 'trap \"echo told; exit 3\" TERM; echo ready; for i in $(seq 3000); do sleep 0.01; done']\n"
        "try:\n    Supervisor().run(words, os.environ, when_started=fail)\n"
        "except RuntimeError as error:\n    print(error, flush=True)\n"
        "try:\n    os.waitpid(-1, os.WNOHANG)\n"
        "except ChildProcessError:\n    print('no child', signal.pthread_sigmask(0, []))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "told\nof ours\nno child set()\n")


def _do_after(command: Command, begin: str, *words: str) -> tuple[int, str, str]:
    """The command line in an interpreter that has done this before."""
    code = f"import sys\nfrom concordia import cli\nfrom concordia.integrations.program import launch\n{begin}\ncli.main(sys.argv[1:])\n"
    done = subprocess.run([sys.executable, "-c", code, *words], env=command.environment(), capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_exit_code_is_the_programs_when_old_runs_cannot_be_removed(command: Command) -> None:
    begin = "def fail(_):\n    raise OSError(37, 'no locks')\nlaunch.remove_old = fail"
    assert _do_after(command, begin, "run", "--", "sh", "-c", "exit 7") == (7, "", "")


def test_failure_is_told_when_no_rewriter_can_be_started(command: Command) -> None:
    code, _, err = _do_after(command, "sys.executable = '/nonexistent/python'", "run", "--", "sh", "-c", "exit 7")
    why = "/nonexistent/python cannot be started: No such file or directory"
    assert (code, err) == (7, f"concordia: no rewriter, so new images stayed as they were: {why}\n")
    about = find_run(base=command.base).about()
    assert (about["rewriter_error"], about["rewriter_deaths"]) == (why, 0)


@pytest.mark.parametrize("key", ["", "short", "../../../" + 23 * "x", "G" * 32, 32 * "0"])
def test_exit_code_is_the_programs_when_a_key_in_its_log_is_damaged(command: Command, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"event": "image", "key": key, "library": "x", "kind": "ptx", "outcome": "original", "why": "look only"})
    begin = "launch.config.RUN_LOOK_S = 0.1"  # nobody makes the file of the key that is one
    code, out, err = _do_after(command, begin, "run", "--verbose", "--", "sh", "-c", 'echo "$1" >"$CONCORDIA_RUN/modules/77.log"; exit 5', "sh", line)
    assert (code, out) == (5, ""), err
    assert err.startswith("concordia: 1 images in 1 processes: 0 hooked, 1 left alone (look only)")
    assert len(err.splitlines()) == 1


def test_exit_code_is_the_programs_when_it_removes_the_folder_of_its_run(command: Command) -> None:
    assert command.do("run", "--", "sh", "-c", 'rm -r "$CONCORDIA_RUN"; exit 6') == (6, "", "")
    assert command.runs == []


def _slow_rewriters(command: Command, begin: str) -> str:
    """The path for an interpreter that does this before it is a rewriter; `count` is how many there were before."""
    folder = command.folder / "slow"
    folder.mkdir()
    lines = ["import os, sys, time", "if 'concordia.instrument.rewriter' in sys.orig_argv:", f"    folder = {str(folder)!r}"]
    lines += ["    count = len([n for n in os.listdir(folder) if n.startswith('seen')])", "    open(f'{folder}/seen{count}', 'w').close()"]
    (folder / "sitecustomize.py").write_text("\n".join([*lines, f"    {begin}\n"]))
    return f"{SOURCE}:{folder}"


def _load(command: Command) -> tuple[str, ...]:
    return ("run", "--hooks", "entry", "--", str(command.user), "begin", "context", f"load:{command.ptx}", "launch:kernel")


def test_program_starts_at_once_and_its_image_is_hooked_when_the_rewriter_takes_its_time(command: Command) -> None:
    go = command.folder / "go"
    path = _slow_rewriters(command, f"exec(\"while not os.path.exists('{go}'): time.sleep(0.001)\")")
    process = command.start("run", "--hooks", "entry", "--", "sh", "-c", f"echo started; exec {' '.join(_load(command)[4:])}", PYTHONPATH=path)
    assert process.stdout
    assert process.stdout.readline() == "started\n"
    go.touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (image,) = read_run(find_run(base=command.base)).images
    assert (image.outcome, image.why) == ("rewritten", "")
    assert not (command.runs[-1] / "rewriter.sock").exists()


def test_image_is_hooked_when_the_rewriter_dies_before_it_serves_and_another_comes(command: Command) -> None:
    path = _slow_rewriters(command, "if count == 0: os._exit(1)")
    code, _, err = command.do(*_load(command), PYTHONPATH=path)
    assert code == 0, err
    (image,) = read_run(find_run(base=command.base)).images
    assert (image.outcome, image.why) == ("rewritten", "")
    assert find_run(base=command.base).about()["rewriter_deaths"] == 1


def test_program_does_not_wait_for_an_image_when_no_rewriter_comes_any_more(command: Command) -> None:
    path = _slow_rewriters(command, "os._exit(1)")
    begun = time.monotonic()
    code, _, err = command.do(*_load(command), PYTHONPATH=path)
    assert code == 0, err
    assert time.monotonic() - begun < config.RUN_IMAGE_WAIT_S
    (image,) = read_run(find_run(base=command.base)).images
    assert (image.outcome, image.why) == ("original", "no rewriter")
    assert find_run(base=command.base).about()["rewriter_deaths"] == 2
    assert not (command.runs[-1] / "rewriter.sock").exists()


@pytest.mark.parametrize(("numbers", "asked"), [(("0x2335", "0x2335"), 2), (("0x2335", "0x20b0"), 4), ((), 4)])
def test_gpu_is_asked_once_for_its_architecture_when_all_are_of_one_model(
    numbers: tuple[str, ...], asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONCORDIA_CACHE", str(tmp_path / "cache"))
    gpus, devices = tmp_path / "gpus", tmp_path / "devices"
    for index, number in enumerate(numbers):
        (gpus / f"0000:0{index}:00.0").mkdir(parents=True)
        (devices / f"0000:0{index}:00.0").mkdir(parents=True)
        (devices / f"0000:0{index}:00.0" / "vendor").write_text("0x10de\n")
        (devices / f"0000:0{index}:00.0" / "device").write_text(f"{number}\n")
    answers: list[int | None] = [None, 90, 90, 90]
    monkeypatch.setattr(architecture_room, "_asked", lambda: answers.pop(0))
    found = [architecture_room.architecture(gpus=gpus, devices=devices) for _ in range(4)]
    assert found == [None, 90, 90, 90]
    assert 4 - len(answers) == asked, "one that has no answer is asked again"


@pytest.mark.parametrize("text", ["", "90x", "9", "-90", "9000", "٩٠"])
def test_gpu_is_asked_again_when_what_was_kept_is_no_architecture(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORDIA_CACHE", str(tmp_path))
    for name in ("gpus/a", "devices/a", "concordia/gpus"):
        (tmp_path / name).mkdir(mode=0o700, parents=True)
    for name in ("vendor", "device"):
        (tmp_path / "devices" / "a" / name).write_text("0x1\n")
    (tmp_path / "concordia" / "gpus" / "0x1-0x1").write_text(text)
    monkeypatch.setattr(architecture_room, "_asked", lambda: 80)
    for _ in range(2):
        assert architecture_room.architecture(gpus=tmp_path / "gpus", devices=tmp_path / "devices") == 80
    assert (tmp_path / "concordia" / "gpus" / "0x1-0x1").read_text() == "80"

"""instrument/rewriter.py, rewriter_socket.py: the process that rewrites for the programs of one run.

Invariants: it ends with its launcher, its run folder or SIGTERM, with its children, and leaves no file behind; whoever waits when one ends is
served by the next, or told; what is wrong with its arguments is one line.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import resource
import signal
import socket
import subprocess
import sys

import pytest

from concordia import config
from concordia.errors import EnvironmentRefused
from concordia.instrument.request import Status, ask
from concordia.instrument.rewriter_socket import listen
from rewriter_process import ENVIRONMENT, Served
from waiting import until

pytest_plugins = ["rewriter_fixtures"]


def test_rewriter_takes_the_descriptors_that_it_may_when_its_launcher_has_few(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = subprocess.Popen(_command(run, tmp_path / "images"), env=ENVIRONMENT, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)))
    try:
        until((run / "rewriter.sock").exists, 30)
        most = config.REWRITE_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, config.REWRITE_DESCRIPTORS)
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] == most > 256
    finally:
        process.kill()
        process.wait(timeout=30)


def _command(run: pathlib.Path, root: pathlib.Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "concordia.instrument.rewriter", "--run", str(run), "--cache", str(root), *more]


def test_folder_is_refused_in_one_line_when_it_can_have_no_socket(tmp_path: pathlib.Path) -> None:
    for folder, why in ((tmp_path / "missing", "No such file"), (pathlib.Path("/proc"), "Not a directory|No such file|not permitted|denied")):
        with pytest.raises(EnvironmentRefused, match=f"no socket in {folder}: ({why}).*; name another --run-dir$"):
            listen(folder / "rewriter.sock")


def test_rewriter_serves_and_ends_well_when_its_output_is_closed(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *_command(run, tmp_path / "images")], env=ENVIRONMENT)
    until((run / "rewriter.sock").exists, 30)
    assert ask(run / "rewriter.sock", b"no image", timeout_s=30) is Status.READY
    process.terminate()
    assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("end", ["launcher", "term", "folder"])
def test_rewriter_leaves_nothing_when_it_ends(run: pathlib.Path, tmp_path: pathlib.Path, end: str) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert launcher.stdin
    process = subprocess.Popen(_command(run, tmp_path / "images", "--launcher", str(launcher.pid)), env=ENVIRONMENT)
    try:
        until((run / "rewriter.sock").exists, 30)
        assert (run / "rewriter.sock").stat().st_mode & 0o777 == 0o600
        assert ask(run / "rewriter.sock", b"no image", timeout_s=30) is Status.READY
        process.send_signal(signal.SIGINT)  # of the terminal: not for us
        process.send_signal(signal.SIGHUP)
        assert ask(run / "rewriter.sock", b"no image either", timeout_s=30) is Status.READY
        if end == "launcher":
            launcher.stdin.close()
            launcher.wait(timeout=30)
        elif end == "term":
            process.terminate()
        else:
            (run / "rewriter.sock").unlink()
        assert process.wait(timeout=30) == 0
        assert list(run.iterdir()) == []
        assert {path.suffix for path in (tmp_path / "images").rglob("*") if path.is_file()} == {".image"}
    finally:
        process.kill()
        process.wait(timeout=30)
        launcher.stdin.close()
        launcher.wait(timeout=30)


def _inherit_odd_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def test_images_are_rewritten_and_sigterm_ends_it_when_its_launcher_has_blocked_signals(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen(_command(run, tmp_path / "images"), env=ENVIRONMENT, preexec_fn=_inherit_odd_signals)
    try:
        until((run / "rewriter.sock").exists, 30)
        assert ask(run / "rewriter.sock", b"no image", timeout_s=30) is Status.READY
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait(timeout=30)


def test_child_ends_and_another_can_be_started_when_the_rewriter_is_killed(tmp_path: pathlib.Path) -> None:
    one = Served(tmp_path, answer_s=0.1, rewrite_s=60)
    assert one.ask(b"loop") is Status.LATER
    children = one.children()
    assert len(children) == 1
    one.process.kill()
    one.process.wait(timeout=30)
    until(lambda: not any(pathlib.Path(f"/proc/{pid}/stat").exists() and pathlib.Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z" for pid in children), 20)
    with pytest.raises(ConnectionRefusedError):
        one.ask(b"upper x")
    assert one.process.stdin
    one.process.stdin.close()
    process = subprocess.Popen(_command(one.run, one.root), env=ENVIRONMENT)
    try:

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return one.ask(b"no image") is Status.READY
            return False

        until(answers, 30)
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0


def _rewriter_at(listener: socket.socket, run: pathlib.Path, root: pathlib.Path, launcher: int) -> subprocess.Popen[bytes]:
    number = listener.fileno()
    return subprocess.Popen(_command(run, root, "--listener", str(number), "--launcher", str(launcher)), env=ENVIRONMENT, pass_fds=(number,))


def test_questions_wait_for_the_next_rewriter_when_a_launcher_holds_the_socket(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = run / "rewriter.sock"
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert launcher.stdin
    with listen(path) as listener, concurrent.futures.ThreadPoolExecutor() as pool:
        for end in (signal.SIGTERM, signal.SIGKILL):
            early = [pool.submit(ask, path, b"no image %d" % number, timeout_s=30) for number in range(3)]
            process = _rewriter_at(listener, run, tmp_path / "images", launcher.pid)
            assert [answer.result(30) for answer in early] == [Status.READY] * 3
            process.send_signal(end)
            process.wait(timeout=30)
            assert path.exists(), "the next listens under it"
        process = _rewriter_at(listener, run, tmp_path / "images", launcher.pid)
        assert ask(path, b"no image", timeout_s=30) is Status.READY
        launcher.stdin.close()
        launcher.wait(timeout=30)
        assert process.wait(timeout=30) == 0
        assert list(run.iterdir()) == []


def test_all_who_wait_are_told_when_the_socket_is_closed_before_a_rewriter_came(run: pathlib.Path) -> None:
    with listen(run / "rewriter.sock") as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(30)
        peer.connect(str(run / "rewriter.sock"))
        listener.close()
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(64) == b""
    assert (run / "rewriter.sock").stat().st_mode & 0o777 == 0o600


def test_rewriter_ends_at_once_when_its_launcher_has_gone_before(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=30)
    done = subprocess.run(_command(run, tmp_path / "images", "--launcher", str(gone.pid)), env=ENVIRONMENT, timeout=30, check=False)
    assert done.returncode == 0
    assert list(run.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--run"), (["--run", "/nowhere"], "/nowhere"), (["--run", "/tmp"], "only this user"), (["--options", "{"], "JSON object"),
        (["--options", json.dumps({"arch": 1})], "architecture 1"), (["--workers", "0"], "--workers"), (["--unknown"], "--unknown"),
        (["--cache", "/proc/x"], "no folder /proc/x: "), (["--listener", "0"], "--listener 0"), (["--listener", "99"], "--listener 99"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line_and_exit_code_2_when_given(run: pathlib.Path, tmp_path: pathlib.Path, arguments: list[str], said: str) -> None:
    base = [] if "--run" in arguments or not arguments else ["--run", str(run)]
    if "--cache" not in arguments:
        base += ["--cache", str(tmp_path / "images")]
    done = subprocess.run(
        [sys.executable, "-m", "concordia.instrument.rewriter", *base, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(run.iterdir()) == []


def test_answer_comes_before_the_bound_of_a_program_when_limits_are_read() -> None:
    assert config.REWRITE_ANSWER_S < config.REWRITE_S

"""native/gate*.c, integrations/program/gate.py: a pause brings the GPU to a kernel boundary and keeps it there.

Invariants: after a pause nothing that was launched still runs, and no launch of any kind starts until the resume, but the pauser's own and
those that are captured; every wait has its bound, at which everything goes on and it is said who waited for what; handles of streams and
contexts that have gone are never used; processes of a run can be paused from outside.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from concordia.errors import UsageError, WaitTimeout
from concordia.integrations.program.gate import RunGate
from concordia.integrations.program.gate_page import PAGE, make_page
from shim_ground import ShimGround, make_ground

pytest_plugins = ["shim_fixtures"]

CHILD = Path(__file__).with_name("gate_child.py")
SOURCE = CHILD.parents[1] / "src"


@pytest.fixture
def ground(shim_ground: ShimGround) -> ShimGround:
    make_page(shim_ground.run)
    return shim_ground


def start(ground: ShimGround, scenario: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(CHILD), scenario],
        env=ground.environment(PYTHONPATH=f"{SOURCE}:{CHILD.parent}", **environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(ground: ShimGround, scenario: str, **environment: str) -> str:
    """Run a scenario; what it said on stderr."""
    out, err = (process := start(ground, scenario, **environment)).communicate(timeout=60)
    assert process.returncode == 0, f"{process.returncode}\n{out}\n{err}"
    return err


def test_launches_of_others_are_held_when_one_thread_pauses(ground: ShimGround) -> None:
    assert run(ground, "held") == ""


def test_launches_of_long_ago_are_held_when_one_thread_pauses(ground: ShimGround) -> None:
    assert run(ground, "legacy") == ""


def test_pause_waits_when_work_is_on_any_stream(ground: ShimGround) -> None:
    assert run(ground, "waits") == ""


def test_nothing_stays_paused_when_the_device_is_not_at_rest_in_time(ground: ShimGround) -> None:
    assert run(ground, "bound") == ""


def test_all_go_on_loudly_when_a_launch_is_held_for_too_long(ground: ShimGround) -> None:
    ground.settle(gate_hold_ms=300)
    said = run(ground, "hold_bound")
    assert "a launch was held for 3" in said
    assert "the program goes on, unpaused" in said
    (log,) = (ground.run / "modules").iterdir()
    assert "a pause was ended" in log.read_text()


def test_capture_goes_on_undisturbed_when_it_is_paused(ground: ShimGround) -> None:
    assert run(ground, "capture") == ""


def test_no_event_of_a_pause_is_captured_when_captures_begin_beside_it(ground: ShimGround) -> None:
    assert run(ground, "captures", FAKE_SLOW_EVENTS="1") == ""


def test_streams_and_contexts_are_forgotten_when_they_end(ground: ShimGround) -> None:
    assert run(ground, "gone") == ""


@pytest.mark.parametrize("scenario", ["opened", "released", "many"])
def test_pause_is_late_when_it_cannot_know_that_all_is_at_rest(ground: ShimGround, scenario: str) -> None:
    assert run(ground, scenario) == ""


def test_pause_is_late_when_a_stream_cannot_be_waited_for(ground: ShimGround) -> None:
    assert run(ground, "unasked", FAKE_NO_EVENTS="1") == ""


def test_nothing_runs_and_nothing_is_lost_when_threads_launch_through_a_hundred_pauses(ground: ShimGround) -> None:
    assert run(ground, "storm") == ""


def test_second_pause_is_refused_when_one_is_on(ground: ShimGround) -> None:
    assert run(ground, "misuse") == ""


def test_pause_is_refused_when_the_shim_is_switched_off_or_not_there(ground: ShimGround) -> None:
    process = start(ground, "misuse", CONCORDIA_DISABLE="1")
    _, err = process.communicate(timeout=60)
    assert "the shim is switched off in it" in err
    code = "from concordia.integrations.program import gate\ngate.pause()"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, timeout=60, check=False)
    assert "this process has no gate" in done.stderr


class Children:
    """Programs of a run that launch until they are ended."""

    def __init__(self, ground: ShimGround) -> None:
        self.ground = ground
        self.all: list[subprocess.Popen[str]] = []

    def start(self, scenario: str) -> subprocess.Popen[str]:
        process = start(self.ground, scenario)
        self.all.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    @staticmethod
    def count(process: subprocess.Popen[str]) -> int:
        assert process.stdin
        assert process.stdout
        process.stdin.write("count\n")
        process.stdin.flush()
        return int(process.stdout.readline())


@pytest.fixture
def children(ground: ShimGround) -> Iterator[Children]:
    made = Children(ground)
    yield made
    for process in made.all:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err


def test_all_processes_of_a_run_are_at_rest_when_they_are_paused_from_outside(ground: ShimGround, children: Children) -> None:
    programs = [children.start("outside") for _ in range(3)]
    gate = RunGate(ground.run)
    for _ in range(10):
        found = gate.pause(10)
        assert {paused.pid for paused in found} == {program.pid for program in programs} == set(gate.processes())
        assert all(paused.latency_ns > 0 for paused in found)
        counts = [children.count(program) for program in programs]
        assert [children.count(program) for program in programs] == counts
        gate.resume()
        for program, count in zip(programs, counts, strict=True):
            while children.count(program) == count:
                pass
    gate.close()


def test_all_are_resumed_and_the_one_is_named_when_it_does_not_come_to_rest(ground: ShimGround, children: Children) -> None:
    good, bad = children.start("outside"), children.start("stuck")
    gate = RunGate(ground.run)
    with pytest.raises(WaitTimeout, match=f"process {bad.pid} is not at rest after 0.3 s: 1 streams, one is the default stream"):
        gate.pause(0.3)
    count = children.count(good)
    while children.count(good) == count:
        pass
    gate.close()


def test_process_that_has_gone_is_not_asked_when_a_run_is_paused(ground: ShimGround, children: Children) -> None:
    first = children.start("outside")
    first.kill()
    first.wait(60)
    children.all.clear()
    gate = RunGate(ground.run)
    assert gate.processes() == ()
    second = children.start("outside")
    assert [paused.pid for paused in gate.pause(10)] == [second.pid]
    gate.resume()
    gate.close()


def test_page_is_left_alone_when_it_is_not_as_expected(ground: ShimGround) -> None:
    for damage in (b"", b"CNGATE00" + bytes(33016), b"x" * 10):
        (ground.run / PAGE).write_bytes(damage)
        with pytest.raises(UsageError, match="gate"):
            RunGate(ground.run)
        assert run(ground, "misuse") == ""


def test_no_race_is_found_when_threads_launch_through_pauses(ground: ShimGround, tmp_path: Path) -> None:
    library = subprocess.run(["cc", "-print-file-name=libtsan.so"], capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    if not Path(library).is_file():
        pytest.skip("the compiler has no libtsan.so")
    checked = make_ground(tmp_path / "checked", ground.driver, ground.user, "-fsanitize=thread", "-Wl,-z,undefs")
    make_page(checked.run)
    # A new thread may be the one that gives an ended one's own variables back: the kernel told it of that end, which the sanitizer does not see.
    suppressions = tmp_path / "suppressions"
    suppressions.write_text("race:_dl_deallocate_tls\n")
    said = run(checked, "storm", LD_PRELOAD=library, TSAN_OPTIONS=f"halt_on_error=1 report_bugs=1 exitcode=66 suppressions={suppressions}")
    assert "data race" not in said

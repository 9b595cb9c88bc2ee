"""Page regions on a GPU: saved until SIGKILL, restored by another process; and the online-LoRA example.

Invariants: every acknowledged step is there; what comes back is one whole step, its host state with it, and a scan on the GPU finds nothing
that differs; training goes on with the losses of an unfailed run, bit for bit.
"""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import sys
import time

import pytest
from child import end, kill, run, start

DEVICE = os.environ.get("CONCORDIA_TEST_DEVICE", "cuda:0")  # "host" to try the scenarios without a GPU
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("lanes", [1, 4])
def test_newest_step_is_restored_when_the_writer_is_killed(lanes: int, journal_path: pathlib.Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    last, acknowledged = rng.randrange(2, 30), 0
    child = start("scenarios_pages:saver", device=DEVICE, path=str(journal_path), lanes=lanes)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("ACK "):
            acknowledged = int(line[4:])
            if acknowledged >= last:
                time.sleep(rng.random() * 0.02)  # anywhere in the next steps
                kill(child)
                break
    ended = end(child)
    assert ended.code == -9, ended.said
    acknowledged = max([acknowledged, *(int(line[4:]) for line in ended.said.splitlines() if line.startswith("ACK "))])
    answer = run("scenarios_pages:successor", device=DEVICE, path=str(journal_path), lanes=lanes)
    print(answer)
    assert answer["wrong"] == []
    assert answer["state"] == answer["step"] >= acknowledged
    assert answer["end"] in {"clean", "torn"}


def test_checkpoint_holds_its_step_and_nothing_of_the_next_when_training_goes_on(journal_path: pathlib.Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    folder = journal_path.with_name(f"{journal_path.name}-folder")
    answer = run("scenarios_pages:behind", device=DEVICE, path=str(folder))
    print(answer)
    assert answer["wrong"] == []
    assert answer["pages"] == (8 << 20) // 4096


@pytest.mark.timeout(600)
def test_losses_have_the_unfailed_run_s_bits_when_training_is_killed() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    seed = random.randrange(1 << 20)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    device = "cpu" if DEVICE == "host" else DEVICE
    command = [sys.executable, str(ROOT / "examples" / "online_lora.py"), "--rounds", "4", "--seed", str(seed), "--device", device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every loss is there and equals the unfailed run's" in done.stdout

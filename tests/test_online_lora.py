"""examples/online_lora.py.

Invariants: after every kind of death each later loss has the bits of the unfailed run's; a run that comes back with less than it saved has
other losses (the proof can fail); wrong input is one line and exit 2.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "online_lora.py"


def run(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run([sys.executable, str(EXAMPLE), *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def example() -> Any:
    spec = importlib.util.spec_from_file_location("online_lora", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["online_lora"] = module
    spec.loader.exec_module(module)
    return module


def check(device: str, seed: int) -> None:
    """Deaths before a step is saved, between two regions, before the marker, and at a random moment."""
    done = run("--rounds", "4", "--seed", str(seed), "--steps", "30", "--device", device)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every loss is there and equals the unfailed run's, bit for bit" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line[:4].strip().isdigit()]
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 5]
    assert all(row[-1] == row[-2] != "0" for row in rows)


def test_losses_have_the_unfailed_run_s_bits_when_it_was_killed() -> None:
    seed = int.from_bytes(os.urandom(3), "little")
    print("seed", seed)
    check("cpu", seed)


def test_losses_differ_when_anything_is_left_out_of_the_restore() -> None:
    import torch

    lora = example()
    trainer = lora.Trainer.make("cpu")
    for _ in range(3):
        trainer.step()
    saved = {group: [tensor.detach().clone() for tensor in found] for group, found in trainer.protected().items()}
    extra = trainer.extra()
    want = [trainer.step() for _ in range(2)]

    def losses(*, without: str = "") -> list[float]:
        other = lora.Trainer.make("cpu")
        with torch.no_grad():
            for group, found in other.protected().items():
                if group != without:
                    torch._foreach_copy_(found, saved[group])
        if without != "extra":
            other.go_to(extra)
        return [other.step() for _ in range(2)]

    assert losses() == want
    for part in ("adapters", "moments", "counts", "extra"):
        assert losses(without=part) != want, part
    torch.use_deterministic_algorithms(False)


def test_run_goes_on_by_hand_when_it_killed_itself(tmp_path: pathlib.Path) -> None:
    journal = pathlib.Path("/dev/shm") / f"concordia-lora-{os.getpid()}"
    common = ["--steps", "6", "--journal", str(journal)]
    lora = example()
    try:
        killed = run(*common, "--kill-at", "4", "--kill-where", "marker")
        assert killed.returncode == -signal.SIGKILL
        resumed = run(*common, "--resume", "--finish")
        assert resumed.stdout.splitlines()[0] == "restored 3", resumed.stderr
        assert [line.split()[1] for line in resumed.stdout.splitlines()[1:]] == ["4", "5", "6"]
        nothing = run(*common, "--resume")
        assert (nothing.returncode, nothing.stdout) == (2, "")
        assert "nothing to resume" in nothing.stderr
    finally:
        lora.end_journal(journal)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "2"], "at least 3"),
        (["--steps", "many"], "invalid int"),
        (["--rounds", "0"], "--rounds 0: 1 to 10"),
        (["--rounds", "2", "--resume"], "chooses its own deaths"),
        (["--kill-at", "31"], "1 to 30"),
        (["--device", "tpu"], "use cpu, or cuda:0"),
        (["--device", "cuda:99"], "use cpu, or cuda:0"),
        (["--colour", "blue"], "unrecognized"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        example().parse(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1

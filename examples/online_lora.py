"""Online LoRA training that outlives SIGKILL: a restored run's losses equal an unfailed run's, bit
for bit.

A small transformer is frozen; its LoRA matrices are trained with Adam on a stream of data that
exists only once. After every step adapters, moments, the place in the stream and all random
generators go into Concordia's journal, as one consistent cut.

The proof, in one command: an unfailed run, then a run that is killed R times, at all kinds of
moments, and taken up again each time:
    online_lora.py --rounds 4 --seed 7
    online_lora.py --rounds 4 --seed 7 --device cuda:0
By hand: begin, die in the middle of step 12, go on:
    online_lora.py --kill-at 12
    online_lora.py --resume
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

# read when cuBLAS starts: the same sums in every run
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import nn

from concordia.errors import ConcordiaError, UsageError, WaitTimeout
from concordia.integrations.torch_pages import TorchPages
from concordia.integrations.torch_random import pack_random, unpack_random
from concordia.journal.client import JournalClient
from concordia.testing.command import Parser, run_command

SERIES: Final = "online-lora"
VOCABULARY, WIDTH, RANK, LENGTH, BATCH = 61, 64, 4, 24, 8
JOURNAL_BYTES: Final = 32 << 20
LIFE_S: Final = 120.0  # longest that one process of the proof may take
PLACES: Final = ("step", "scan", "marker", "moment")
WORDS: Final = {
    "step": "step {step}, before it was saved",
    "scan": "step {step}, between two regions",
    "marker": "step {step}, before its marker",
    "moment": "some moment after step {step}",
    "end": "not at all",
}


class Lora(nn.Module):
    """A frozen matrix and what is trained beside it."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        frozen = torch.randn(width, width, generator=generator) / width**0.5
        self.register_buffer("frozen", frozen)
        self.down = nn.Parameter(torch.randn(width, RANK, generator=generator) / width**0.5)
        self.up = nn.Parameter(torch.zeros(RANK, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.frozen + nn.functional.dropout(x, 0.1) @ self.down @ self.up


class Model(nn.Module):
    """One block of attention and one of ReLU, over a frozen embedding."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("embedding", torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.query, self.key, self.value, self.mix = (Lora(WIDTH, generator) for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding[tokens]
        scores = self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5
        ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=x.device).triu(1)
        x = x + scores.masked_fill(ahead, float("-inf")).softmax(-1) @ self.value(x)
        x = x + self.mix(x).relu()
        return (x @ self.embedding.T) / WIDTH


@dataclass(frozen=True)
class Trainer:
    """Everything that a step changes."""

    model: Model
    optimizer: torch.optim.Adam
    stream: torch.Generator  # data that comes once: its state is the place in the stream
    device: str

    @staticmethod
    def make(device: str) -> Trainer:
        """At the beginning, the same in every process."""
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        torch.manual_seed(3)
        model = Model().to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for weight in model.parameters():  # Adam makes them in its first step: too late for us
            optimizer.state[weight] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        return Trainer(model, optimizer, torch.Generator().manual_seed(4), device)

    def protected(self) -> dict[str, list[torch.Tensor]]:
        """What is saved, group by group."""
        states = list(self.optimizer.state.values())
        return {
            "adapters": list(self.model.parameters()),
            "moments": [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")],
            "counts": [state["step"] for state in states],
        }

    def extra(self) -> bytes:
        """What is no tensor of the training: the place in the stream, and every generator."""
        place = self.stream.get_state().numpy().tobytes()
        return struct.pack("<I", len(place)) + place + pack_random(self.device)

    def go_to(self, extra: bytes) -> None:
        """The inverse of `extra`."""
        end = 4 + struct.unpack_from("<I", extra)[0]
        self.stream.set_state(torch.frombuffer(bytearray(extra[4:end]), dtype=torch.uint8))
        unpack_random(extra[end:])

    def step(self) -> float:
        """Learn from the next piece of the stream; the loss."""
        start = torch.randint(VOCABULARY, (BATCH, 1), generator=self.stream)
        stride = torch.randint(1, 5, (BATCH, 1), generator=self.stream)
        tokens = ((start + stride * torch.arange(LENGTH + 1)) % VOCABULARY).to(self.device)
        self.optimizer.zero_grad()
        logits = self.model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        return loss.item()


def train(options: argparse.Namespace) -> int:
    """One life: from the beginning or from the journal, to the last step or to its death."""
    trainer = Trainer.make(options.device)
    done = 0
    with TorchPages.open(
        trainer.protected(), name=SERIES, journal=options.journal, journal_bytes=JOURNAL_BYTES
    ) as pages:
        if options.resume:
            restored = pages.restore()
            if restored is None:
                raise UsageError(f"nothing to resume: {options.journal} has no step of a run")
            trainer.go_to(restored.extra)
            done = restored.step
            print(f"restored {done}", flush=True)
        for step in range(done + 1, options.steps + 1):
            loss = trainer.step()
            is_last = step == options.kill_at
            if is_last and options.kill_where == "step":
                die()  # weights and moments are a step ahead of everything that is saved
            if is_last and options.kill_where == "scan":
                die_between_scans(pages)
            pages.stage(step, trainer.extra())
            if is_last and options.kill_where == "marker":
                pages.checkpointer.runtime.drain()
                die()  # every byte of the step is in the journal, and it does not count
            print(f"loss {step} {struct.pack('<d', loss).hex()} {loss:.6f}", flush=True)
            pages.commit()
        if options.finish:
            pages.finish()
    return 0


def die() -> NoReturn:
    """As an out-of-memory killer does it: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still here")


def die_between_scans(pages: TorchPages) -> None:
    """Before the second region is scanned, once the first one's pages are committed."""
    scan, scanned = pages.writer.scan, []

    def fatal_scan(name: str, part: range | None = None) -> Any:
        if scanned:
            pages.checkpointer.wait(scanned[0])
            die()
        scanned.append(scan(name, part))
        return scanned[0]

    pages.writer.scan = fatal_scan  # type: ignore[method-assign]


@dataclass
class Life:
    """What one process of the proof did."""

    restored: int
    losses: dict[int, str]  # bits by step
    code: int


def live(arguments: Sequence[str], *, kill_after: tuple[int, float] | None = None) -> Life:
    """Run one process; with `kill_after` (step, seconds) it is killed that long after that step."""
    command = [sys.executable, "-u", __file__, *arguments]
    life = Life(0, {}, 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        bound = threading.Timer(LIFE_S, child.send_signal, [signal.SIGTERM])
        bound.start()
        assert child.stdout is not None
        for line in child.stdout:
            words = line.split()
            if words[0] == "restored":
                life.restored = int(words[1])
            elif words[0] == "loss":
                life.losses[int(words[1])] = words[2]
                if kill_after is not None and int(words[1]) >= kill_after[0]:
                    time.sleep(kill_after[1])
                    child.kill()
        bound.cancel()
    life.code = child.wait(LIFE_S)
    if life.code == -signal.SIGTERM:
        raise WaitTimeout(f"a run took more than {LIFE_S:.0f} s: {' '.join(arguments)}")
    if life.code not in (0, -signal.SIGKILL):
        raise ConcordiaError(f"a run ended with {life.code}: {' '.join(arguments)}")
    return life


def prove(options: argparse.Namespace) -> int:
    """The unfailed run, then the one with `rounds` deaths, side by side."""
    home = options.journal.parent
    folder = pathlib.Path(tempfile.mkdtemp(prefix="concordia-online-lora-", dir=home))
    common = ["--steps", str(options.steps), "--device", options.device, "--finish", "--journal"]
    try:
        unfailed = live([*common, str(folder / "unfailed")])
        print(f"online LoRA on {options.device}, {options.steps} steps, {options.rounds} deaths")
        print("\nlife  begins after  died at                            steps  equal losses")
        is_whole = compare(options, unfailed.losses, [*common, str(folder / "killed")])
    finally:
        for name in ("unfailed", "killed"):
            end_journal(folder / name)
        shutil.rmtree(folder, ignore_errors=True)
    word = "every" if is_whole else "NOT every"
    print(f"\n{word} loss is there and equals the unfailed run's, bit for bit")
    return 0 if is_whole else 1


def compare(options: argparse.Namespace, unfailed: dict[int, str], common: list[str]) -> bool:
    """One run of several lives against the losses of the unfailed one."""
    rng = random.Random(options.seed)
    seen: dict[int, str] = {}
    wrong = 0
    for number in range(1, options.rounds + 2):
        is_last = number > options.rounds
        where = "end" if is_last else PLACES[(number - 1) % len(PLACES)]
        # spread over the steps that are left, after at least one more that is saved
        share = (options.steps - len(seen)) / (options.rounds + 2 - number)
        step = min(options.steps - 1, len(seen) + 2 + int(rng.random() * max(0.0, share - 2)))
        arguments = [*common, *(["--resume"] if number > 1 else [])]
        if where in PLACES[:3]:
            arguments += ["--kill-at", str(step), "--kill-where", where]
        life = live(arguments, kill_after=(step, rng.random() / 100) if where == "moment" else None)
        equal = sum(unfailed.get(at) == bits for at, bits in life.losses.items())
        wrong += len(life.losses) - equal
        seen |= life.losses
        begins = f"step {life.restored}" if number > 1 else "nothing"
        died = WORDS[where].format(step=step)
        print(f"{number:4}  {begins:12}  {died:33}  {len(life.losses):5}  {equal:12}", flush=True)
    return wrong == 0 and seen.keys() == unfailed.keys() == set(range(1, options.steps + 1))


def end_journal(journal: pathlib.Path) -> None:
    """Its owner would keep it for minutes."""
    if journal.exists():
        try:
            with JournalClient.connect(journal, timeout_s=1.0) as client:
                client.shutdown()
        except ConcordiaError as error:
            print(f"the journal {journal} ends by itself: {error}", file=sys.stderr)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; ends the process with 2 when they are wrong."""
    parser = Parser(__doc__)
    home = pathlib.Path("/dev/shm") / f"concordia-{os.getuid()}-online-lora"
    add = parser.add_argument
    add("--steps", type=int, default=30, help="steps of the whole run (%(default)s)")
    add("--device", default="cpu", help="cpu, or cuda:0 for a GPU (%(default)s)")
    add("--rounds", type=int, metavar="R", help="prove it with R deaths; nothing else is needed")
    add("--seed", type=int, default=0, metavar="S", help="of the moments of death (%(default)s)")
    add("--kill-at", type=int, metavar="N", help="SIGKILL itself in the middle of step N")
    add("--kill-where", choices=PLACES[:3], default="step", help="how far into saving step N")
    add("--resume", action="store_true", help="go on after the newest step in the journal")
    add("--journal", type=pathlib.Path, default=home, help="its folder (%(default)s)")
    add("--finish", action="store_true", help="drop the run from the journal after its last step")
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps {options.steps}: at least 3")
    if options.rounds is not None and not 1 <= options.rounds <= options.steps // 3:
        parser.error(f"--rounds {options.rounds}: 1 to {options.steps // 3}, a third of the steps")
    if options.rounds is not None and (options.kill_at is not None or options.resume):
        parser.error("--rounds chooses its own deaths: leave --kill-at and --resume out")
    if options.kill_at is not None and not 1 <= options.kill_at <= options.steps:
        parser.error(f"--kill-at {options.kill_at}: 1 to {options.steps}, one of the steps")
    index = options.device.removeprefix("cuda:")
    is_there = index.isdigit() and int(index) < torch.cuda.device_count()
    if options.device != "cpu" and not is_there:
        parser.error(f"--device {options.device}: use cpu, or cuda:0 where torch finds a GPU")
    return options


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, 1 when a loss differs, 2 for wrong input."""
    options = parse(arguments)
    return prove(options) if options.rounds is not None else train(options)


if __name__ == "__main__":
    run_command(main)

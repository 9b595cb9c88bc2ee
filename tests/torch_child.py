"""A process that trains, and one that takes its place: `torch_child.py save|restore KIND JOURNAL`.

`save` saves three steps, begins a fourth and is killed in the middle of it; `restore` compares what comes back with what the third step had,
byte for byte, and answers with the first difference or "equal".
"""

import json
import os
import pathlib
import random
import signal
import sys

import torch

from concordia.integrations.torch_pages import TorchPages
from concordia.integrations.torch_random import pack_random, unpack_random

STEPS = 3
Content = tuple[dict[str, list[torch.Tensor]], bytes]


def bits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Any bits at all, NaN with payloads among them."""
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype)


def adapters(step: int) -> Content:
    """LoRA matrices of four modules, none a whole page; B is the transpose of what it lies as."""
    a = [bits(100 * step + i, 8, 72 + i) for i in range(4)]
    b = [bits(200 * step + i, 8, 50 + i, dtype=torch.bfloat16).t() for i in range(4)]
    return {"lora_a": a, "lora_b": b}, b""


def moments(step: int) -> Content:
    """Adam some steps on; its moments are there from the first."""
    torch.manual_seed(5)
    weight = torch.nn.Parameter(torch.randn(60, 70))
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for _ in range(step + 1):
        optimizer.zero_grad()
        (weight @ torch.randn(70)).square().sum().backward()
        optimizer.step()
    state = optimizer.state[weight]
    return {"weights": [weight], "moments": [state["exp_avg"], state["exp_avg_sq"], state["step"]]}, b""


def sampler(step: int) -> Content:
    """Generators of the process and one of its own, some draws on."""
    random.seed(step)
    torch.manual_seed(step)
    own = torch.Generator().manual_seed(step)
    for _ in range(10 * step):
        random.gauss(0, 1), torch.rand(3), torch.rand(2, generator=own)
    return {"generator": [own.get_state()]}, pack_random()


def tables(step: int) -> Content:
    """Block tables of 300 requests of uneven length: more than one record of state."""
    table = {f"request-{i}": [(i * 7919 + j * step) % 65_536 for j in range(i)] for i in range(300)}
    return {"lengths": [torch.arange(300) * step]}, json.dumps(table).encode()


def communicator(step: int) -> Content:
    """Who is in the group, its epoch, and how far each rank's sequence is."""
    group = {"members": [f"rank-{i}" for i in range(8)], "epoch": step, "sequences": [step * 1000 + i for i in range(8)]}
    return {"counters": [torch.tensor(group["sequences"])]}, json.dumps(group).encode()


KINDS = {f.__name__: f for f in (adapters, moments, sampler, tables, communicator)}


def take(target: dict[str, list[torch.Tensor]], source: dict[str, list[torch.Tensor]]) -> None:
    with torch.no_grad():
        for group, tensors in source.items():
            for to, tensor in zip(target[group], tensors, strict=True):
                to.copy_(tensor)


def save(kind: str, journal: pathlib.Path) -> None:
    tensors, _ = KINDS[kind](0)
    pages = TorchPages.open(tensors, name=kind, journal=journal)
    for step in range(1, STEPS + 1):
        found, extra = KINDS[kind](step)
        take(tensors, found)
        print(pages.save(step, extra), flush=True)
    found, extra = KINDS[kind](STEPS + 1)
    take(tensors, found)
    pages.stage(STEPS + 1, extra)
    pages.checkpointer.runtime.drain()  # all but the marker is in the journal
    os.kill(os.getpid(), signal.SIGKILL)


def restore(kind: str, journal: pathlib.Path) -> str:
    tensors, _ = KINDS[kind](0)
    with TorchPages.open(tensors, name=kind, journal=journal) as pages:
        restored = pages.restore()
        pages.finish()
    if restored is None or restored.step != STEPS:
        return f"restored {restored and restored.step}, not {STEPS}"
    want, extra = KINDS[kind](STEPS)
    if kind == "sampler":  # and what is drawn next is the same
        expected = random.random(), torch.rand(5).tolist()
        unpack_random(restored.extra)
        if (random.random(), torch.rand(5).tolist()) != expected:
            return "other numbers are drawn"
    if restored.extra != extra:
        return f"{len(restored.extra)} other bytes"
    for group, found in tensors.items():
        for i, (one, other) in enumerate(zip(found, want[group], strict=True)):
            if one.detach().contiguous().view(-1).view(torch.uint8).tolist() != other.detach().contiguous().view(-1).view(torch.uint8).tolist():
                return f"tensor {i} of {group} differs"
    return "equal"


if __name__ == "__main__":
    action, chosen, path = sys.argv[1:4]
    torch.set_num_threads(1)
    if action == "save":
        save(chosen, pathlib.Path(path))
    print(restore(chosen, pathlib.Path(path)))

"""The random generators of a training process as bytes, floor 7.

Owns: packing Python's generator, torch's on the CPU and on one GPU. Promises: `unpack` restores
exactly what `pack` saw, so that both draw the same numbers from then on; the form is JSON, never a
pickle; what cannot be read raises Corruption, and nothing was set. Called by training loops, for
the `extra` of TorchPages. It does not know generators that a caller made: their `get_state` is a
tensor, which is protected like any other.
"""

from __future__ import annotations

import base64
import json
import random

import torch

from concordia.errors import Corruption


def pack_random(device: str = "cpu") -> bytes:
    """The state of random, of torch on the CPU and, for "cuda:<index>", of torch there."""
    version, words, gauss = random.getstate()
    states = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        states[device] = torch.cuda.get_rng_state(device)
    packed = {
        where: base64.b64encode(bytes(state.numpy())).decode() for where, state in states.items()
    }
    return json.dumps({"python": [version, words, gauss], "torch": packed}).encode()


def unpack_random(state: bytes) -> None:
    """Set the generators to what `pack_random` saw."""
    try:
        value = json.loads(state)
        version, words, gauss = value["python"]
        python = (int(version), tuple(int(word) for word in words), gauss)
        random.Random().setstate(python)  # one of our own first: a wrong one raises here
        states = {
            where: torch.frombuffer(bytearray(base64.b64decode(packed)), dtype=torch.uint8)
            for where, packed in value["torch"].items()
        }
        torch.Generator().set_state(states["cpu"])
        for where, found in states.items():
            torch.Generator(where).set_state(found)  # so that none is set unless all can be
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise Corruption(f"this is no state of random generators here: {error!r}") from error
    random.setstate(python)
    for where, found in states.items():
        if where == "cpu":
            torch.set_rng_state(found)
        else:
            torch.cuda.set_rng_state(found, where)

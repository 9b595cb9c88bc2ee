"""What weights are, as far as their files tell.

Owns: fingerprints of the files of models and adapters. Promises: equal fingerprints mean files of
equal names, sizes and times, with equal bytes at every place looked at; at most WEIGHT_SAMPLES
places of a file are read, so that it costs milliseconds; what has no files here is None; an adapter
whose files change while the engine runs is refused from then on, because the engine may have loaded
either. Called by compat.py and the scheduler side. It downloads nothing and does not know what the
files mean.
"""

from __future__ import annotations

import os
import pathlib
from typing import Final, TypeAlias

import xxhash

from concordia import config
from concordia.errors import RecoveryError

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".tensors")
CODE_SUFFIXES: Final = (".py",)  # a model that brings its own code computes what that says
# an adapter's scale; a model's own settings are read from the engine
ADAPTER_SETTINGS: Final = "adapter_config.json"
REPOSITORY_FILES: Final = ("config.json", "params.json", ADAPTER_SETTINGS)

Fingerprint: TypeAlias = list[list[str | int]]  # name, size, time, and of what was read a digest


def fingerprint(path: pathlib.Path) -> Fingerprint | None:
    """What the weights at `path`, a folder or one file, are; None when there are none that can be
    read.
    """
    try:
        return [[*_state(file), _digest(file)] for file in _files(path)] or None
    except OSError:
        return None


def locate(
    name: str, *, revision: str | None = None, cache: str | None = None
) -> pathlib.Path | None:
    """Where the files of a model or adapter lie that is named by path or by repository; None when
    they are not here.
    """
    path = pathlib.Path(name)
    if path.exists():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache

        for file in REPOSITORY_FILES:
            found = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
            if isinstance(found, str):
                return pathlib.Path(found).parent
    except (ImportError, ValueError, OSError):
        return None  # not the name of a repository
    return None


class Adapters:
    """Adapters as they were when first asked for."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int, str], tuple[Fingerprint, Fingerprint]] = {}

    def identify(self, name: str, number: int, path: str) -> list[object]:
        """What names this adapter and its content; raises RecoveryError when its content cannot be
        told.
        """
        folder = locate(path)
        seen = self._seen.get((name, number, path))
        if seen is None:
            seen = self._look(name, folder)
            if len(self._seen) >= config.ADAPTERS_KNOWN_MAX:
                raise RecoveryError(
                    f"this engine has had {len(self._seen)} adapters; no more are told apart"
                )
            self._seen[name, number, path] = seen
        elif folder is None or _states(folder) != seen[0]:
            raise RecoveryError(
                "the files of its adapter have changed since the engine first used it"
            )
        return [name, number, path, seen[1]]

    def _look(self, name: str, folder: pathlib.Path | None) -> tuple[Fingerprint, Fingerprint]:
        states = None if folder is None else _states(folder)
        content = None if folder is None else fingerprint(folder)
        if not states or not content:
            raise RecoveryError(
                "the files of its adapter cannot be read, so what it computes has no name"
            )
        return states, content


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """Files that decide what is computed: `path` itself, or those right in it."""
    if path.is_file():
        return [path]
    wanted = WEIGHT_SUFFIXES + CODE_SUFFIXES
    return sorted(p for p in path.iterdir() if p.suffix in wanted or p.name == ADAPTER_SETTINGS)


def _states(path: pathlib.Path) -> Fingerprint | None:
    try:
        return [_state(file) for file in _files(path)]
    except OSError:
        return None


def _state(file: pathlib.Path) -> list[str | int]:
    found = file.stat()
    return [file.name, found.st_size, found.st_mtime_ns]


def _digest(file: pathlib.Path) -> str:
    """Of pieces spread evenly over the file, the whole of a small one: images and stores set every
    time to the same.
    """
    digest = xxhash.xxh3_128()
    piece, count = config.WEIGHT_SAMPLE_BYTES, config.WEIGHT_SAMPLES
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size <= piece * count:
            digest.update(opened.read(piece * count))
        else:
            for index in range(count):
                opened.seek(index * (size - piece) // (count - 1))
                digest.update(opened.read(piece))
    return digest.hexdigest()

"""A command of a benchmark or an example: its arguments, and how it ends.

Owns: the parser and the types that refuse what cannot be measured or kept. Promises: whatever is
wrong is one line on stderr, said before anything is measured, and the exit status is that of the
error, 2 for wrong arguments. Called by benchmarks/ and examples/.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

from concordia.errors import ConcordiaError


class Parser(argparse.ArgumentParser):
    """One line for what is wrong."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help says more\n")


def count(text: str) -> int:
    """1 or more."""
    found = int(text) if text.isdigit() else 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return found


def folder(text: str) -> pathlib.Path:
    """One that is there."""
    path = pathlib.Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def file_in_folder(text: str) -> pathlib.Path:
    """A file that may be written: its folder is there, and is not made of a mistyped name."""
    path = pathlib.Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: give a file in a folder that is there")
    return path


def result_file(entry: str) -> Callable[[str], pathlib.Path]:
    """A file that results are added to: a new one, or one that has this entry already."""

    def checked(text: str) -> pathlib.Path:
        path = file_in_folder(text)
        if path.exists() and not has_entry(path, entry):
            raise argparse.ArgumentTypeError(
                f"{text} is no result file with {entry!r}: give one that is, or a new name"
            )
        return path

    return checked


def has_entry(path: pathlib.Path, entry: str) -> bool:
    """Whether a file is a JSON object with this entry."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and entry in found


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """End the process with what `main` says of the command line, or with an error's one line."""
    try:
        code = main(sys.argv[1:])
    except ConcordiaError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)

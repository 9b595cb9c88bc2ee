"""The command `concordia instrument`, beside the command line's other commands.

Owns: its flags. Promises: a mistake is one line on stderr, exit code 2, and nothing is written;
needs no GPU. Registered by cli_commands. The work is offline's.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any, Final

import click

from concordia.errors import UsageError

_HOOKS: Final = ("entry", "exit", "marks", "sass-marks")
_ARCHITECTURE: Final = re.compile(r"(?:sm_?)?(\d{2,3})[af]?", re.IGNORECASE)
_ADDRESS_ALIGNMENT: Final = 256  # as every allocation's; marks load its words by sixteen bytes
_ADDRESS_END: Final = 1 << 47  # of device memory


@click.command()
@click.argument("file", type=click.Path(path_type=pathlib.Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=pathlib.Path),
    help="Write the instrumented image here; without it, only say what would be hooked.",
)
@click.option("--arch", default="90", show_default=True, help="GPU that it will run on.")
@click.option("--hooks", default="entry,marks", show_default=True, help=f"Of {', '.join(_HOOKS)}.")
@click.option("--control", metavar="ADDRESS", help="Device address of the control block.")
@click.option(
    "--keep-slots",
    is_flag=True,
    help="Leave its address open: 0 in OUT, and the places in OUT.slots.json.",
)
@click.option("--image", type=click.IntRange(min=0), help="Which image of a library, from 0.")
@click.option("--json", "as_json", is_flag=True, help="JSON, for machines.")
def instrument(file: pathlib.Path, output: pathlib.Path | None, **asked: Any) -> None:
    """Put hooks into the kernels of FILE: a cubin, PTX, a fatbin, or one in a library.

    Needs no GPU. Says of every kernel what was hooked, or why it was left alone.
    """
    from concordia.instrument import offline
    from concordia.instrument.options import Options

    hooks = _hooks(asked["hooks"])
    options = Options(
        arch=_architecture(asked["arch"]),
        entry="entry" in hooks,
        exit="exit" in hooks,
        marks="marks" in hooks,
        sass_marks="sass-marks" in hooks,
    )
    target = None
    if output is not None:
        target = offline.Target(output, _control(asked["control"], asked["keep_slots"]))
    elif asked["control"] is not None or asked["keep_slots"]:
        raise UsageError("--control and --keep-slots say what is written: name a file with -o")
    found = offline.instrument(file, options, image=asked["image"], target=target)
    click.echo(json.dumps(found.as_json()) if asked["as_json"] else found.text())


def _hooks(text: str) -> set[str]:
    hooks = {part.strip() for part in text.split(",")}
    if not hooks <= set(_HOOKS):
        raise UsageError(f"--hooks {text}: give some of {', '.join(_HOOKS)}, with commas")
    return hooks


def _architecture(text: str) -> int:
    found = _ARCHITECTURE.fullmatch(text)
    if found is None:
        raise UsageError(f"--arch {text}: give a number such as 90 for sm_90")
    return int(found[1])


def _control(text: str | None, keep_slots: bool) -> int | None:
    if (text is None) != keep_slots:
        raise UsageError(
            "give --control ADDRESS, where the hooks write, or --keep-slots to fill that in later"
        )
    if text is None:
        return None
    try:
        address = int(text, 0)
    except ValueError:
        address = 0
    if not 0 < address < _ADDRESS_END or address % _ADDRESS_ALIGNMENT:
        raise UsageError(
            f"--control {text}: give the address of device memory, such as 0x7f0000000000"
        )
    return address

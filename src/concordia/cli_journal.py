"""The commands `concordia journal ...`, beside the command line's other commands.

Owns: their flags and exit codes. Promises: they only read, and need no server. Registered by
cli_commands. The work is the journal's inspection.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Final

import click

_as_json: Final = click.option("--json", "as_json", is_flag=True, help="JSON, for machines.")


@click.group()
def journal() -> None:
    """Look into a journal; needs no server."""


@journal.command()
@click.argument("path", type=click.Path(path_type=pathlib.Path))
@_as_json
def inspect(path: pathlib.Path, as_json: bool) -> None:
    """Streams and segments of the journal at PATH."""
    from concordia.journal import inspection

    found = inspection.inspect(path)
    click.echo(json.dumps(found) if as_json else inspection.table(found))


@journal.command()
@click.argument("path", type=click.Path(path_type=pathlib.Path))
@_as_json
def verify(path: pathlib.Path, as_json: bool) -> None:
    """Check every hash of the journal at PATH; exit code 3 when it is damaged. A torn tail is no
    damage.
    """
    from dataclasses import asdict

    from concordia.journal import inspection

    report = inspection.verify(path)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        click.echo(
            f"{report.records} records, {report.payload_bytes} bytes in {report.streams} streams"
        )
        for line in report.torn:
            click.echo(f"torn tail: {line}")
        for line in report.damage:
            click.echo(f"DAMAGE: {line}")
    sys.exit(report.exit_code)


@journal.command()
@click.argument("path", type=click.Path(path_type=pathlib.Path))
@click.option("--payloads", is_flag=True, help="With the bytes, in base64.")
def export(path: pathlib.Path, payloads: bool) -> None:
    """One JSON line for each record of the journal at PATH."""
    from concordia.journal import inspection

    for record in inspection.export(path, payloads=payloads):
        click.echo(json.dumps(record))

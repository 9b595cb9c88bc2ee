"""The commands `concordia run` and `concordia modules`, beside the command line's other commands.

Owns: their flags. Promises: a mistake is one line on stderr, exit code 2, and nothing is started;
everything behind -- is the program's. Registered by cli_commands. The work is cli_run's and
coverage's.
"""

from __future__ import annotations

import json
import pathlib
import sys

import click

from concordia.cli_run import RUN_DIR, Asked, start

_run_dir = click.option(
    "--run-dir",
    type=click.Path(path_type=pathlib.Path),
    envvar=RUN_DIR,
    show_envvar=True,
    help="Folder in which runs have theirs.",
)


@click.command(
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
)
@click.option(
    "--policy",
    type=click.Path(path_type=pathlib.Path),
    help="What of the program is saved, and when (TOML). Its [images] say which hooks.",
)
@click.option(
    "--hooks",
    default="",
    metavar="LIST",
    help="Hooks for the program's kernels, with commas: entry, exit, marks, sass-marks.",
)
@click.option("--verbose", is_flag=True, help="Say at the end what was hooked, in one line.")
@_run_dir
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    policy: pathlib.Path | None,
    hooks: str,
    verbose: bool,
    run_dir: pathlib.Path | None,
    command: tuple[str, ...],
) -> None:
    """Run a program with Concordia under its CUDA driver. Write the program behind --.

    \b
      concordia run -- python app.py                   look at its kernels, change nothing
      concordia run --hooks entry,marks -- python app.py
      concordia run --policy save.toml -- vllm serve MODEL
      concordia modules                                what was loaded, and what was hooked

    The program and all its children find a small library before the driver's: every image of
    kernels that they load passes through it. Without --policy and --hooks nothing is changed.
    With hooks, images are rewritten by a process of its own, once, into a cache; what cannot be
    rewritten in time runs as it is. cuBLAS and cuDNN are never changed.

    The program keeps its terminal, its signals and its exit code. CONCORDIA_DISABLE=1 in the
    environment switches everything off, for one program or for all.
    """
    sys.exit(start(Asked(command, hooks, policy, run_dir, verbose)))


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=pathlib.Path))
@click.option("--kernels", is_flag=True, help="A line for each kernel, too.")
@click.option("--json", "as_json", is_flag=True, help="JSON, for machines: all of it.")
@_run_dir
def modules(
    run: pathlib.Path | None, kernels: bool, as_json: bool, run_dir: pathlib.Path | None
) -> None:
    """What the programs of RUN loaded: libraries, images, kernels, registers, what was hooked and
    why not. Without RUN, of the last `concordia run`.
    """
    from concordia.integrations.program.coverage import read_run
    from concordia.integrations.program.run_folder import find_run

    found = read_run(find_run(run, run_dir))
    click.echo(json.dumps(found.as_json()) if as_json else found.text(with_kernels=kernels))

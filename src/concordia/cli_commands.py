"""The commands: serve, status, drain, journal, doctor, run, modules, instrument.

Owns: the flags and their environment variables (CONCORDIA_ and the flag's name). Promises: what can
be checked is checked before anything is started; importing this loads neither torch nor vLLM.
Called by cli, which says what went wrong. It does no work of its own.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import click

from concordia import __version__, cli_instrument, cli_journal, cli_program, config
from concordia.errors import ConcordiaError, UsageError

F = TypeVar("F", bound=Callable[..., Any])

# vLLM's own flags that its users know best; the rest goes after --. A name alone takes a value.
_ENGINE_OPTIONS: Final = (
    (("--tensor-parallel-size", "-tp"), "ranks that share each layer"),
    (("--pipeline-parallel-size", "-pp"), "ranks that take layers in turn"),
    (("--dtype",), "type of weights and activations"),
    (("--max-model-len",), "longest prompt and answer together, in tokens"),
    (("--max-num-seqs",), "requests in one step"),
    (("--max-num-batched-tokens",), "tokens in one step"),
    (("--gpu-memory-utilization",), "share of a device's memory for all its engines together"),
    (("--kv-cache-memory-bytes",), "KV cache of each engine"),
    (("--seed",), "seed of the engine"),
    (("--load-format",), "how weights are loaded"),
    (("--quantization", "-q"), "how weights are quantised"),
    (("--tokenizer",), "tokenizer, when it is not the model's"),
    (("--revision",), "revision of the model"),
    (("--chat-template",), "file of the chat template"),
    (("--kv-transfer-config",), "a connector of your own, joined with Concordia's"),
)
_ENGINE_SWITCHES: Final = (
    ("--enforce-eager", "no compilation (the default on a CPU)"),
    ("--trust-remote-code", "run the model's own code"),
)


def _option(*names: str, **settings: Any) -> Callable[[F], F]:
    """A click option that an environment variable can set, too."""
    long = next(n for n in names if n.startswith("--")).partition("/")[0].removeprefix("--")
    variable = "CONCORDIA_" + long.upper().replace("-", "_")
    settings.setdefault("show_default", settings.get("default") is not None)
    return click.option(*names, envvar=variable, show_envvar=True, **settings)


def _engine_options(command: F) -> F:
    for names, text in reversed(_ENGINE_OPTIONS):
        command = _option(*names, default=None, help=f"vLLM: {text}.")(command)
    for name, text in _ENGINE_SWITCHES:
        command = _option(name, is_flag=True, help=f"vLLM: {text}.")(command)
    return command


_run_dir = _option(
    "--run-dir",
    type=click.Path(path_type=pathlib.Path),
    help="Folder for sockets and engines' files.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="JSON, for machines.")


@click.group(
    commands=[
        *(cli_instrument.instrument, cli_journal.journal),
        *(cli_program.run, cli_program.modules),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="concordia")
def cli() -> None:
    """LLM inference that survives failures: every stream goes on from its last token."""


@cli.command()
@click.argument("model")
@_option("--replicas", type=click.IntRange(1, 64), default=1, help="Engines that serve.")
@_option(
    "--standby", type=click.IntRange(0, 64), default=1, help="Engines that are loaded and wait."
)
@_option("--host", default="127.0.0.1", help="Address to listen on.")
@_option("--port", type=click.IntRange(1, 65535), default=8000, help="Port to listen on.")
@_option(
    "--api-key",
    multiple=True,
    help="Key that clients must send; may be given again. Without one, that of VLLM_API_KEY.",
)
@_option("--served-model-name", multiple=True, help="Name that clients use; may be given again.")
@_engine_options
@_option("--journal-dir", type=click.Path(path_type=pathlib.Path), help="Folder of the journal.")
@_option(
    "--journal-size", help="Size of the journal, such as 2GiB; by default 1.25 times the KV cache."
)
@_option(
    "--journal-pool",
    type=click.Path(path_type=pathlib.Path),
    help="Where its records lie instead: a devdax device, or a file to be made on hugetlbfs.",
)
@_option(
    "--journal-node",
    type=click.IntRange(min=0),
    help="Memory node that its records must lie on; by default near the GPUs.",
)
@_option(
    "--commit",
    type=click.Choice(["release", "before-emit"]),
    default="release",
    help="Send tokens at once, or only after the state they depend on is in the journal.",
)
@_option(
    "--residency",
    type=click.Choice(["leased", "resident", "stream", "auto"]),
    default="leased",
    help="How long Concordia's kernel stays on a GPU (docs/residency.md).",
)
@_option(
    "--executor-ctas",
    type=click.IntRange(1, config.EXECUTOR_CTAS_MAX),
    default=1,
    help="How many multiprocessors it takes while it is there: more of them for a shorter time.",
)
@_option(
    "--recovery-timeout",
    type=click.FloatRange(min=1),
    default=config.RECOVERY_TIMEOUT_S,
    help="Seconds after a fault until a client gets an error.",
)
@_option(
    "--restore/--no-restore", default=True, help="Restore from the journal, or replay by prefill."
)
@_option("--protect/--no-protect", default=True, help="Keep a journal at all.")
@_option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=config.DRAIN_WAIT_S,
    help="Seconds that running requests get when the server is stopped.",
)
@_run_dir
@_option("--log-dir", type=click.Path(path_type=pathlib.Path), help="Keep engines' logs here.")
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED)
def serve(**options: Any) -> None:
    """Serve MODEL over an OpenAI-compatible API. Flags after -- go to vLLM as they are."""
    from concordia.serving.start import start

    sys.exit(start(options, _engine_arguments(options)))


@cli.command()
@_option("--port", type=int, default=None, help="Which server; needed when there are several.")
@_run_dir
@_as_json
def status(port: int | None, run_dir: pathlib.Path | None, as_json: bool) -> None:
    """Replicas, requests, faults and journal of a running server."""
    found = _ask("status", port, run_dir, timeout_s=config.STATUS_S)
    if as_json:
        click.echo(json.dumps(found))
        return
    from concordia.serving.status import render

    click.echo(render(found))


@cli.command()
@_option("--port", type=int, default=None, help="Which server; needed when there are several.")
@_run_dir
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=config.DRAIN_WAIT_S,
    show_default=True,
    help="Seconds to wait.",
)
@click.option("--stop", is_flag=True, help="End the server afterwards.")
def drain(port: int | None, run_dir: pathlib.Path | None, timeout: float, stop: bool) -> None:
    """Admit no new requests and wait for the running ones; exit code 1 when some still run."""
    found = _ask(
        "drain",
        port,
        run_dir,
        timeout_s=timeout + config.STATUS_S,
        arguments={"bound_s": timeout, "stop": stop},
    )
    left = int(found["left"])
    click.echo(f"{left} requests still run" if left else "drained")
    sys.exit(1 if left else 0)


@cli.command()
@_as_json
def doctor(as_json: bool) -> None:
    """What this machine has, and what protection that allows; exit code 1 when serving is not
    possible.
    """
    from concordia.serving import doctor as examination

    found = examination.examine()
    click.echo(json.dumps(found.as_json()) if as_json else found.table())
    sys.exit(0 if found.can_serve else 1)


# of commands that hand words on: what a flag that is not theirs may have been
_BEHIND: Final = {
    "serve": "Flags of vLLM itself go after --.",
    "run": "The program and its flags go after --.",
}


def invoke(words: Sequence[str]) -> None:
    """Run the command that these words name. What is wrong with them is a ConcordiaError."""
    try:
        cli.main(args=list(words), prog_name="concordia", standalone_mode=False)
    except click.exceptions.NoSuchOption as error:
        hint = _BEHIND.get(error.ctx.info_name or "") if error.ctx is not None else None
        raise UsageError(" ".join(filter(None, (error.format_message(), hint)))) from None
    except click.ClickException as error:
        kind = UsageError if error.exit_code == UsageError.exit_code else ConcordiaError
        raise kind(error.format_message()) from None
    except click.Abort:
        raise KeyboardInterrupt from None


def _engine_arguments(options: dict[str, Any]) -> list[str]:
    """vLLM's flags: those after --, then those that we know as options."""
    found = list(options.pop("engine_flags"))
    for names, _ in _ENGINE_OPTIONS:
        value = options.pop(names[0].removeprefix("--").replace("-", "_"))
        if value is not None:
            found += [names[0], str(value)]
    for name, _ in _ENGINE_SWITCHES:
        if options.pop(name.removeprefix("--").replace("-", "_")):
            found.append(name)
    return found


def _ask(
    command: str,
    port: int | None,
    run_dir: pathlib.Path | None,
    *,
    timeout_s: float,
    arguments: dict[str, Any] | None = None,
) -> Any:
    from concordia.paths import default_base
    from concordia.serving.control import ask
    from concordia.serving.run_folder import find_control

    path = find_control(run_dir or default_base(), port)
    return ask(path, command, timeout_s=timeout_s, **(arguments or {}))

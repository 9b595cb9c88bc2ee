"""The vLLM flags of every replica, floor 6.

Owns: which of a user's vLLM flags cannot be honoured and why, how they are read, and the command
line that is made of them. Promises: a refused flag raises UsageError with what to do instead,
before anything is started; a user's own `--kv-transfer-config` is joined with ours through
MultiConnector, their logits processors with ours; everything else reaches vLLM as it was given.
Called by the command line and Replica. It does not know vLLM's whole list: vLLM itself judges the
rest.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from concordia.errors import UsageError
from concordia.serving.need import Defaults

CONNECTOR: Final = "ConcordiaConnector"
CONNECTOR_MODULE: Final = "concordia.integrations.vllm.connector"
COUNTER_SAMPLER: Final = "concordia.integrations.vllm.sampler:CounterSampler"
KV_TRANSFER: Final = "--kv-transfer-config"
LOGITS_PROCESSORS: Final = "--logits-processors"

_ALIASES: Final = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-asc": "--api-server-count",
    "-q": "--quantization",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
    "-sc": "--speculative-config",
    "-dcp": "--decode-context-parallel-size",
    "-n": "--nnodes",
    "-r": "--node-rank",
}
_MORE_REPLICAS: Final = "use --replicas N: each replica is an engine of its own that fails alone"
_OURS: Final = "it is Concordia's own flag: put it before --"
_ONE_HOST: Final = "a replica lives on one host in this version"
# A flag whose value is listed as harmless may be given with that value.
_REFUSED: Final[dict[str, tuple[str, str | None]]] = {
    "--data-parallel-size": (_MORE_REPLICAS, "1"),
    "--data-parallel-": (_MORE_REPLICAS, None),
    "--api-server-count": ("one API process per replica; " + _MORE_REPLICAS, "1"),
    "--headless": ("the router needs the engine's HTTP server", None),
    "--grpc": ("the router speaks HTTP with its engines", None),
    "--grpc-port": ("the router speaks HTTP with its engines", None),
    "--uds": (
        "engines listen on loopback; put a proxy in front of Concordia for a socket file",
        None,
    ),
    "--root-path": ("put the prefix into the proxy in front of Concordia", None),
    "--config": ("give its contents as flags: what is hidden in a file cannot be checked", None),
    "--ssl-": ("end TLS in a proxy in front of Concordia", None),
    "--enable-ssl-refresh": ("end TLS in a proxy in front of Concordia", None),
    "--nnodes": (_ONE_HOST, "1"),
    "--node-rank": (_ONE_HOST, "0"),
    "--enable-elastic-ep": (
        "elastic expert parallelism is vLLM's own data-parallel recovery",
        None,
    ),
    "--enable-fault-tolerance": (
        "vLLM's own fault tolerance ends requests; leave faults to Concordia",
        None,
    ),
    "--tokens-only": ("the router needs text endpoints", None),
    "--skip-tokenizer-init": ("the router needs the engine's tokenizer for chat", None),
    "--model": ("name the model right after `serve`", None),
    "--host": (_OURS, None),
    "--port": (_OURS, None),
    "--api-key": (_OURS, None),
    "--served-model-name": (_OURS, None),
}
# argparse takes abbreviations; shorter ones than "--header" name too many flags
_PREFIX_MIN: Final = 8


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """Flags for vLLM in the user's order, values apart from names; `parse` checks them."""

    tokens: tuple[str, ...]

    @staticmethod
    def parse(given: Sequence[str]) -> EngineFlags:
        """Bring flags into one form; raises UsageError for one that cannot be honoured."""
        tokens: list[str] = []
        for token in given:
            name, separator, value = token.partition("=")
            if not name.startswith("-") or _is_number(name):
                tokens.append(token)
                continue
            tokens.append(_canonical(name))
            if separator:
                tokens.append(value)
        flags = EngineFlags(tuple(tokens))
        if tokens and not tokens[0].startswith("-"):
            raise UsageError(
                f"{tokens[0]!r} after -- is no flag; the model is named right after `serve`"
            )
        for name in flags.names():
            _refuse(name, flags.value(name))
        flags.kv_transfer()
        return flags

    def names(self) -> list[str]:
        """Names of the flags, in order."""
        return [token for token in self.tokens if token.startswith("-") and not _is_number(token)]

    def has(self, *names: str) -> bool:
        """Whether one of these flags was given, in its positive or negative form."""
        given = set(self.names())
        return any(name in given or name.replace("--", "--no-", 1) in given for name in names)

    def is_on(self, name: str) -> bool:
        """Whether a switch was given, and its negative form not after it."""
        negative = name.replace("--", "--no-", 1)
        found = [given for given in self.names() if given in (name, negative)]
        return bool(found) and found[-1] == name

    def values(self, name: str) -> list[str]:
        """All values after the last time the flag was given; empty for a switch."""
        found: list[str] = []
        inside = False
        for token in self.tokens:
            if token.startswith("-") and not _is_number(token):
                inside = token == name
                if inside:
                    found = []
            elif inside:
                found.append(token)
        return found

    def value(self, name: str) -> str | None:
        """The last value of a flag, or None."""
        found = self.values(name)
        return found[-1] if found else None

    def number(self, name: str, default: int) -> int:
        """A whole number with vLLM's suffixes (1k, 1K); raises UsageError for anything else."""
        text = self.value(name)
        if text is None:
            return default
        scale = {"k": 1000, "K": 1 << 10, "m": 10**6, "M": 1 << 20, "g": 10**9, "G": 1 << 30}
        try:
            if text[-1:] in scale:
                return int(float(text[:-1]) * scale[text[-1]])
            return int(text)
        except ValueError:
            raise UsageError(f"{name} wants a whole number, not {text!r}") from None

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.number("--tensor-parallel-size", 1) * self.number("--pipeline-parallel-size", 1)

    def kv_transfer(self) -> dict[str, Any] | None:
        """The user's own connector; raises UsageError when it is not a JSON object that names
        one.
        """
        for name in self.names():
            if name.startswith(KV_TRANSFER + "."):
                raise UsageError(
                    f"{name}: give {KV_TRANSFER} as one JSON object, so that ours can be joined"
                )
        text = self.value(KV_TRANSFER)
        if text is None:
            return None
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{KV_TRANSFER} is no JSON: {error}") from None
        if not isinstance(found, dict) or not found.get("kv_connector"):
            raise UsageError(f"{KV_TRANSFER} must be a JSON object with a kv_connector")
        return found

    def generation_defaults(self, generation: Mapping[str, Any]) -> dict[str, Any]:
        """What vLLM fills in for parameters that a client leaves out, from the model's generation
        config and these flags.
        """
        source = self.value("--generation-config")
        if source not in (None, "auto", "vllm"):
            try:
                text = (pathlib.Path(source) / "generation_config.json").read_text("utf-8")
                generation = json.loads(text)
            except (OSError, ValueError) as error:
                raise UsageError(f"--generation-config {source}: {error}") from error
        override = self.value("--override-generation-config")
        try:
            found = {} if override is None else dict(json.loads(override))
        except (ValueError, TypeError):
            raise UsageError("--override-generation-config must be a JSON object") from None
        return dataclasses.asdict(Defaults.of(generation, source=source, override=found))

    def command(self, *, connector: dict[str, Any] | None, processors: Sequence[str]) -> list[str]:
        """The flags with our connector and logits processors joined in."""
        rest: list[str] = []
        inside = False
        for token in self.tokens:
            if token.startswith("-") and not _is_number(token):
                inside = (
                    token == KV_TRANSFER and connector is not None
                ) or token == LOGITS_PROCESSORS
            if not inside:
                rest.append(token)
        if connector is not None:
            rest += [KV_TRANSFER, json.dumps(join_connectors(connector, self.kv_transfer()))]
        wanted = [*processors, *(v for v in self.values(LOGITS_PROCESSORS) if v not in processors)]
        if wanted:
            rest += [LOGITS_PROCESSORS, *wanted]
        return rest


def connector_config(
    *, journal: str, replica: int, device: str, residency: str, executor_ctas: int = 1
) -> dict[str, Any]:
    """What the connector of one replica is told."""
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "journal": journal,
            "replica": replica,
            "device": device,
            "residency": residency,
            "executor_ctas": executor_ctas,
        },
    }


def join_connectors(ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """Both connectors under vLLM's MultiConnector. Ours comes first: the first that has tokens
    loads them.
    """
    if theirs is None:
        return ours
    if theirs["kv_connector"] != "MultiConnector":
        inner, outer = [theirs], {}
    else:
        outer = dict(theirs)
        inner = list(outer.get("kv_connector_extra_config", {}).get("connectors", []))
    return {
        **outer,
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            **outer.get("kv_connector_extra_config", {}),
            "connectors": [ours, *inner],
        },
    }


def _canonical(name: str) -> str:
    if name in _ALIASES:
        return _ALIASES[name]
    if not name.startswith("--"):
        return name
    head, dot, tail = name.partition(".")  # dotted names are JSON keys and keep their underscores
    return head.replace("_", "-") + dot + tail


def _refuse(name: str, value: str | None) -> None:
    for refused, (reason, harmless) in _REFUSED.items():
        is_family = refused.endswith("-") and name.startswith(refused)
        is_short = name != refused and len(name) >= _PREFIX_MIN and refused.startswith(name)
        if name == refused or is_family or is_short:
            if harmless is not None and value == harmless and name == refused:
                return
            raise UsageError(f"{name} cannot be honoured: {reason}")


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True

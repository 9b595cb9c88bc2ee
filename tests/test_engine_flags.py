"""serving/engine_flags.py: what a user may tell vLLM.

Invariants: a flag that cannot be honoured is refused in every spelling that vLLM would take; a user's connector and logits processors are joined
with ours; everything else reaches vLLM as it was given.
"""

from __future__ import annotations

import json
import pathlib

import pytest

from concordia.errors import UsageError
from concordia.integrations.vllm.settings import Settings
from concordia.serving.engine_flags import COUNTER_SAMPLER, EngineFlags, connector_config
from concordia.serving.engine_spec import EngineSpec
from concordia.serving.need import Defaults
from concordia.serving.resources import Share

OURS = connector_config(journal="/j", replica=5, device="auto", residency="leased")


@pytest.mark.parametrize(
    "given",
    [
        ["--data-parallel-size", "2"],
        ["--data-parallel-size=2"],
        ["--data_parallel_size", "2"],
        ["-dp", "2"],
        ["--data-parallel-backend", "ray"],
        ["--data-parallel-si", "2"],
        ["--api-server-count", "2"],
        ["-asc=3"],
        ["--headless"],
        ["--headles"],
        ["--uds", "/x"],
        ["--config", "file.yaml"],
        ["--ssl-keyfile", "k"],
        ["--port", "1"],
        ["--host=0.0.0.0"],
        ["--api-key", "k"],
        ["--served-model-name", "m"],
        ["--model", "m"],
        ["--nnodes", "2"],
        ["--root-path", "/v"],
        ["--enable-elastic-ep"],
        ["another-model"],
        ["--kv-transfer-config", "{"],
        ["--kv-transfer-config", "[]"],
        ["--kv-transfer-config", "{}"],
        ["--kv-transfer-config.kv_connector", "X"],
    ],
    ids=" ".join,
)
def test_flag_is_refused_when_it_cannot_be_honoured(given: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        EngineFlags.parse(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--data-parallel-size", "1"],
        ["--api-server-count=1"],
        ["--max-model-len", "4k"],
        ["--config-format", "hf"],
        ["--model-impl", "vllm"],
        ["-O3"],
        ["--seed", "-1"],
        ["--logits-processors", "a.b:C", "d.e:F"],
        ["--hf-overrides", '{"a": -1}'],
    ],
    ids=" ".join,
)
def test_flag_reaches_vllm_when_it_is_its_own_business(given: list[str]) -> None:
    command = EngineFlags.parse(given).command(connector=None, processors=())
    assert sorted(command) == sorted(part for token in given for part in token.split("=", 1))


@pytest.mark.parametrize(
    ("given", "world"),
    [([], 1), (["-tp", "2"], 2), (["-tp=2", "-pp", "3"], 6), (["--tensor_parallel_size=4"], 4)],
)
def test_ranks_are_counted_when_layers_are_shared(given: list[str], world: int) -> None:
    assert EngineFlags.parse(given).world_size == world


def test_last_value_counts_when_a_flag_is_given_twice() -> None:
    flags = EngineFlags.parse(["--max-model-len", "1k", "--max-model-len", "2K"])
    assert flags.number("--max-model-len", 0) == 2048
    with pytest.raises(UsageError):
        EngineFlags.parse(["--max-model-len", "long"]).number("--max-model-len", 0)


@pytest.mark.parametrize(
    ("theirs", "inner"),
    [
        (None, None),
        (
            {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
            ["ConcordiaConnector", "NixlConnector"],
        ),
        (
            {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "connectors": [{"kv_connector": "A"}, {"kv_connector": "B"}]
                },
            },
            ["ConcordiaConnector", "A", "B"],
        ),
    ],
)
def test_connectors_are_joined_when_the_user_has_one(
    theirs: dict[str, object] | None, inner: list[str] | None
) -> None:
    given = ["--seed", "1"] + (["--kv-transfer-config", json.dumps(theirs)] if theirs else [])
    command = EngineFlags.parse(given).command(connector=OURS, processors=())
    assert command.count("--kv-transfer-config") == 1
    found = json.loads(command[command.index("--kv-transfer-config") + 1])
    if inner is None:
        assert found == OURS
    else:
        assert found["kv_connector"] == "MultiConnector"
        connectors = found["kv_connector_extra_config"]["connectors"]
        assert [c["kv_connector"] for c in connectors] == inner
        assert connectors[0] == OURS
    assert command[:2] == ["--seed", "1"]


def test_logits_processors_are_joined_when_the_user_has_some() -> None:
    flags = EngineFlags.parse(["--logits-processors", "a:B", COUNTER_SAMPLER, "--seed", "3"])
    command = flags.command(connector=None, processors=(COUNTER_SAMPLER,))
    assert command == ["--seed", "3", "--logits-processors", COUNTER_SAMPLER, "a:B"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], {"temperature": 0.6, "max_tokens": 99}),
        (["--generation-config", "vllm"], {}),
        (
            ["--override-generation-config", '{"top_k": 5}'],
            {"temperature": 0.6, "top_k": 5, "max_tokens": 99},
        ),
    ],
)
def test_defaults_follow_the_generation_config_when_a_client_is_silent(
    given: list[str], wanted: dict[str, object]
) -> None:
    generation = {"temperature": 0.6, "max_new_tokens": 99, "eos_token_id": 1}
    found = Defaults(**EngineFlags.parse(given).generation_defaults(generation))
    assert found == Defaults(**wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("residency", ["leased", "resident", "stream", "auto"])
def test_connector_is_told_the_residency_when_one_is_chosen(residency: str, tmp_path: pathlib.Path) -> None:
    spec = EngineSpec("m", EngineFlags(()), tmp_path, "key", journal=tmp_path, residency=residency)
    command = spec.command(port=1, incarnation=7, share=Share({}, ()))
    told = json.loads(command[command.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert Settings.of(told).residency == residency
    assert Settings.of(told).executor_ctas == 1


def test_connector_is_told_the_size_of_its_executor_when_one_is_chosen(tmp_path: pathlib.Path) -> None:
    spec = EngineSpec("m", EngineFlags(()), tmp_path, "key", journal=tmp_path, executor_ctas=4)
    command = spec.command(port=1, incarnation=5, share=Share({}, ()))
    told = json.loads(command[command.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert Settings.of(told).executor_ctas == 4

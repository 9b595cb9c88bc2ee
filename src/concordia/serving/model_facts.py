"""What an engine says of its model.

Owns: the tokens of a context and the engine's fingerprint. Promises: both are asked for once, when
the router starts, of an engine that serves; a later word on the fingerprint counts. Called by the
router. Replicas of one server have one model and one set of flags, so it is the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from concordia.serving.flight import ReplicaLike
from concordia.serving.request import Endpoint
from concordia.serving.upstream import Upstream, json_headers


@dataclass(slots=True)
class ModelFacts:
    """Unknown before `learn`."""

    context_tokens: int = 0
    fingerprint: str | None = None

    async def learn(self, upstream: Upstream, replica: ReplicaLike) -> None:
        """Ask this replica."""
        model = (await upstream.get(f"{replica.base_url}/v1/models"))["data"][0]
        self.context_tokens = int(model["max_model_len"])
        self.fingerprint = await _ask_fingerprint(upstream, replica, model["id"])


async def _ask_fingerprint(upstream: Upstream, replica: ReplicaLike, model: str) -> str | None:
    """An answer that is cut at a stop string ends before vLLM has said its fingerprint, so it is
    asked for once.
    """
    body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}
    body["kv_transfer_params"] = {"concordia": False}
    found = await upstream.post(
        replica.base_url + Endpoint.COMPLETIONS.value, body, headers=json_headers({})
    )
    said = found.get("system_fingerprint")
    return said if isinstance(said, str) else None

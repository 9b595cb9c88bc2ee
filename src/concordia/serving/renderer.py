"""Prompts to token ids, by the engine's own renderer.

Owns: the questions put to vLLM's /tokenize, and their form. Promises: the ids are those that vLLM
itself would use; a replica that fails meanwhile is reported and the question put to another, within
the recovery timeout. Called by the router for each new request that came as text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from concordia import config
from concordia.errors import UpstreamBroken
from concordia.serving.admission import Admission, unavailable
from concordia.serving.flight import ReplicaLike
from concordia.serving.need import Body
from concordia.serving.request import GenerationRequest
from concordia.serving.upstream import Upstream, json_headers

_CHAT_FIELDS: Final = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
)


class Renderer:
    """`report(replica, detail)` is told of every replica that did not answer."""

    def __init__(
        self,
        upstream: Upstream,
        admission: Admission,
        *,
        report: Callable[[ReplicaLike, str], None],
        wait_s: float,
    ) -> None:
        self._upstream = upstream
        self._admission = admission
        self._report = report
        self._wait_s = wait_s

    async def render(
        self, request: GenerationRequest, headers: Mapping[str, str]
    ) -> list[Sequence[int]]:
        """Token ids of every prompt of the request. Raises RequestRefused with vLLM's words."""
        if request.is_chat:
            return [await self._tokenize(chat_body(request.body), headers)]
        found: list[Sequence[int]] = []
        for prompt in request.prompts:
            if not isinstance(prompt, str):
                found.append(prompt)
                continue
            body: dict[str, Any] = {"prompt": prompt}
            for name in ("model", "add_special_tokens"):
                if request.body.get(name) is not None:
                    body[name] = request.body[name]
            found.append(await self._tokenize(body, headers))
        return found

    async def _tokenize(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> list[int]:
        bound = time.monotonic() + self._wait_s
        while True:
            replica = await self._admission.acquire()
            try:
                # A replica that hangs answers nothing: the detector sees that, but this question
                # would wait for ever.
                async with asyncio.timeout(config.RENDER_WAIT_S):
                    with self._admission.passing(replica):
                        found = await self._upstream.post(
                            f"{replica.base_url}/tokenize", body, headers=json_headers(headers)
                        )
                return list(found["tokens"])
            except (UpstreamBroken, TimeoutError) as error:
                if time.monotonic() > bound:
                    raise unavailable("no engine could render the prompt in time") from error
                self._report(replica, f"/tokenize: {error or 'no answer'}")
                await asyncio.sleep(config.RENDER_RETRY_S)


def chat_body(chat: Body) -> dict[str, Any]:
    """The body of the `/tokenize` that renders a chat's prompt as vLLM's own chat endpoint
    would.
    """
    found = {name: chat[name] for name in _CHAT_FIELDS if chat.get(name) is not None}
    effort = chat.get("reasoning_effort")
    extra = {"documents": chat.get("documents"), "reasoning_effort": effort}
    kwargs = dict(found.get("chat_template_kwargs", {}))
    kwargs.update({name: value for name, value in extra.items() if value is not None})
    if effort is not None:
        kwargs.setdefault("enable_thinking", effort != "none")
    if kwargs:
        found["chat_template_kwargs"] = kwargs
    if "model" in chat:
        found["model"] = chat["model"]
    return found

"""The OpenAI wire format, as vLLM writes it.

Owns: every byte of an answer that a client reads: stream events, whole responses, errors. Promises:
fields, their order and their nulls are those of vLLM's own server, so a client cannot tell the
router from the engine; what never changes within a stream is serialised once. Called by the
router's generations and the server. Does not decide what is sent, only how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from concordia.errors import RequestRefused
from concordia.serving.piece import Piece, TokenLogprobs
from concordia.serving.request import GenerationRequest
from concordia.serving.tokenizer import Tokenizer

DONE: Final = b"data: [DONE]\n\n"

class AnswerView(Protocol):
    """What a writer looks up of an answer in the making."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def ids(self) -> Sequence[int]: ...


@dataclass(slots=True)
class Usage:
    """Token counts of a request; `details` is what vLLM says about cached tokens, if it was told
    to.
    """

    prompt: int = 0
    completion: int = 0
    details: Mapping[str, Any] | None = None

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
        }
        if self.details is not None:
            found["prompt_tokens_details"] = self.details
        return found


@dataclass(slots=True)
class Writer:
    """Writes one request's answer; `model` and `fingerprint` are known once the engine has
    spoken.
    """

    request: GenerationRequest
    tokenizer: Tokenizer
    id: str
    created: int
    model: str = ""
    fingerprint: str | None = None
    _head: str = ""
    _offsets: dict[int, int] = field(default_factory=dict)

    def begin(self, model: str) -> None:
        """Fix what every event of this stream has in common."""
        self.model = model
        kind = "chat.completion.chunk" if self.request.is_chat else "text_completion"
        self._head = (
            f'data: {{"id":{_text(self.id)},"object":"{kind}","created":{self.created},'
            f'"model":{_text(model)},"choices":['
        )

    def opening(self, view: AnswerView, index: int) -> bytes:
        """The role event of a chat; nothing for a completion."""
        if not self.request.is_chat:
            return b""
        usage = self._running_usage(len(view.prompt), 0)
        ids = _compact(list(view.prompt)) if self.request.returns_ids else "null"
        return (
            f'{self._head}{{"index":{index},'
            f'"delta":{{"role":{_text(self.request.role)},"content":""}},'
            f'"logprobs":null,"finish_reason":null}}]{usage},'
            f'"prompt_token_ids":{ids},"prompt_text":null}}\n\n'
        ).encode()

    def event(self, view: AnswerView, piece: Piece) -> bytes:
        """One stream event."""
        request = self.request
        logprobs = "null"
        if piece.logprobs is not None:
            logprobs = _compact(self._logprobs(view, piece))
        finish = "null" if piece.finish_reason is None else _text(piece.finish_reason)
        ids = _compact(list(piece.ids)) if request.returns_ids else "null"
        if request.is_chat:
            stop = ""
            if piece.finish_reason is not None:
                stop = f',"stop_reason":{_compact(piece.stop_reason)}'
            choice = (
                f'"delta":{{"content":{_text(piece.text)}}},"logprobs":{logprobs},'
                f'"finish_reason":{finish}{stop},"token_ids":{ids}'
            )
        else:
            prompt = "null"
            if piece.is_first and request.returns_ids:
                prompt = _compact(list(view.prompt))
            choice = (
                f'"text":{_text(piece.text)},"logprobs":{logprobs},"finish_reason":{finish},'
                f'"stop_reason":{_compact(piece.stop_reason)},'
                f'"prompt_token_ids":{prompt},"token_ids":{ids}'
            )
        tail = ""
        if request.has_continuous_usage:
            tail = self._running_usage(len(view.prompt), piece.start + len(piece.ids))
        if piece.finish_reason is not None and not request.has_usage and self.fingerprint:
            tail += f',"system_fingerprint":{_text(self.fingerprint)}'
        return f'{self._head}{{"index":{piece.index},{choice}}}]{tail}}}\n\n'.encode()

    def closing(self, usage: Usage, report: Mapping[str, Any] | None) -> bytes:
        """The usage event, if the client wants one, or an event for the report alone."""
        tail = ""
        if self.request.has_usage:
            tail += f',"usage":{_compact(usage.body())}'
            if self.fingerprint is not None:
                tail += f',"system_fingerprint":{_text(self.fingerprint)}'
        if report is not None:
            tail += f',"concordia":{_compact(report)}'
        return f"{self._head}]{tail}}}\n\n".encode() if tail else b""

    def whole(
        self,
        answers: Sequence[tuple[AnswerView, Piece]],
        usage: Usage,
        report: Mapping[str, Any] | None,
    ) -> bytes:
        """The response to a request that did not ask for a stream."""
        is_chat = self.request.is_chat
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(view, piece) for view, piece in answers],
            "service_tier": None,
            "system_fingerprint": self.fingerprint,
            "usage": {
                **usage.body(),
                "prompt_tokens_details": usage.details,
                "completion_tokens_details": None,
            },
        }
        if is_chat:
            ids = list(answers[0][0].prompt) if self.request.returns_ids else None
            body |= {"prompt_logprobs": None, "prompt_token_ids": ids, "prompt_text": None}
        body |= {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
        if report is not None:
            body["concordia"] = report
        return _compact(body).encode()

    def _choice(self, view: AnswerView, piece: Piece) -> dict[str, Any]:
        logprobs = None if piece.logprobs is None else self._logprobs(view, piece)
        ids = list(piece.ids) if self.request.returns_ids else None
        if self.request.is_chat:
            return {
                "index": piece.index,
                "message": {
                    "role": self.request.role,
                    "content": piece.text,
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "reasoning": None,
                },
                "logprobs": logprobs,
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
                "token_ids": ids,
                "routed_experts": None,
            }
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "token_ids": ids,
            "prompt_logprobs": None,
            "prompt_token_ids": list(view.prompt) if self.request.returns_ids else None,
            "routed_experts": None,
        }

    def _running_usage(self, prompt: int, completion: int) -> str:
        if not self.request.has_continuous_usage:
            return ""
        body = Usage(prompt, completion).body()
        if self.request.is_chat:
            body["completion_tokens_details"] = None  # vLLM leaves it out of the last usage only
        return f',"usage":{_compact(body)}'

    def _logprobs(self, view: AnswerView, piece: Piece) -> dict[str, Any]:
        assert piece.logprobs is not None
        if self.request.is_chat:
            return {"content": [self._chat_entry(*row) for row in _rows(view, piece)]}
        tokens: list[str] = []
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        at = self._offsets.get(piece.index, 0)
        for token, before, (logprob, alternatives) in _rows(view, piece):
            shown = self._shown(token, before)
            tokens.append(shown)
            offsets.append(at)
            at += len(shown)
            top = {self._shown(other, before): value for other, value in alternatives}
            tops.append(None if logprob is None else top)
        self._offsets[piece.index] = at
        return {
            "text_offset": offsets,
            "token_logprobs": [logprob for logprob, _ in piece.logprobs],
            "tokens": tokens,
            "top_logprobs": tops,
        }

    def _chat_entry(
        self, token: int, before: Sequence[int], found: TokenLogprobs
    ) -> dict[str, Any]:
        logprob, alternatives = found
        count = len(alternatives) if self.request.has_all_logprobs else self.request.logprobs or 0
        tops = []
        for other, value in alternatives[:count]:
            shown = self._shown(other, before)
            tops.append({"token": shown, "logprob": value, "bytes": list(shown.encode())})
        return {
            "token": self._shown(token, before),
            "logprob": -9999.0 if logprob is None else logprob,
            "bytes": list(self.tokenizer.name(token, before).encode()),
            "top_logprobs": tops,
        }

    def _shown(self, token: int, before: Sequence[int]) -> str:
        if self.request.names_by_id:
            return f"token_id:{token}"
        return self.tokenizer.name(token, before)


def error_body(error: RequestRefused) -> bytes:
    """An OpenAI error object."""
    return _compact(
        {
            "error": {
                "message": str(error),
                "type": error.kind,
                "param": error.param,
                "code": error.status,
            }
        }
    ).encode()


def error_event(error: RequestRefused) -> bytes:
    """The one error event that may end a stream."""
    return b"data: " + error_body(error) + b"\n\n"


def _rows(view: AnswerView, piece: Piece) -> list[tuple[int, Sequence[int], TokenLogprobs]]:
    assert piece.logprobs is not None
    found = []
    for offset, (token, row) in enumerate(zip(piece.ids, piece.logprobs, strict=True)):
        at = piece.start + offset
        found.append((token, view.ids[max(0, at - 4) : at], row))
    return found


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

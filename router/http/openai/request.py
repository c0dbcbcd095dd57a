"""From OpenAI's fields to Baton's request, and from the paths of its problems back to OpenAI's. Pure."""

import re
from typing import Any

from baton.errors import FieldViolation, InvalidRequestError
from baton.v1 import common_pb2, inference_pb2
from router.http.openai.fields import (
    ChatRequest,
    Common,
    CompletionRequest,
    Content,
)

COMPLETION_TOKENS = 16
"""What OpenAI's clients of completions expect where they say nothing. Chats end where the model does."""
MAX_PROMPTS = 64
_TOKEN_ID = re.compile("[0-9]{1,10}")
_SAME = (
    *("min_tokens", "temperature", "top_p", "min_p", "n", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""Fields that are called alike, and may be left out on both sides."""
_WHOLE = ("model", "priority", "ttft_slo_seconds", "cache_salt", "session_id")


def completion_requests(
    body: CompletionRequest, request_id: str
) -> list[inference_pb2.GenerateRequest]:
    """One for each prompt. Raises `InvalidRequestError`."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise _invalid("best_of", "is supported only where it is n")
    limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = _sampling(body, limit)
    if body.logprobs is not None:
        sampling.logprobs = body.logprobs
    prompts = _prompts(body)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise _invalid("prompt", f"must be 1 to {MAX_PROMPTS} prompts")
    if len(prompts) > 1 and body.session_id:
        raise _invalid("prompt", "must be one in a session")
    return [
        _request(body, sampling, f"{request_id}-{number}" if number else request_id, prompt)
        for number, prompt in enumerate(prompts)
    ]


def chat_requests(body: ChatRequest, request_id: str) -> list[inference_pb2.GenerateRequest]:
    """Always one. Raises `InvalidRequestError`."""
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise _invalid("max_tokens", "is not max_completion_tokens: say one of them")
    sampling = _sampling(body, limits.pop() if limits else None)
    if body.logprobs:
        sampling.logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise _invalid("top_logprobs", "needs logprobs")
    said = [
        inference_pb2.ChatMessage(
            # A model's template knows the older name only.
            role="system" if message.role == "developer" else message.role,
            content=_text(message.content),
        )
        for message in body.messages
    ]
    prompt = {"chat": inference_pb2.Chat(messages=said)}
    return [_request(body, sampling, request_id, prompt)]


def translated(error: InvalidRequestError) -> InvalidRequestError:
    """The same problems, by OpenAI's names."""
    return InvalidRequestError(
        *(FieldViolation(_renamed(each.field), each.description) for each in error.violations)
    )


def _renamed(field: str) -> str:
    if field.startswith("prompt.chat"):
        return field.removeprefix("prompt.chat").removeprefix(".") or "messages"
    if field.startswith("prompt"):
        return "prompt"
    if field == "request_id":
        # Only what a client gives can be wrong.
        return "idempotency-key"
    return field.removeprefix("sampling.")


def _sampling(body: Common, max_tokens: int | None) -> common_pb2.SamplingParams:
    given = {name: getattr(body, name) for name in _SAME}
    sampling = common_pb2.SamplingParams(
        **{name: value for name, value in given.items() if value is not None}
    )
    if max_tokens is not None:
        sampling.max_tokens = max_tokens
    if body.top_k is not None:
        sampling.top_k = 0 if body.top_k == -1 else body.top_k
    if body.seed is not None:
        sampling.seed = body.seed % 2**64
    for token_id, bias in (body.logit_bias or {}).items():
        if not _TOKEN_ID.fullmatch(token_id) or int(token_id) >= 2**32:
            raise _invalid("logit_bias", "must be by token id")
        sampling.logit_bias[int(token_id)] = bias
    sampling.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop or ())
    sampling.stop_token_ids.extend(body.stop_token_ids or ())
    return sampling


def _request(
    body: Common,
    sampling: common_pb2.SamplingParams,
    request_id: str,
    prompt: dict[str, Any],
) -> inference_pb2.GenerateRequest:
    given = {name: getattr(body, name) for name in _WHOLE}
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        sampling=sampling,
        **prompt,
        **{name: value for name, value in given.items() if value is not None},
    )


def _prompts(body: CompletionRequest) -> list[dict[str, Any]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [{"text": prompt}]
    if prompt and isinstance(prompt[0], int):
        return [_tokens(prompt)]
    return [{"text": each} if isinstance(each, str) else _tokens(each) for each in prompt]


def _tokens(ids: Any) -> dict[str, Any]:
    return {"tokens": common_pb2.TokenIds(ids=ids)}


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content)


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(field, description))

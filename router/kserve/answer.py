"""What the core writes for one request, as `ModelInferResponse`s: one with everything, or one for each piece and a last one.

Used by the request's own task on the router's event loop.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from baton.v1 import common_pb2
from baton.v1 import inference_pb2 as pb
from router.kserve.request import VERSION, Asked
from router.kserve.tensors import add_bytes, add_numbers
from router.kserve.v2 import inference_pb2 as kserve

Send = Callable[[kserve.ModelInferResponse], Awaitable[None]]
TokenText = Callable[[int], str]

LEAST = -9999.0
"""JSON has no infinity."""
FINAL = "triton_final_response"
_REASONS = {
    common_pb2.FINISH_REASON_UNSPECIFIED: "None",
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}
"""A completion that goes on has a reason too, which is how Triton's vLLM backend writes that it has none."""


class _Completion:
    """What has come of one of the request's completions since the last answer."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.logprobs: list[common_pb2.PositionLogprobs] = []
        self.tokens = 0
        self.cumulative_logprob = 0.0
        """Since its beginning."""
        self.reason = common_pb2.FINISH_REASON_UNSPECIFIED

    def add(self, chunk: pb.Chunk) -> None:
        self.text.append(chunk.text)
        self.tokens += len(chunk.tokens.token_ids)
        self.logprobs.extend(chunk.tokens.logprobs)
        self.cumulative_logprob += sum(each.chosen.logprob for each in chunk.tokens.logprobs)

    def clear(self) -> None:
        self.text.clear()
        self.logprobs.clear()
        self.tokens = 0


class AnswerWriter:
    """An `AnswerStream` of the core's; see the module docstring."""

    def __init__(self, asked: Asked, send: Send, token_text: TokenText) -> None:
        """`token_text` is a token's text by itself."""
        self._asked = asked
        self._send = send
        self._token_text = token_text
        self._accepted = pb.Accepted()
        self._completions: list[_Completion] = []

    async def write(self, response: pb.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "accepted":
                # Now, and not before, the number of completions is known to be a reasonable one.
                self._completions = [
                    _Completion() for _ in range(max(1, self._asked.generate.sampling.n))
                ]
                self._accepted = response.accepted
            case "chunk":
                self._completions[response.chunk.choice].add(response.chunk)
                if self._asked.streams:
                    await self._send(self._taken(final=False))
            case "finished":
                for end in response.finished.choices:
                    self._completions[end.choice].reason = end.reason
                await self._send(self._taken(final=True))

    def _taken(self, *, final: bool) -> kserve.ModelInferResponse:
        """What has come since the last time."""
        response = kserve.ModelInferResponse(
            model_name=self._accepted.model, model_version=VERSION, id=self._asked.id
        )
        response.parameters[FINAL].bool_param = final
        outputs, completions = self._asked.outputs, self._completions
        if "text_output" in outputs:
            texts = [(self._asked.prompt + "".join(each.text)).encode() for each in completions]
            add_bytes(response, "text_output", texts)
        if "finish_reason" in outputs:
            reasons = [_REASONS[each.reason].encode() for each in completions]
            add_bytes(response, "finish_reason", reasons)
        if "cumulative_logprob" in outputs:
            sums = [each.cumulative_logprob for each in completions]
            add_numbers(response, "cumulative_logprob", "FP32", sums)
        if "logprobs" in outputs:
            lists = [[self._position(each) for each in one.logprobs] for one in completions]
            add_bytes(response, "logprobs", [json.dumps(each).encode() for each in lists])
        if "num_input_tokens" in outputs:
            prompt_tokens = self._accepted.prompt_tokens
            add_numbers(response, "num_input_tokens", "UINT32", [prompt_tokens])
        if "num_output_tokens" in outputs:
            counts = [each.tokens for each in completions]
            add_numbers(response, "num_output_tokens", "UINT32", counts)
        for each in completions:
            each.clear()
        return response

    def _position(self, logprobs: common_pb2.PositionLogprobs) -> dict[str, dict[str, Any]]:
        """By token id, as vLLM tells it: the chosen token, and the most likely ones. The rank of a chosen token beyond those is unknown."""
        ranks = {each.token_id: rank for rank, each in enumerate(logprobs.top, 1)}
        return {
            str(each.token_id): {
                "logprob": max(each.logprob, LEAST),
                "rank": ranks.get(each.token_id),
                "decoded_token": self._token_text(each.token_id),
            }
            for each in (logprobs.chosen, *logprobs.top)
        }

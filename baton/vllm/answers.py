"""What a `Generate` call answers: each choice's tokens as they come, where they are streamed, and its last message. Pure bookkeeping of
one call.
"""

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from baton.types import FinishReason, PositionLogprobs, TokenChunk
from baton.vllm.handoff import HandedOver, to_json
from baton.vllm.legs import ForeignRequest
from baton.vllm.text import StopFinder, WorkerText

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
ABORTED = "abort"


class ChoiceAnswer:
    """One choice's output."""

    def __init__(
        self, request: ForeignRequest, choice: int, text: WorkerText | None, *, stream: bool
    ) -> None:
        """Precondition: no stop strings without `text`."""
        self._request = request
        self._choice = choice
        self._stream = stream
        self._ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._cached_tokens = 0
        self._handed: HandedOver | None = None
        self._stop: str | None = None
        """The stop string that ended it."""
        params = request.sampling
        self._finder = (
            StopFinder(text, params.stop, params.min_tokens) if text and params.stop else None
        )
        self.ended = False
        """Whether the last message was made."""

    def saw_cached(self, tokens: int) -> None:
        """Of the prompt, in a prefix cache."""
        self._cached_tokens = max(self._cached_tokens, tokens)

    def hold(self, handed: HandedOver) -> None:
        """The last message tells the router where the KV is."""
        self._handed = handed

    def add(self, chunk: TokenChunk) -> list[pb.GenerateResponse]:
        """The messages that new tokens make: none where nothing is streamed, and the last one where they complete a stop string."""
        assert chunk.first_index == len(self._ids), chunk
        count = self._until_stop(chunk.token_ids)
        self._ids += chunk.token_ids[:count]
        logprobs = chunk.logprobs[:count]
        self._logprobs += logprobs
        messages = []
        if self._stream:
            delta = pb.GenerateStreamChunk(
                token_ids=chunk.token_ids[:count],
                prompt_tokens=len(self._request.prompt),
                completion_tokens=len(self._ids),
                cached_tokens=self._cached_tokens,
                output_logprobs=_logprobs(logprobs),
                index=self._choice,
            )
            messages.append(pb.GenerateResponse(chunk=delta))
        if self._stop is not None:
            messages.append(self.finish("stop"))
        return messages

    def finished(self, reason: FinishReason) -> list[pb.GenerateResponse]:
        """The last message, unless a stop string has ended the output."""
        return [] if self.ended else [self.finish(_REASONS[reason])]

    def finish(self, reason: str) -> pb.GenerateResponse:
        """The last message."""
        self.ended = True
        complete = pb.GenerateComplete(
            output_ids=self._ids,
            finish_reason=reason,
            prompt_tokens=len(self._request.prompt),
            completion_tokens=len(self._ids),
            cached_tokens=self._cached_tokens,
            output_logprobs=_logprobs(self._logprobs),
            index=self._choice,
        )
        if self._stop is not None:
            complete.matched_stop_str = self._stop
        elif reason == "stop" and self._ids[-1] in self._request.sampling.stop_token_ids:
            complete.matched_token_id = self._ids[-1]
        if self._handed is not None:
            complete.kv_transfer_params_json = to_json(self._handed)
        return pb.GenerateResponse(complete=complete)

    def _until_stop(self, token_ids: tuple[int, ...]) -> int:
        """How many of the tokens belong to the output."""
        if self._finder is None:
            return len(token_ids)
        for count, token_id in enumerate(token_ids, start=1):
            self._stop = self._finder.push(token_id)
            if self._stop is not None:
                return count
        return len(token_ids)


def _logprobs(
    positions: "list[PositionLogprobs] | tuple[PositionLogprobs, ...]",
) -> pb.OutputLogProbs | None:
    """None where they were not asked for."""
    if not positions:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[each.chosen.logprob for each in positions],
        token_ids=[each.chosen.token_id for each in positions],
        top_logprobs=[
            pb.TopLogProbs(
                values=[one.logprob for one in each.top],
                token_ids=[one.token_id for one in each.top],
            )
            for each in positions
        ],
    )

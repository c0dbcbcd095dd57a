"""The messages that a client gets. Stateless; used on the router's event loop.

A message that is given to another one's constructor is copied: what is sent often, or is large, is filled in place.
"""

from baton import codec
from baton.lifecycle import Event, Timeline
from baton.types import FinishReason
from baton.v1 import inference_pb2 as pb
from router.account import Account
from router.outcome import AttemptStats
from router.output import Output, Piece
from router.validation import ModelFacts, ValidRequest


def accepted(valid: ValidRequest, facts: ModelFacts) -> pb.GenerateResponse:
    """The first message."""
    return pb.GenerateResponse(
        accepted=pb.Accepted(
            request_id=valid.request_id,
            model=facts.model,
            prompt_tokens=len(valid.prompt),
            seed=valid.sampling.seed,
        )
    )


def chunk(piece: Piece) -> pb.GenerateResponse:
    """New output."""
    response = pb.GenerateResponse()
    message = response.chunk
    message.text = piece.text
    message.choice = piece.choice
    if piece.tokens is not None:
        codec.fill_chunk(message.tokens, piece.tokens)
    return response


def finished(account: Account) -> pb.GenerateResponse:
    """The client's last message. Precondition: the answer is complete."""
    assert account.answer is not None
    ends = [
        _choice_end(choice, reason, output)
        for choice, (reason, output) in enumerate(
            zip(account.answer.reasons, account.answer.outputs, strict=True)
        )
    ]
    message = pb.Finished(
        reason=ends[0].reason,
        choices=ends,
        usage=pb.Usage(
            prompt_tokens=account.prompt_tokens,
            cached_tokens=account.cached_tokens,
            completion_tokens=account.completion_tokens,
        ),
        timings=_timings(account.timeline, account.answer.generations[0].stats),
        attempts=[
            pb.AttemptReport(
                prefill_worker=report.prefill_worker,
                decode_worker=report.decode_worker,
                failure=report.failure,
                resumed_tokens=report.resumed_tokens,
            )
            for generation in account.answer.generations
            for report in generation.reports
        ],
    )
    if account.turn is not None:
        message.session.session_id = account.turn.key.session_id
        message.session.turn = account.turn.number
    match ends[0].WhichOneof("stop_match"):
        case "stop_string":
            message.stop_string = ends[0].stop_string
        case "stop_token_id":
            message.stop_token_id = ends[0].stop_token_id
    return pb.GenerateResponse(finished=message)


def _choice_end(choice: int, reason: FinishReason, output: Output) -> pb.ChoiceEnd:
    end = pb.ChoiceEnd(choice=choice, reason=codec.finish_reason_to_proto(reason))
    if output.stop is not None:
        end.stop_string = output.stop
    elif output.stop_token_id is not None:
        end.stop_token_id = output.stop_token_id
    return end


def _timings(timeline: Timeline, stats: AttemptStats) -> pb.Timings:
    def at_s(event: Event) -> float:
        return timeline.at_s(event) or 0.0

    return pb.Timings(
        admitted_at_seconds=at_s(Event.ADMITTED),
        placed_at_seconds=at_s(Event.PLACED),
        reserved_at_seconds=at_s(Event.RESERVED),
        prefill_started_at_seconds=at_s(Event.PREFILL_STARTED),
        first_token_at_seconds=at_s(Event.FIRST_TOKEN),
        kv_received_at_seconds=at_s(Event.KV_RECEIVED),
        last_token_at_seconds=at_s(Event.LAST_TOKEN),
        finished_at_seconds=at_s(Event.FINISHED),
        prefill_queue_seconds=stats.prefill_queue_s,
        prefill_seconds=stats.prefill_s,
        handoff_seconds=stats.handoff_s,
        handoff_bytes=stats.handoff_bytes,
        preemptions=stats.preemptions,
    )

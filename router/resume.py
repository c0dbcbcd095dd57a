"""What to do for a client that attaches, given what workers hold of its request; and for one that asks again for a session's turn that
the session has. Pure.
"""

from collections.abc import Mapping
from dataclasses import replace

from baton.errors import FieldViolation, InvalidRequestError
from baton.types import RequestId
from baton.v1 import inference_pb2 as pb
from router.answer import Known, Resumption
from router.attach import HeldAttempt
from router.generation import Complete
from router.sessions.turn import Turn
from router.validation import ValidRequest


def resume(
    request: pb.AttachRequest, held: Mapping[int, HeldAttempt]
) -> tuple[ValidRequest, Resumption]:
    """The request as it was first made, and where to go on. Precondition: something is held. Raises `InvalidRequestError` for
    positions that the request cannot have.
    """
    some = next(iter(held.values()))
    record, sequence = some.record, some.sequence
    if len(request.positions) > record.n:
        problem = f"has more entries than the request's {record.n} completions"
        raise InvalidRequestError(FieldViolation("positions", problem))
    valid = ValidRequest(
        request_id=RequestId(record.request_id),
        prompt=sequence.prompt,
        sampling=replace(sequence.sampling, choice=0, stop=record.stop, n=record.n),
        tenant=record.tenant,
        cache_salt=sequence.cache_salt,
        turn=record.turn,
    )
    known = [Known(each.next_index, each.text_characters) for each in request.positions]
    usable = {
        choice: each
        for choice, each in held.items()
        if not _lacks_logprobs(each, known[choice] if choice < len(known) else Known())
    }
    return valid, Resumption(usable, known, record.deadline_unix_s)


def repeat(request: pb.GenerateRequest, turn: Turn) -> tuple[pb.GenerateRequest, Resumption]:
    """The request with its whole prompt and its seed, and its answer. Precondition: the turn is past."""
    session, answered = turn.session, turn.history.answered
    assert answered is not None
    whole = pb.GenerateRequest()
    whole.CopyFrom(request)
    whole.tokens.ids[:] = turn.history.last_prompt
    whole.sampling.seed = answered.seed
    complete = Complete(
        tokens=answered.tokens,
        reason=answered.reason,
        cached_tokens=session.last_cached_tokens,
        prefill_worker=session.prefill_worker,
        decode_worker=session.decode_worker,
    )
    return whole, Resumption({}, (), complete=complete)


def _lacks_logprobs(held: HeldAttempt, known: Known) -> bool:
    """An attempt knows the log-probabilities of its own tokens only; those of attempts before it, it is generated anew for: a client may
    lack them, and a session's turn keeps all.
    """
    wanted = held.sequence.sampling.logprobs is not None
    needed_from = 0 if held.record.turn is not None else known.tokens
    return wanted and needed_from < len(held.sequence.generated)

"""Protobuf <-> domain types: the one module that sees both. Stateless; called by the router, the workers and the client.

`x_to_proto` is total over the domain type. `x_from_proto` is total over well-formed messages of this API; a message that no
peer of this version sends raises `InvalidRequestError` with the field's path, so that a stranger's call gets a reply.
"""
# ruff: noqa: D103 - the names follow one scheme and say it all

from collections.abc import Sequence as Seq
from dataclasses import replace

from baton.engine.base import Token
from baton.errors import FieldViolation, InvalidRequestError
from baton.kv.spec import KVDtype, KVSpec, WeightFormat
from baton.types import (
    AttemptKey,
    BlockHash,
    FinishReason,
    PositionLogprobs,
    PrefixDelta,
    RequestId,
    RequestRecord,
    Role,
    SamplingParams,
    Sequence,
    TokenChunk,
    TokenLogprob,
    TurnRecord,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
)
from baton.v1 import common_pb2 as pb
from baton.v1 import fleet_pb2

_ROLES = {
    Role.PREFILL: pb.WORKER_ROLE_PREFILL,
    Role.DECODE: pb.WORKER_ROLE_DECODE,
}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}
_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_BACK = {number: reason for reason, number in _FINISH.items()}
_DTYPES = {dtype.value: dtype for dtype in KVDtype}
_WEIGHTS = {weights.value: weights for weights in WeightFormat}


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(field, description))


def key_to_proto(key: AttemptKey) -> pb.AttemptKey:
    return pb.AttemptKey(request_id=key.request_id, attempt=key.attempt)


def key_from_proto(message: pb.AttemptKey) -> AttemptKey:
    if not message.request_id:
        raise _invalid("key.request_id", "must not be empty")
    return AttemptKey(RequestId(message.request_id), message.attempt)


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        seed=params.seed,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        n=params.n,
    )


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """Resolved parameters, as the router sends them to workers."""
    for field in ("max_tokens", "seed"):
        if not message.HasField(field):
            raise _invalid(f"sequence.sampling.{field}", "must be set between services")
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        seed=message.seed,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        n=max(1, message.n),
    )


def sequence_to_proto(sequence: Sequence) -> pb.Sequence:
    """Without stop strings and n, which are the router's business."""
    sampling = sampling_to_proto(sequence.sampling)
    sampling.ClearField("stop")
    sampling.ClearField("n")
    return pb.Sequence(
        prompt=sequence.prompt,
        generated=sequence.generated,
        sampling=sampling,
        choice=sequence.sampling.choice,
        cache_salt=sequence.cache_salt,
    )


def sequence_from_proto(message: pb.Sequence) -> Sequence:
    if not message.prompt:
        raise _invalid("sequence.prompt", "must not be empty")
    return Sequence(
        prompt=tuple(message.prompt),
        generated=tuple(message.generated),
        sampling=replace(sampling_from_proto(message.sampling), choice=message.choice),
        cache_salt=message.cache_salt,
    )


def record_to_proto(record: RequestRecord) -> pb.RequestRecord:
    turn = record.turn
    return pb.RequestRecord(
        turn=None if turn is None else _turn_to_proto(turn),
        request_id=record.request_id,
        tenant=record.tenant,
        stop=record.stop,
        n=record.n,
        deadline_unix_seconds=record.deadline_unix_s,
    )


def record_from_proto(message: pb.RequestRecord) -> RequestRecord:
    return RequestRecord(
        request_id=message.request_id,
        tenant=message.tenant,
        stop=tuple(message.stop),
        n=max(1, message.n),
        deadline_unix_s=message.deadline_unix_seconds,
        turn=_turn_from_proto(message.turn) if message.HasField("turn") else None,
    )


def _turn_to_proto(turn: TurnRecord) -> pb.TurnRecord:
    return pb.TurnRecord(
        session_id=turn.session_id,
        lease_id=turn.lease_id,
        said=[pb.TurnRecord.Said(role=role, content=content) for role, content in turn.said],
    )


def _turn_from_proto(message: pb.TurnRecord) -> TurnRecord:
    said = tuple((each.role, each.content) for each in message.said)
    return TurnRecord(message.session_id, message.lease_id, said)


def finish_reason_to_proto(reason: FinishReason) -> pb.FinishReason:
    return _FINISH[reason]


def finish_reason_from_proto(reason: pb.FinishReason) -> FinishReason | None:
    """None where unspecified: the request goes on."""
    if reason == pb.FINISH_REASON_UNSPECIFIED:
        return None
    if reason not in _FINISH_BACK:
        raise _invalid("finish_reason", f"unknown value {int(reason)}")
    return _FINISH_BACK[reason]


def logprobs_to_proto(logprobs: PositionLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        chosen=pb.TokenLogprob(token_id=logprobs.chosen.token_id, logprob=logprobs.chosen.logprob),
        top=[pb.TokenLogprob(token_id=t.token_id, logprob=t.logprob) for t in logprobs.top],
    )


def logprobs_from_proto(message: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        chosen=TokenLogprob(message.chosen.token_id, message.chosen.logprob),
        top=tuple(TokenLogprob(t.token_id, t.logprob) for t in message.top),
    )


def chunk_of_tokens(tokens: Seq[Token]) -> TokenChunk:
    """Joins an engine's tokens. Precondition: at least one, consecutive."""
    first = tokens[0].index
    assert [t.index for t in tokens] == list(range(first, first + len(tokens)))
    return TokenChunk(
        first_index=first,
        token_ids=tuple(t.token_id for t in tokens),
        logprobs=tuple(t.logprobs for t in tokens if t.logprobs is not None),
    )


def chunk_to_proto(chunk: TokenChunk) -> pb.TokenChunk:
    message = pb.TokenChunk()
    fill_chunk(message, chunk)
    return message


def fill_chunk(message: pb.TokenChunk, chunk: TokenChunk) -> None:
    """What `chunk_to_proto` gives, in a message that is part of another one. Precondition: it is empty."""
    message.first_index = chunk.first_index
    message.token_ids.extend(chunk.token_ids)
    if chunk.logprobs:
        message.logprobs.extend(logprobs_to_proto(p) for p in chunk.logprobs)


def chunk_from_proto(message: pb.TokenChunk) -> TokenChunk:
    token_ids, logprobs = tuple(message.token_ids), message.logprobs
    if not logprobs:
        return TokenChunk(message.first_index, token_ids)
    if len(logprobs) != len(token_ids):
        raise _invalid("tokens.logprobs", "must be empty or as long as token_ids")
    return TokenChunk(
        message.first_index, token_ids, tuple(logprobs_from_proto(p) for p in logprobs)
    )


def spec_to_proto(spec: KVSpec) -> pb.KvSpec:
    return pb.KvSpec(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype.value,
        position_scheme=spec.position_scheme,
        model_fingerprint=spec.model_fingerprint,
        digest=spec.digest,
        weights="" if spec.weights is None else spec.weights.value,
    )


def spec_from_proto(message: pb.KvSpec) -> KVSpec:
    if message.dtype not in _DTYPES:
        raise _invalid("kv_spec.dtype", f"unknown dtype {message.dtype!r}")
    spec = KVSpec(
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        dtype=_DTYPES[message.dtype],
        position_scheme=message.position_scheme,
        model_fingerprint=message.model_fingerprint,
        weights=_weights(message.weights, "kv_spec.weights"),
    )
    if message.digest != spec.digest:
        raise _invalid("kv_spec.digest", f"is {message.digest!r}, the fields give {spec.digest!r}")
    return spec


def _weights(name: str, field: str) -> WeightFormat | None:
    if name and name not in _WEIGHTS:
        raise _invalid(field, f"unknown weight format {name!r}")
    return _WEIGHTS[name] if name else None


def role_to_proto(role: Role) -> pb.WorkerRole:
    return _ROLES[role]


def role_from_proto(number: pb.WorkerRole, field: str) -> Role:
    if number not in _ROLES_BACK:
        raise _invalid(field, f"unknown value {int(number)}")
    return _ROLES_BACK[number]


def worker_info_to_proto(info: WorkerInfo) -> pb.WorkerInfo:
    return pb.WorkerInfo(
        worker_id=info.worker_id,
        role=_ROLES[info.role],
        address=info.address,
        transfer_address=info.transfer_address,
        model=info.model,
        kv_spec=spec_to_proto(info.spec),
        vocab_size=info.vocab_size,
        max_context_tokens=info.max_context_tokens,
        eos_token_ids=info.eos_token_ids,
        block_size_tokens=info.block_size_tokens,
        num_blocks=info.num_blocks,
        node=info.node,
        pid=info.pid,
        metrics_address=info.metrics_address,
        device=info.device,
        version=info.version,
        can_be=[_ROLES[role] for role in info.can_be],
        weights="" if info.weights is None else info.weights.value,
    )


def worker_info_from_proto(message: pb.WorkerInfo) -> WorkerInfo:
    if not message.worker_id:
        raise _invalid("info.worker_id", "must not be empty")
    if not message.address:
        raise _invalid("info.address", "must not be empty")
    sizes = {
        "vocab_size": message.vocab_size,
        "max_context_tokens": message.max_context_tokens,
        "block_size_tokens": message.block_size_tokens,
        "num_blocks": message.num_blocks,
    }
    for field, size in sizes.items():
        if size == 0:
            raise _invalid(f"info.{field}", "must be positive")
    return WorkerInfo(
        worker_id=WorkerId(message.worker_id),
        role=role_from_proto(message.role, "info.role"),
        address=message.address,
        transfer_address=message.transfer_address,
        model=message.model,
        spec=spec_from_proto(message.kv_spec),
        vocab_size=message.vocab_size,
        max_context_tokens=message.max_context_tokens,
        eos_token_ids=tuple(message.eos_token_ids),
        block_size_tokens=message.block_size_tokens,
        num_blocks=message.num_blocks,
        node=message.node,
        pid=message.pid,
        metrics_address=message.metrics_address,
        device=message.device,
        version=message.version,
        can_be=tuple(_ROLES_BACK[role] for role in message.can_be if role in _ROLES_BACK),
        weights=_weights(message.weights, "info.weights"),
    )


def load_to_proto(load: WorkerLoad) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        running_requests=load.running_requests,
        waiting_requests=load.waiting_requests,
        queued_prefill_tokens=load.queued_prefill_tokens,
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        reserved_blocks=load.reserved_blocks,
        used_blocks=load.used_blocks,
        in_flight_blocks=load.in_flight_blocks,
        prefill_tokens_per_second=load.prefill_tokens_per_s,
        decode_step_seconds=load.decode_step_s,
    )


def load_from_proto(message: pb.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        running_requests=message.running_requests,
        waiting_requests=message.waiting_requests,
        queued_prefill_tokens=message.queued_prefill_tokens,
        free_blocks=message.free_blocks,
        cached_blocks=message.cached_blocks,
        reserved_blocks=message.reserved_blocks,
        used_blocks=message.used_blocks,
        in_flight_blocks=message.in_flight_blocks,
        prefill_tokens_per_s=message.prefill_tokens_per_second,
        decode_step_s=message.decode_step_seconds,
    )


def prefix_delta_to_proto(delta: PrefixDelta) -> fleet_pb2.PrefixDelta:
    return fleet_pb2.PrefixDelta(stored=delta.stored, evicted=delta.evicted)


def prefix_delta_from_proto(message: fleet_pb2.PrefixDelta) -> PrefixDelta:
    return PrefixDelta(
        stored=tuple(BlockHash(h) for h in message.stored),
        evicted=tuple(BlockHash(h) for h in message.evicted),
    )

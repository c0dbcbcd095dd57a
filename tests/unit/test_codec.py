"""Every domain value survives the wire; every malformed message is refused with the field's name."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import codec
from baton.engine.base import Token
from baton.errors import InvalidRequestError
from baton.kv.spec import KVDtype, KVSpec, WeightFormat
from baton.types import (
    AttemptKey,
    BlockHash,
    FinishReason,
    PositionLogprobs,
    PrefixDelta,
    RequestId,
    Role,
    SamplingParams,
    Sequence,
    TokenChunk,
    TokenLogprob,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
)
from baton.v1 import common_pb2 as pb
from baton.v1 import fleet_pb2

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
i32 = st.integers(0, 2**31 - 1)
size = st.integers(1, 2**32 - 1)
real = st.floats(allow_nan=False)
name = st.text(min_size=1, max_size=12)
ids = st.lists(u32, max_size=8).map(tuple)

keys = st.builds(AttemptKey, request_id=name.map(RequestId), attempt=u32)
samplings = st.builds(
    SamplingParams,
    max_tokens=i32,
    min_tokens=i32,
    temperature=real,
    top_k=i32,
    top_p=real,
    min_p=real,
    repetition_penalty=real,
    presence_penalty=real,
    frequency_penalty=real,
    logit_bias=st.dictionaries(u32, real, max_size=4).map(lambda d: tuple(sorted(d.items()))),
    seed=u64,
    stop=st.lists(name, max_size=3).map(tuple),
    stop_token_ids=ids,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
sequences = st.builds(
    Sequence,
    prompt=st.lists(u32, min_size=1, max_size=8).map(tuple),
    generated=ids,
    sampling=samplings,
    cache_salt=st.text(max_size=8),
)
logprob = st.builds(TokenLogprob, token_id=u32, logprob=st.floats(width=32, allow_nan=False))
positions = st.builds(
    PositionLogprobs, chosen=logprob, top=st.lists(logprob, max_size=3).map(tuple)
)


@st.composite
def chunks(draw: st.DrawFn) -> TokenChunk:
    token_ids = draw(ids)
    count = len(token_ids) if draw(st.booleans()) else 0
    logprobs = draw(st.lists(positions, min_size=count, max_size=count))
    return TokenChunk(draw(u32), token_ids, tuple(logprobs))


specs = st.builds(
    KVSpec,
    num_layers=u32,
    num_kv_heads=u32,
    head_dim=u32,
    dtype=st.sampled_from(KVDtype),
    position_scheme=st.text(max_size=12),
    model_fingerprint=st.text(max_size=12),
    weights=st.sampled_from([None, *WeightFormat]),
)
infos = st.builds(
    WorkerInfo,
    worker_id=name.map(WorkerId),
    role=st.sampled_from(Role),
    address=name,
    transfer_address=st.text(max_size=12),
    model=st.text(max_size=12),
    spec=specs,
    vocab_size=size,
    max_context_tokens=size,
    eos_token_ids=ids,
    block_size_tokens=size,
    num_blocks=size,
    node=st.text(max_size=12),
    pid=u32,
    metrics_address=st.text(max_size=12),
    device=st.text(max_size=12),
    version=st.text(max_size=12),
    weights=st.sampled_from([None, *WeightFormat]),
)
loads = st.builds(
    WorkerLoad,
    running_requests=u32,
    waiting_requests=u32,
    queued_prefill_tokens=u64,
    free_blocks=u32,
    cached_blocks=u32,
    reserved_blocks=u32,
    used_blocks=u32,
    in_flight_blocks=u32,
)
hashes = st.lists(u64.map(BlockHash), max_size=6).map(tuple)
deltas = st.builds(PrefixDelta, stored=hashes, evicted=hashes)


@given(keys)
def test_an_attempt_key_survives_the_wire(key: AttemptKey) -> None:
    wire = codec.key_to_proto(key).SerializeToString()
    assert codec.key_from_proto(pb.AttemptKey.FromString(wire)) == key


@given(samplings)
def test_sampling_parameters_survive_the_wire(params: SamplingParams) -> None:
    wire = codec.sampling_to_proto(params).SerializeToString()
    assert codec.sampling_from_proto(pb.SamplingParams.FromString(wire)) == params


@given(sequences)
def test_a_sequence_survives_the_wire_but_for_its_stop_strings(sequence: Sequence) -> None:
    wire = codec.sequence_to_proto(sequence).SerializeToString()
    expected = replace(sequence, sampling=replace(sequence.sampling, stop=()))
    assert codec.sequence_from_proto(pb.Sequence.FromString(wire)) == expected


@given(chunks())
def test_a_token_chunk_survives_the_wire(chunk: TokenChunk) -> None:
    wire = codec.chunk_to_proto(chunk).SerializeToString()
    back = codec.chunk_from_proto(pb.TokenChunk.FromString(wire))
    assert back == chunk
    assert back.end_index == chunk.first_index + len(chunk.token_ids)


@given(specs)
def test_a_kv_spec_survives_the_wire_with_its_digest(spec: KVSpec) -> None:
    wire = codec.spec_to_proto(spec).SerializeToString()
    back = codec.spec_from_proto(pb.KvSpec.FromString(wire))
    assert back == spec
    assert back.digest == spec.digest


@given(infos)
def test_a_worker_info_survives_the_wire(info: WorkerInfo) -> None:
    wire = codec.worker_info_to_proto(info).SerializeToString()
    assert codec.worker_info_from_proto(pb.WorkerInfo.FromString(wire)) == info


@given(loads)
def test_a_load_survives_the_wire(load: WorkerLoad) -> None:
    wire = codec.load_to_proto(load).SerializeToString()
    assert codec.load_from_proto(pb.WorkerLoad.FromString(wire)) == load


@given(deltas)
def test_a_prefix_delta_survives_the_wire(delta: PrefixDelta) -> None:
    wire = codec.prefix_delta_to_proto(delta).SerializeToString()
    assert codec.prefix_delta_from_proto(fleet_pb2.PrefixDelta.FromString(wire)) == delta


@pytest.mark.parametrize("reason", FinishReason)
def test_a_finish_reason_survives_the_wire(reason: FinishReason) -> None:
    assert codec.finish_reason_from_proto(codec.finish_reason_to_proto(reason)) is reason


def test_an_unspecified_finish_reason_means_that_the_request_goes_on() -> None:
    assert codec.finish_reason_from_proto(pb.FINISH_REASON_UNSPECIFIED) is None


def test_unset_sampling_fields_take_the_documented_defaults() -> None:
    message = pb.SamplingParams(max_tokens=3, seed=0)
    assert codec.sampling_from_proto(message) == SamplingParams(max_tokens=3)


def test_an_engines_tokens_join_to_a_chunk() -> None:
    key = AttemptKey(RequestId("r"))
    seen = PositionLogprobs(TokenLogprob(7, -0.5), ())
    tokens = [Token(key, 4, 7, seen, None), Token(key, 5, 8, seen, FinishReason.STOP)]
    assert codec.chunk_of_tokens(tokens) == TokenChunk(4, (7, 8), (seen, seen))


def info_message(**changes: object) -> pb.WorkerInfo:
    spec = KVSpec(
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        dtype=KVDtype.FLOAT32,
        position_scheme="rope",
        model_fingerprint="f",
    )
    message = pb.WorkerInfo(
        worker_id="w",
        role=pb.WORKER_ROLE_DECODE,
        address="localhost:1",
        kv_spec=codec.spec_to_proto(spec),
        vocab_size=9,
        max_context_tokens=9,
        block_size_tokens=4,
        num_blocks=4,
    )
    for field, value in changes.items():
        setattr(message, field, value)
    return message


def spec_message(**changes: object) -> pb.KvSpec:
    message = info_message().kv_spec
    for field, value in changes.items():
        setattr(message, field, value)
    return message


@pytest.mark.parametrize(
    ("field", "decode"),
    [
        ("key.request_id", lambda: codec.key_from_proto(pb.AttemptKey(attempt=1))),
        ("sequence.prompt", lambda: codec.sequence_from_proto(pb.Sequence())),
        (
            "sequence.sampling.max_tokens",
            lambda: codec.sampling_from_proto(pb.SamplingParams(seed=1)),
        ),
        (
            "sequence.sampling.seed",
            lambda: codec.sampling_from_proto(pb.SamplingParams(max_tokens=1)),
        ),
        (
            "tokens.logprobs",
            lambda: codec.chunk_from_proto(
                pb.TokenChunk(token_ids=[1, 2], logprobs=[pb.PositionLogprobs()])
            ),
        ),
        ("kv_spec.weights", lambda: codec.spec_from_proto(spec_message(weights="int3"))),
        (
            "info.weights",
            lambda: codec.worker_info_from_proto(info_message(weights="int3")),
        ),
        ("kv_spec.dtype", lambda: codec.spec_from_proto(spec_message(dtype="int3"))),
        ("kv_spec.digest", lambda: codec.spec_from_proto(spec_message(head_dim=3))),
        ("info.worker_id", lambda: codec.worker_info_from_proto(info_message(worker_id=""))),
        ("info.address", lambda: codec.worker_info_from_proto(info_message(address=""))),
        ("info.role", lambda: codec.worker_info_from_proto(info_message(role=0))),
        (
            "info.block_size_tokens",
            lambda: codec.worker_info_from_proto(info_message(block_size_tokens=0)),
        ),
        ("info.num_blocks", lambda: codec.worker_info_from_proto(info_message(num_blocks=0))),
    ],
)
def test_a_malformed_message_is_refused_with_the_name_of_the_field(
    field: str, decode: Callable[[], object]
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        decode()
    assert [v.field for v in refused.value.violations] == [field]

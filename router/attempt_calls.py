"""What an attempt asks of its workers: the requests of its calls. Stateless."""

from dataclasses import dataclass

from baton import codec
from baton.types import AttemptKey, RequestRecord, Sequence
from baton.v1 import decode_pb2, prefill_pb2
from router.members import Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What decode is told beside the work, for the case that this router dies."""

    record: RequestRecord
    grace_s: float
    holder: str
    """Names this router's hold on the attempt."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Where an attempt's KV is, which another decode worker left off."""

    member: Member
    key: AttemptKey


def decode_request(
    key: AttemptKey,
    sequence: Sequence,
    terms: Terms,
    decode: Member,
    *,
    source: Member | None,
    moved: Moved | None,
) -> decode_pb2.DecodeRequest:
    """`source` is the prefill worker whose KV decode takes, `moved` the decode worker whose KV it takes; it has none of both where it
    computes the prompt itself.
    """
    request = decode_pb2.DecodeRequest(
        key=codec.key_to_proto(key),
        sequence=codec.sequence_to_proto(sequence),
        kv_digest=decode.info.spec.digest,
        record=codec.record_to_proto(terms.record),
        grace_seconds=terms.grace_s,
        holder=terms.holder,
    )
    if source is not None:
        request.source.worker_id = source.worker_id
        request.source.transfer_address = source.info.transfer_address
    elif moved is not None:
        request.source.worker_id = moved.member.worker_id
        request.source.transfer_address = moved.member.info.transfer_address
        request.source.key.CopyFrom(codec.key_to_proto(moved.key))
    return request


def attach_request(
    key: AttemptKey, next_index: int, terms: Terms
) -> decode_pb2.DecodeServiceAttachRequest:
    """Reads on from an output position."""
    return decode_pb2.DecodeServiceAttachRequest(
        key=codec.key_to_proto(key), next_index=next_index, holder=terms.holder
    )


def prefill_request(
    key: AttemptKey, sequence: Sequence, prefill: Member, skip_tokens: int
) -> prefill_pb2.PrefillRequest:
    """Decode holds so many leading tokens already."""
    return prefill_pb2.PrefillRequest(
        key=codec.key_to_proto(key),
        sequence=codec.sequence_to_proto(sequence),
        skip_tokens=skip_tokens,
        kv_digest=prefill.info.spec.digest,
    )

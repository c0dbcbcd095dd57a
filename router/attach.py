"""Finds what the fleet still holds of a request whose router or stream was lost.

Used on the router's event loop. Workers are asked, all at once, when somebody attaches: no request pays for it that is not
disturbed, and a router needs no memory of another's requests.
"""

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from baton import codec
from baton.types import AttemptKey, RequestRecord, Sequence
from baton.v1 import decode_pb2
from router.members import Member


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldAttempt:
    """An attempt at one of a request's completions, running or ended, on a decode worker."""

    member: Member
    key: AttemptKey
    sequence: Sequence
    record: RequestRecord
    end_index: int
    """Output position after the last token that the worker knows."""
    failed: bool


async def find_held(members: Seq[Member], request_id: str, tenant: str) -> dict[int, HeldAttempt]:
    """The best attempt at each completion that somebody holds: rather running than failed, then the one with most tokens."""
    answers = await asyncio.gather(*(member.find(request_id, tenant) for member in members))
    best: dict[int, HeldAttempt] = {}
    for member, answer in zip(members, answers, strict=True):
        for message in answer.attempts:
            held = _held(member, message)
            rival = best.get(held.sequence.sampling.choice)
            if rival is None or _worth(held) > _worth(rival):
                best[held.sequence.sampling.choice] = held
    return best


def _worth(held: HeldAttempt) -> tuple[bool, int]:
    return (not held.failed, held.end_index)


def _held(member: Member, message: decode_pb2.FindResponse.HeldAttempt) -> HeldAttempt:
    return HeldAttempt(
        member=member,
        key=codec.key_from_proto(message.key),
        sequence=codec.sequence_from_proto(message.sequence),
        record=codec.record_from_proto(message.record),
        end_index=message.end_index,
        failed=message.failed,
    )

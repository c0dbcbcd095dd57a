"""From which held attempt an answer can go on, where log-probabilities were asked for."""

from typing import cast

import pytest

from baton.types import (
    AttemptKey,
    RequestId,
    RequestRecord,
    SamplingParams,
    Sequence,
    TurnRecord,
)
from baton.v1 import inference_pb2 as pb
from router.attach import HeldAttempt
from router.members import Member
from router.resume import resume

TURN = TurnRecord("s", "mark-lease", ())


@pytest.mark.parametrize(
    ("earlier", "known", "turn", "usable"),
    [
        (0, 0, None, True),
        (0, 0, TURN, True),
        (5, 4, None, False),
        (5, 5, None, True),
        # The client has those of the attempt before; the session, which keeps the whole answer, has not.
        (5, 5, TURN, False),
    ],
)
def test_an_attempt_is_gone_on_with_where_all_that_is_wanted_is_known(
    earlier: int,
    known: int,
    turn: TurnRecord | None,
    usable: bool,  # noqa: FBT001 - a case
) -> None:
    held = HeldAttempt(
        member=cast("Member", None),
        key=AttemptKey(RequestId("r"), 1),
        sequence=Sequence((1, 2), tuple(range(earlier)), SamplingParams(max_tokens=9, logprobs=1)),
        record=RequestRecord(request_id="r", deadline_unix_s=0.0, turn=turn),
        end_index=7,
        failed=False,
    )
    position = pb.OutputPosition(next_index=known)
    _, resumption = resume(pb.AttachRequest(request_id="r", positions=[position]), {0: held})
    assert (0 in resumption.held) == usable

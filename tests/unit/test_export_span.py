"""What the span of an export says of a pull that is refused."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from baton.errors import BatonError, CancelledError, InternalError, PreconditionError
from baton.kv.spec import WireKV
from baton.service.worker_host import WorkerHost
from baton.transfer.base import KVMeta, PullRequest, Refused
from baton.types import AttemptKey, RequestId, TraceContext
from baton.worker.calls import exported

TRACE = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


class KeptSpan:
    """Of one export."""

    recording = True

    def __init__(self) -> None:
        self.failure = ""
        self.facts: dict[str, Any] = {}

    def begin(self, parent: TraceContext) -> "KeptSpan":
        assert parent == TRACE
        return self

    def end(self, *_: object, attributes: dict[str, Any], failure: str, **__: object) -> None:
        self.facts, self.failure = attributes, failure


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (PreconditionError("no KV is held for this attempt"), False),
        (CancelledError("the call was cancelled"), False),
        (InternalError("a bug"), True),
    ],
    ids=["ended", "cancelled", "broken"],
)
def test_a_pull_that_comes_after_its_attempt_ended_is_no_failure_of_the_worker(
    error: BatonError, *, failed: bool
) -> None:
    """Promise: the traces of requests that their clients cancel hold no failed span; why there was no KV is told all the same."""

    async def pull(_: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        return Refused(error.reason, error.message), None

    span = KeptSpan()
    host = cast("WorkerHost", SimpleNamespace(tracing=span, worker_id="w"))
    request = PullRequest(key=AttemptKey(RequestId("r")), first=0, last=4, digest="", trace=TRACE)
    asyncio.run(exported(host, request, pull))
    assert bool(span.failure) is failed
    assert span.facts["error.type"] == error.reason.lower()

"""When the client asks again, and when it gives up: decisions on a clock of the test's own."""

import logging

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from baton.client.recovery import TOLD_AFTER_S, Recovery, call_error
from baton.client.wire import Collector
from baton.codec import chunk_to_proto
from baton.errors import (
    BatonError,
    CancelledError,
    DrainingError,
    NotFoundError,
    UnavailableError,
)
from baton.service.status import DETAILS_KEY, code_of, to_status
from baton.types import TokenChunk
from baton.v1 import inference_pb2 as pb

RECONNECT_S = 15.0
WAIT_S = 10.0
"""How long the router looks for a worker before it says that there is none."""
CUT = AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), "connection reset", "")
LET_GO = AioRpcError(grpc.StatusCode.CANCELLED, Metadata(), Metadata(), "CANCELLED", "")
"""What gRPC makes of the calls of a server that stops at once."""
NO_WORKER = UnavailableError("no worker")


def said(error: BatonError) -> AioRpcError:
    """By the router itself."""
    trailers = Metadata((DETAILS_KEY, to_status(error).SerializeToString()))
    return AioRpcError(code_of(error), Metadata(), trailers, error.message, "")


class Stream:
    """A request whose calls the test answers."""

    def __init__(self) -> None:
        self.collector = Collector()
        self.recovery = Recovery(pb.GenerateRequest(request_id="r"), self.collector, RECONNECT_S)
        self.now_s = 100.0

    def accepted(self) -> None:
        self._receive(pb.GenerateResponse(accepted=pb.Accepted(request_id="r", seed=7)))

    def token(self, index: int) -> None:
        tokens = chunk_to_proto(TokenChunk(index, (index + 1,)))
        self._receive(pb.GenerateResponse(chunk=pb.Chunk(tokens=tokens)))

    def broke(self, error: AioRpcError) -> pb.GenerateRequest | pb.AttachRequest | None:
        """The next call's message, once its pause is over."""
        retry = self.recovery.after(error, self.now_s)
        if retry is None:
            return None
        self.now_s += retry.pause_s
        retry.tell("r")
        return retry.message

    def _receive(self, response: pb.GenerateResponse) -> None:
        chunk = self.collector.add(response)
        self.recovery.progress(fresh=chunk is not None)


def asked_again(stream: Stream, tokens: int, limit: int = 100) -> int:
    """How often a router is asked that accepts the request each time, says so many tokens and then that it finds no worker."""
    for asked in range(limit):
        stream.accepted()
        for index in range(tokens):
            stream.token(index)
        stream.now_s += WAIT_S
        if stream.broke(said(NO_WORKER)) is None:
            return asked
        repeat = stream.broke(said(NotFoundError("request", "r")))
        assert isinstance(repeat, pb.GenerateRequest)
        assert repeat.sampling.seed == 7
    return limit


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_router_that_finds_no_worker_is_believed_in_the_end(tokens: int) -> None:
    """Promise: a request ends though nobody set it a deadline: to be accepted again, or told the same tokens, is no progress."""
    assert asked_again(Stream(), tokens) == 2


def test_each_new_token_buys_all_the_patience_again() -> None:
    stream = Stream()
    assert asked_again(stream, 0, limit=2) == 2
    stream.accepted()
    stream.token(0)
    assert asked_again(stream, 1) == 2


@pytest.mark.parametrize("loss", [CUT, LET_GO, said(DrainingError("stops"))])
def test_a_router_that_accepts_makes_up_for_those_that_were_lost(loss: AioRpcError) -> None:
    """Promise: a prompt that computes for long outlives any number of routers, one after the other."""
    stream = Stream()
    for _ in range(20):
        stream.accepted()
        stream.now_s += WAIT_S
        assert isinstance(stream.broke(loss), pb.AttachRequest)


def test_only_who_cancelled_is_told_so() -> None:
    """Promise: a router that stops is unavailable; a request that someone cancelled by id is cancelled, and stays so."""
    assert type(call_error(LET_GO, closed=False)) is UnavailableError
    assert type(call_error(LET_GO, closed=True)) is CancelledError
    by_id = said(CancelledError("by id"))
    assert type(call_error(by_id, closed=False)) is CancelledError
    stream = Stream()
    stream.accepted()
    assert stream.broke(by_id) is None


def test_routers_that_are_gone_are_tried_for_as_long_as_was_asked() -> None:
    stream = Stream()
    stream.accepted()
    began_s = stream.now_s
    while stream.broke(CUT) is not None:
        assert stream.now_s - began_s <= RECONNECT_S + 1
    assert stream.now_s - began_s >= RECONNECT_S


def test_that_nobody_holds_the_request_is_never_the_last_word() -> None:
    """Promise: however late Attach answers, the caller learns why there is no answer: no worker, rather than no such request."""
    stream = Stream()
    stream.accepted()
    assert isinstance(stream.broke(said(NO_WORKER)), pb.AttachRequest)
    stream.now_s += RECONNECT_S + 1
    assert isinstance(stream.broke(said(NotFoundError("request", "r"))), pb.GenerateRequest)
    assert stream.broke(said(NotFoundError("model", "m"))) is None
    stream.accepted()
    assert stream.broke(said(NO_WORKER)) is None


def test_why_an_answer_is_late_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Promise: at once where a router that serves finds no worker, later where a connection may be back soon; with what was wrong, not
    with what was tried since.
    """
    caplog.set_level(logging.INFO)
    refused, cut = Stream(), Stream()
    refused.accepted()
    refused.broke(said(NO_WORKER))
    refused.broke(said(NotFoundError("request", "r")))
    assert caplog.messages == ["request r is asked for again: no worker"] * 2
    caplog.clear()
    cut.accepted()
    cut.broke(CUT)
    assert not caplog.messages
    cut.now_s += TOLD_AFTER_S
    cut.broke(CUT)
    assert caplog.messages == ["request r is asked for again: connection reset"]

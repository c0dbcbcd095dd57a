"""The client's requests and answers, without a server."""

import pytest

from baton.client import ChatMessage, ConnectionOptions, SamplingOptions
from baton.client.wire import Collector, channel_options, generate_request
from baton.errors import InternalError, InvalidRequestError
from baton.types import FinishReason
from baton.v1 import common_pb2
from baton.v1 import inference_pb2 as pb


def request_for(prompt: object, sampling: SamplingOptions | None = None) -> pb.GenerateRequest:
    return generate_request(prompt, request_id="r", model="", sampling=sampling)  # type: ignore[arg-type]


def test_each_kind_of_prompt_has_its_own_field() -> None:
    assert request_for("hi").WhichOneof("prompt") == "text"
    assert list(request_for([1, 2]).tokens.ids) == [1, 2]
    assert request_for([]).WhichOneof("prompt") == "tokens"
    chat = request_for([ChatMessage("user", "hi")]).chat
    assert [(m.role, m.content) for m in chat.messages] == [("user", "hi")]


def test_an_option_left_alone_is_left_to_the_server() -> None:
    sampling = request_for("hi", SamplingOptions()).sampling
    for field in ("max_tokens", "temperature", "top_p", "repetition_penalty", "seed", "logprobs"):
        assert not sampling.HasField(field)


def test_zero_is_a_choice_where_zero_means_something() -> None:
    sampling = request_for("hi", SamplingOptions(temperature=0.0, seed=0, logprobs=0)).sampling
    assert sampling.HasField("temperature")
    assert sampling.HasField("seed")
    assert sampling.HasField("logprobs")


def test_every_option_reaches_its_field() -> None:
    options = SamplingOptions(
        max_tokens=1,
        min_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=0.75,
        frequency_penalty=-0.5,
        logit_bias={7: -1.0},
        seed=2**64 - 1,
        stop=["a", "b"],
        stop_token_ids=[9],
        ignore_eos=True,
        logprobs=4,
        n=3,
    )
    assert request_for("hi", options).sampling == common_pb2.SamplingParams(
        max_tokens=1,
        min_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=0.75,
        frequency_penalty=-0.5,
        logit_bias={7: -1.0},
        seed=2**64 - 1,
        stop=["a", "b"],
        stop_token_ids=[9],
        ignore_eos=True,
        logprobs=4,
        n=3,
    )


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        (b"bytes", None, "text"),
        ("\ud800", None, "text"),
        ([-1], None, "tokens"),
        ([1, "x"], None, "tokens"),
        ([ChatMessage("user", "hi"), 3], None, "chat"),
        ("hi", SamplingOptions(seed=-1), "sampling.seed"),
        ("hi", SamplingOptions(max_tokens=2**40), "sampling.max_tokens"),
        ("hi", SamplingOptions(stop="word"), "sampling.stop"),
        ("hi", SamplingOptions(stop_token_ids=[-5]), "sampling.stop_token_ids"),
        ("hi", SamplingOptions(logit_bias={-1: 0.5}), "sampling.logit_bias"),
    ],
)
def test_what_no_message_can_carry_is_refused_by_field(
    prompt: object, sampling: SamplingOptions | None, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request_for(prompt, sampling)
    assert [violation.field for violation in caught.value.violations] == [field]


def chunk(text: str, first: int, *ids: int) -> pb.GenerateResponse:
    tokens = common_pb2.TokenChunk(first_index=first, token_ids=ids)
    return pb.GenerateResponse(chunk=pb.Chunk(text=text, tokens=tokens))


ACCEPTED = pb.GenerateResponse(
    accepted=pb.Accepted(request_id="r", model="m", prompt_tokens=3, seed=5)
)


def test_the_result_joins_the_chunks() -> None:
    collector = Collector()
    assert collector.add(ACCEPTED) is None
    assert collector.seed == 5
    collector.add(chunk("ab", 0, 1, 2))
    collector.add(chunk("", 2, 3))
    collector.add(chunk("c", 3))
    collector.add(
        pb.GenerateResponse(
            finished=pb.Finished(
                choices=[
                    pb.ChoiceEnd(reason=common_pb2.FINISH_REASON_STOP, stop_string="d"),
                ],
                usage=pb.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=3),
                timings=pb.Timings(first_token_at_seconds=0.5, handoff_bytes=7),
                attempts=[pb.AttemptReport(prefill_worker="p", decode_worker="d")],
            )
        )
    )
    result = collector.result
    assert result is not None
    assert (result.text, result.token_ids, result.seed) == ("abc", (1, 2, 3), 5)
    assert result.finish_reason is FinishReason.STOP
    assert (result.stop_string, result.stop_token_id) == ("d", None)
    assert (result.timings.first_token_at_s, result.timings.kv_received_at_s) == (0.5, None)
    assert (result.usage.cached_tokens, result.attempts[0].decode_worker) == (1, "d")


def test_a_gap_or_a_repeat_in_the_tokens_is_never_passed_on() -> None:
    collector = Collector()
    collector.add(chunk("a", 0, 1))
    with pytest.raises(InternalError, match="expected 1"):
        collector.add(chunk("b", 2, 3))


def test_a_call_that_ends_without_finished_is_an_error() -> None:
    collector = Collector()
    collector.add(ACCEPTED)
    with pytest.raises(InternalError, match="without finishing"):
        collector.check_ended()


def test_keepalive_can_be_turned_off() -> None:
    named = dict(channel_options(ConnectionOptions(keepalive_s=1.5)))
    assert named["grpc.keepalive_time_ms"] == 1500
    named = dict(channel_options(ConnectionOptions(keepalive_s=None)))
    assert "grpc.keepalive_time_ms" not in named

"""What crosses a foreign router between the legs: it comes back as it went, and nothing else is taken for it."""

import json
import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import (
    AttemptKey,
    PositionLogprobs,
    RequestId,
    SamplingParams,
    Sequence,
    TokenChunk,
    TokenLogprob,
)
from baton.vllm.handoff import HandedOver, fingerprint_of, from_json, stands, to_json, wants_prefill

_COUNTS = st.integers(0, 2**40)
_LOGPROBS = st.builds(TokenLogprob, _COUNTS, st.floats(allow_nan=False, max_value=0))
_POSITIONS = st.builds(PositionLogprobs, _LOGPROBS, st.lists(_LOGPROBS, max_size=3).map(tuple))
_HANDED = st.builds(
    HandedOver,
    address=st.text(),
    key=st.builds(AttemptKey, st.text().map(RequestId), _COUNTS),
    digest=st.text(),
    fingerprint=st.text(),
    num_tokens=_COUNTS,
    kv_bytes=_COUNTS,
    cached_tokens=_COUNTS,
    first=st.builds(
        lambda token, logprobs: TokenChunk(0, (token,), tuple(logprobs)),
        _COUNTS,
        st.lists(_POSITIONS, max_size=1),
    ),
    done_unix_s=st.floats(allow_nan=False, allow_infinity=False),
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
)
SEQUENCE = Sequence((1, 2, 3), (), SamplingParams(max_tokens=5, temperature=0.7, seed=3))


@given(_HANDED)
def test_what_is_handed_over_comes_back_as_it_went(handed: HandedOver) -> None:
    assert from_json(to_json(handed)) == handed
    assert not wants_prefill(to_json(handed))


@settings(max_examples=40)
@given(_HANDED, st.data())
def test_anything_else_is_nothing_and_raises_nothing(
    handed: HandedOver, data: st.DataObject
) -> None:
    """Promise: whatever a router brings, decode can go on by itself."""
    assert from_json(data.draw(st.text())) is None
    assert from_json(to_json(replace(handed, done_unix_s=-math.inf))) is None
    assert from_json(json.dumps(data.draw(_JSON))) is None
    told = json.loads(to_json(handed))
    field = data.draw(st.sampled_from(sorted(told)))
    from_json(json.dumps(told | {field: data.draw(_JSON)}))
    del told[field]
    assert field.startswith("do_remote") or from_json(json.dumps(told)) is None


def test_only_what_the_first_token_depends_on_tells_requests_apart() -> None:
    own = fingerprint_of(SEQUENCE)

    def other(**changes: object) -> str:
        return fingerprint_of(
            replace(SEQUENCE, sampling=replace(SEQUENCE.sampling, **changes))  # type: ignore[arg-type]
        )

    ends = {"max_tokens": 9, "min_tokens": 2, "ignore_eos": True, "stop": ("a",), "n": 2}
    assert other(**ends, stop_token_ids=(4,)) == own
    assert fingerprint_of(replace(SEQUENCE, prompt=(1, 2, 4))) != own
    for changes in ({"seed": 4}, {"temperature": 0.0}, {"logprobs": 1}, {"top_k": 5}):
        assert other(**changes) != own


def test_a_first_token_stands_unless_forbidden_ends_could_have_changed_it() -> None:
    greedy, drawn = SamplingParams(max_tokens=9, temperature=0), SamplingParams(max_tokens=9)
    assert stands(7, greedy, (0,))
    assert stands(0, drawn, (0,))
    assert stands(7, replace(greedy, min_tokens=1), (0,))
    assert not stands(0, replace(greedy, min_tokens=1), (0,))
    assert not stands(7, replace(greedy, min_tokens=1, stop_token_ids=(7,)), (0,))
    assert not stands(7, replace(drawn, min_tokens=1), (0,))


def test_only_a_wish_for_a_remote_decode_asks_for_a_prefill_leg() -> None:
    assert wants_prefill('{"do_remote_decode": true, "do_remote_prefill": false}')
    for other in ("", "[]", "{}", '{"do_remote_decode": 1}', "x", "[" * 100_000):
        assert not wants_prefill(other)

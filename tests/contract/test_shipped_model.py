"""The model that ships: small, equal to `transformers`, and right only as long as every KV block is where it belongs."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.cli.config import shipped_model
from baton.engine.base import EngineEvent, EngineRequest, Mode, Started, Token
from baton.engine.build import build_torch_engine
from baton.engine.config import EngineConfig
from baton.engine.engine import PagedEngine
from baton.kv.checksum import sealed
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence
from router.chat import ChatTurn
from router.text import Tokenizer
from tests import oracle

MOST_BYTES = 8_000_000


@dataclass(frozen=True, slots=True)
class Question:
    """A story and a question, as the model's tokens, and the words that make an answer right."""

    tokens: tuple[int, ...]
    key: str


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(shipped_model()))


@pytest.fixture(scope="module")
def questions(tokenizer: Tokenizer) -> list[Question]:
    examples = json.loads((shipped_model() / "examples.json").read_text())
    return [
        Question(
            tuple(tokenizer.encode_chat([ChatTurn("user", f"{e['story']}\n\n{q['question']}")])),
            q["key"],
        )
        for e in examples
        for q in e["questions"]
    ]


@pytest.fixture(scope="module")
def engine() -> PagedEngine:
    return build_torch_engine(
        EngineConfig(
            model=str(shipped_model()),
            dtype="float32",
            kv_pool_tokens=16384,
            threads=1,
            prefix_cache=False,
        )
    )


def generate(engine: PagedEngine, name: str) -> list[int]:
    tokens = []
    while engine.has_work():
        tokens += [e.token_id for e in engine.step() if isinstance(e, Token)]
    assert tokens, name
    return tokens


def sampling(max_tokens: int, *, ignore_eos: bool) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)


def test_it_takes_at_most_8_mb_on_disk() -> None:
    files = [p for p in Path(shipped_model()).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= MOST_BYTES


def test_its_greedy_tokens_are_those_of_transformers(
    engine: PagedEngine, questions: list[Question]
) -> None:
    reference = oracle.Oracle(shipped_model())
    for number, question in enumerate((questions[0], questions[17], questions[-1])):
        params = sampling(64, ignore_eos=True)
        key = AttemptKey(RequestId(f"q{number}"))
        engine.add(EngineRequest(key, Sequence(question.tokens, (), params), Mode.LOCAL))
        expected = reference.generate(list(question.tokens), 64)
        assert generate(engine, str(key)) == expected


def test_it_answers_and_answers_wrong_when_kv_is_lost(
    engine: PagedEngine, questions: list[Question], tokenizer: Tokenizer
) -> None:
    """A KV block that holds other tokens than it should shows as wrong answers: the model is a test of the KV path."""
    right = {"whole": 0, "spoiled": 0}
    for number, question in enumerate(questions):
        length = len(question.tokens)
        sequence = Sequence(question.tokens, (), sampling(24, ignore_eos=False))
        source = AttemptKey(RequestId(f"source{number}"))
        engine.add(EngineRequest(source, sequence, Mode.PREFILL))
        first = generate(engine, "prefill")[0]
        kv = engine.export_kv(source, 0, length)
        for how in right:
            fresh = build_decode(engine)
            key = AttemptKey(RequestId(f"{how}{number}"))
            fresh.add(EngineRequest(key, sequence, Mode.DECODE))
            fresh.step()
            sent = kv.data.copy()
            if how == "spoiled":
                sent[:, :, : length // 2] = sent[:, :, length // 2 : length // 2 * 2]
            fresh.import_kv(key, 0, sealed(sent))
            fresh.start_decode(key, first)
            answer = tokenizer.decode([first, *generate(fresh, how)])
            right[how] += question.key.lower() in answer.lower()
        engine.release(source)
    assert right["whole"] >= 0.85 * len(questions), right
    assert right["spoiled"] <= 0.6 * right["whole"], right


def build_decode(engine: PagedEngine) -> PagedEngine:
    """A second pool over the same weights, with nothing cached."""
    return PagedEngine(engine.runner, max_batch_tokens=512, max_running=4, prefix_cache=False)


def test_a_cache_salt_changes_no_token_and_shares_no_block(questions: list[Question]) -> None:
    """The torch engine too: another salt computes everything, and says the same."""
    engine = build_torch_engine(
        EngineConfig(model=str(shipped_model()), dtype="float32", kv_pool_tokens=16384, threads=1)
    )
    prompt, sampling = questions[0].tokens, SamplingParams(max_tokens=4, temperature=0.0)
    heard = []
    for index, salt in enumerate(["acme/", "rival/", "acme/"]):
        key = AttemptKey(RequestId(f"salt-{index}"))
        engine.add(EngineRequest(key, Sequence(prompt, (), sampling, salt), Mode.LOCAL))
        events: list[EngineEvent] = []
        while engine.has_work():
            events += engine.step()
        tokens = [event.token_id for event in events if isinstance(event, Token)]
        cached = [event.cached_tokens for event in events if isinstance(event, Started)]
        heard.append((tokens, cached[0] > 0))
    assert heard == [(heard[0][0], hit) for hit in (False, False, True)]

"""The same questions to one engine in this process: no router, no split, no transfer. Imports torch when called."""

from collections.abc import Mapping, Sequence

from baton.cli.demo_examples import MAX_TOKENS, Question
from baton.engine.base import Engine, EngineRequest, Failed, Mode, Token
from baton.engine.build import build_torch_engine
from baton.engine.config import EngineConfig
from baton.types import AttemptKey, RequestId, SamplingParams
from baton.types import Sequence as TokenSequence
from router.chat import ChatTurn
from router.text import Tokenizer


def single_process_tokens(
    config: EngineConfig, questions: Sequence[Question]
) -> Mapping[int, tuple[int, ...]]:
    """Each question's output tokens, by its number. Raises what the engine raises."""
    tokenizer = Tokenizer.load(config.model)
    engine = build_torch_engine(config)
    outputs: dict[AttemptKey, list[int]] = {}
    for question in questions:
        key = AttemptKey(RequestId(str(question.number)))
        outputs[key] = []
        engine.add(EngineRequest(key, _sequence(tokenizer, question), Mode.LOCAL))
    _run(engine, outputs)
    return {int(key.request_id): tuple(tokens) for key, tokens in outputs.items()}


def _sequence(tokenizer: Tokenizer, question: Question) -> TokenSequence:
    turns = [ChatTurn(message.role, message.content) for message in question.messages]
    options = question.sampling
    return TokenSequence(
        prompt=tuple(tokenizer.encode_chat(turns)),
        generated=(),
        sampling=SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=1.0 if options.temperature is None else options.temperature,
            seed=options.seed or 0,
        ),
    )


def _run(engine: Engine, outputs: Mapping[AttemptKey, list[int]]) -> None:
    while engine.has_work():
        for event in engine.step():
            match event:
                case Token(key=key, token_id=token_id):
                    outputs[key].append(token_id)
                case Failed(error=error):
                    raise error

"""What `baton bench` was asked for, and the run that follows: checks and choices, no I/O but files that options name."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baton.bench.arrivals import ArrivalPattern
from baton.bench.lengths import Lengths
from baton.bench.levels import Level, Plan
from baton.bench.prompts import (
    Form,
    Planned,
    PromptKind,
    TextTokenizer,
    TextVocabulary,
    TokenVocabulary,
    Vocabulary,
    as_message,
    read_prompts,
    replayed,
    synthetic,
)
from baton.bench.target import Described
from baton.bench.traces import Trace, read_trace, rescaled
from baton.client import Prompt
from baton.errors import FieldViolation, InvalidRequestError

DEFAULT_REQUESTS = 100
DEFAULT_ISL, DEFAULT_OSL = "128", "64"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The options that shape a load, as given; None was not given."""

    address: str = "127.0.0.1:50051"
    url: str | None = None
    """Of a server with OpenAI's API, in place of the address."""
    connections: int = 4
    rate: str | None = None
    burstiness: float | None = None
    fixed_rate: bool = False
    max_concurrency: int | None = None
    concurrency: str | None = None
    trace: Path | None = None
    speed: float = 1.0
    length_scale: float = 1.0
    requests: int | None = None
    duration_s: float | None = None
    grace_s: float = 30.0
    warm_up: int = 0
    seed: int = 0
    give_up_s: float = 10.0
    isl: str | None = None
    osl: str | None = None
    prompts: Path | None = None
    prompt_as: PromptKind | None = None
    tokenizer: str | None = None


def load_trace(options: BenchOptions) -> Trace | None:
    """Rescaled, and cut to what is replayed. Raises `InvalidRequestError`."""
    if options.trace is None:
        return None
    trace = rescaled(
        read_trace(options.trace), speed=options.speed, length_scale=options.length_scale
    )
    return Trace(trace.entries[: options.requests], trace.block_tokens)


def plan_of(options: BenchOptions, trace: Trace | None) -> Plan:
    """Raises `InvalidRequestError` for options that contradict each other."""
    _refuse_contradictions(options)
    requests = options.requests
    if requests is None and options.duration_s is None and trace is None:
        requests = DEFAULT_REQUESTS
    return Plan(
        levels=_levels(options),
        requests=requests,
        pattern=_pattern(options),
        burstiness=options.burstiness or 1.0,
        trace_times_s=() if trace is None else tuple(entry.at_s for entry in trace.entries),
        warm_up=options.warm_up,
        duration_s=options.duration_s,
        grace_s=options.grace_s,
        give_up_s=options.give_up_s,
        seed=options.seed,
    )


def prompt_kind(options: BenchOptions) -> PromptKind:
    """Chats over HTTP. Over gRPC token ids, or texts where somebody named the tokenizer or a file of texts."""
    if options.prompt_as is not None:
        return options.prompt_as
    if options.url is not None:
        return PromptKind.CHAT
    textual = options.tokenizer is not None or options.prompts is not None
    return PromptKind.TEXT if textual else PromptKind.TOKENS


def requests_of(
    options: BenchOptions,
    trace: Trace | None,
    described: Described,
    tokenizer: TextTokenizer | None,
) -> tuple[Iterator[Planned], Iterator[Planned]]:
    """What is sent, and what the warm-up sends: of a trace, nothing that the trace contains. Raises `InvalidRequestError`."""
    kind = prompt_kind(options)
    form: Form = as_message if kind is PromptKind.CHAT else _as_it_is
    osl = None if options.osl is None else Lengths.parse(options.osl, "--osl")
    rng = np.random.default_rng(options.seed)
    if options.prompts is not None:
        if kind is PromptKind.TOKENS:
            raise _invalid("--prompts", "are texts; send them --prompt-as text or chat")
        prompts = read_prompts(options.prompts, osl, rng, form)
        return prompts, prompts
    vocabulary = _vocabulary(kind, described, tokenizer)
    isl = Lengths.parse(options.isl or DEFAULT_ISL, "--isl")
    drawn = synthetic(vocabulary, isl, osl or Lengths.parse(DEFAULT_OSL, "--osl"), rng, form)
    if trace is not None:
        return replayed(vocabulary, trace, options.seed, form), drawn
    return drawn, drawn


def _as_it_is(prompt: Prompt) -> Prompt:
    return prompt


def _vocabulary(
    kind: PromptKind, described: Described, tokenizer: TextTokenizer | None
) -> Vocabulary:
    if kind is not PromptKind.TOKENS:
        if tokenizer is None:
            raise _invalid(
                "--tokenizer",
                f"is needed to write prompts of so many tokens as {kind.value}: the model's directory or hub id; or name --prompts",
            )
        return TextVocabulary(tokenizer)
    if tokenizer is not None:
        untold = [i for i in range(tokenizer.vocab_size) if not tokenizer.has_text(i)]
        return TokenVocabulary(tokenizer.vocab_size, untold)
    if described.vocab_size is None:
        raise _invalid("--tokenizer", "is needed: the server does not tell its vocabulary")
    return TokenVocabulary(described.vocab_size, described.eos_token_ids)


def _levels(options: BenchOptions) -> tuple[Level, ...]:
    cap = options.max_concurrency
    if options.trace is not None:
        return (Level(replayed=True, concurrency=cap),)
    if options.rate is not None:
        rates = _numbers(options.rate, "--rate", float)
        return tuple(Level(rate_per_s=rate, concurrency=cap) for rate in rates)
    counts = _numbers(options.concurrency or "1", "--concurrency", int)
    return tuple(Level(concurrency=int(count)) for count in counts)


def _pattern(options: BenchOptions) -> ArrivalPattern:
    if options.fixed_rate:
        return ArrivalPattern.FIXED
    return ArrivalPattern.POISSON if options.burstiness is None else ArrivalPattern.GAMMA


def _refuse_contradictions(options: BenchOptions) -> None:
    loads = {
        "--rate": options.rate,
        "--concurrency": options.concurrency,
        "--trace": options.trace,
    }
    given = [name for name, value in loads.items() if value is not None]
    if len(given) > 1:
        hint = (
            "; to cap what runs at once, use --max-concurrency" if "--concurrency" in given else ""
        )
        raise _invalid(given[1], f"cannot go with {given[0]}{hint}")
    needs = (
        ("--burstiness", options.burstiness is not None, "--rate", options.rate is not None),
        ("--fixed-rate", options.fixed_rate, "--rate", options.rate is not None),
        ("--speed", options.speed != 1, "--trace", options.trace is not None),
        ("--length-scale", options.length_scale != 1, "--trace", options.trace is not None),
        (
            "--max-concurrency",
            options.max_concurrency is not None,
            "--rate or --trace",
            options.rate is not None or options.trace is not None,
        ),
    )
    for name, is_given, needed, is_there in needs:
        if is_given and not is_there:
            raise _invalid(name, f"has no meaning without {needed}")
    excludes = (
        ("--burstiness", options.burstiness is not None, "--fixed-rate", options.fixed_rate),
        ("--prompts", options.prompts is not None, "--trace", options.trace is not None),
        ("--isl", options.isl is not None, "--prompts", options.prompts is not None),
        ("--isl", options.isl is not None, "--trace", options.trace is not None),
        ("--osl", options.osl is not None, "--trace", options.trace is not None),
    )
    for name, is_given, other, is_there in excludes:
        if is_given and is_there:
            raise _invalid(name, f"cannot go with {other}")


def _numbers(text: str, option: str, kind: type[int] | type[float]) -> list[float]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < 1e6 for number in numbers):
        raise _invalid(option, f"{text!r} is no positive number, nor a list of them: 1,2,4")
    return numbers


def _invalid(option: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(option, description))

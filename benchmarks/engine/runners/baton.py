"""Measures Baton's engine in this process, as a worker's engine thread drives it.

python -m benchmarks.engine.runners.baton --model DIR --format bf16 --threads 2
"""

from collections.abc import Sequence as TokenIds

from baton.engine.base import EngineRequest, Failed, Mode, Token
from baton.engine.build import build_torch_engine
from baton.engine.config import EngineConfig
from baton.engine.engine import PagedEngine
from baton.kv.spec import WeightFormat
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence
from benchmarks.engine.protocol import Answer, Cell, runner_arguments, serve
from benchmarks.engine.sections import profiled
from benchmarks.engine.stepping import SteppedMeasure

POOL_TOKENS = 40_960
"""Enough for eight streams of 4,096 tokens."""
DTYPES = {"bf16": "bfloat16", "int8": "bfloat16", "f32": "float32"}
WEIGHTS = {"int8": WeightFormat.INT8}
"""None: in the dtype."""


class BatonStepper:
    """Implements `Stepper`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._default = build_torch_engine(config)
        self._engine = self._default
        self.vocab_size = self._engine.info.vocab_size

    def use_chunk(self, tokens: int | None) -> None:
        self._engine = self._default
        if tokens is not None:
            self._engine = PagedEngine(
                self._default.runner,
                max_batch_tokens=tokens,
                max_running=self._config.max_running,
                prefix_cache=False,
            )

    def add(self, request: str, prompt: TokenIds[int], max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        sequence = Sequence(tuple(prompt), (), sampling)
        key = AttemptKey(RequestId(request))
        self._engine.add(EngineRequest(key, sequence, Mode.LOCAL))

    def step(self) -> list[tuple[str, int]]:
        tokens = []
        for event in self._engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Token):
                tokens.append((str(event.key.request_id), 1))
        return tokens

    def abort(self, request: str) -> None:
        self._engine.release(AttemptKey(RequestId(request)))


class BatonMeasure:
    """All cells, and where a step's time goes in them."""

    def __init__(self, stepper: BatonStepper) -> None:
        self._measure = SteppedMeasure(stepper)

    def __call__(self, cell: Cell) -> Answer:
        return profiled(self._measure, cell) if cell.profile else self._measure(cell)


if __name__ == "__main__":
    args = runner_arguments()
    engine = EngineConfig(
        model=args.model,
        dtype=DTYPES[args.format],
        weights=WEIGHTS.get(args.format),
        kv_pool_tokens=POOL_TOKENS,
        prefix_cache=False,
        threads=args.threads,
        kernels=args.kernels,
    )
    serve(args.answers, BatonMeasure(BatonStepper(engine)))

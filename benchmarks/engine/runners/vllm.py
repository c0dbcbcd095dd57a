"""Measures vLLM: runs in vLLM's environment, with its engine in this process.

python -m benchmarks.engine.runners.vllm --model DIR --format bfloat16 --threads 2
"""

from collections.abc import Sequence

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from benchmarks.engine.protocol import runner_arguments, serve
from benchmarks.engine.stepping import SteppedMeasure


class VLLMStepper:
    """Implements `Stepper`. Its threads come from the environment."""

    def __init__(self, model: str, dtype: str) -> None:
        self._engine = LLM(
            model=model, dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=False
        ).llm_engine
        # vLLM takes a step's size when it is built, and reads it here in each step.
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._default_chunk: int = self._scheduler.max_num_scheduled_tokens
        self.vocab_size: int = self._engine.model_config.get_vocab_size()

    def use_chunk(self, tokens: int | None) -> None:
        # The default is also the most that its buffers hold.
        chunk = min(tokens or self._default_chunk, self._default_chunk)
        self._scheduler.max_num_scheduled_tokens = chunk

    def add(self, request: str, prompt: Sequence[int], max_tokens: int) -> None:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(request, {"prompt_token_ids": list(prompt)}, sampling)

    def step(self) -> list[tuple[str, int]]:
        outputs = self._engine.step()
        counts = [(output.request_id, len(output.outputs[0].token_ids)) for output in outputs]
        return [(name, count) for name, count in counts if count]

    def abort(self, request: str) -> None:
        self._engine.abort_request([request])


if __name__ == "__main__":
    args = runner_arguments()
    serve(args.answers, SteppedMeasure(VLLMStepper(args.model, args.format)))

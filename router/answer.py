"""All completions of one request: their generations run side by side, and one stream takes what they give.

The first completion brings the prompt's KV to a decode worker; the others start once it is there and find it in that worker's
prefix cache, so that the prompt is computed and shipped once, and its full blocks are shared. One that fails ends the answer.

Belongs to the request's task on the router's event loop; each generation runs in a task of its own.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import dataclass

from baton.kv.prefix import SequenceHashes
from baton.lifecycle import Timeline
from baton.service.metrics import RouterMetrics
from baton.service.settings import RouterSettings
from baton.service.tracing import NO_SPAN, Span
from baton.types import FinishReason
from router.attach import HeldAttempt
from router.fleet import Fleet
from router.generation import Complete, Generation
from router.output import Output, Outputs
from router.status.traffic import Meter
from router.text import OutputText, Tokenizer
from router.validation import ModelFacts, ValidRequest


@dataclass(frozen=True, slots=True)
class Known:
    """What a client has of a completion."""

    tokens: int = 0
    characters: int = 0


@dataclass(frozen=True, slots=True)
class Resumption:
    """What there is of an answer that another router, or another stream, began."""

    held: Mapping[int, HeldAttempt]
    """By completion; those that nobody holds are generated anew, which gives the same."""
    known: Seq[Known]
    deadline_unix_s: float = math.inf
    complete: Complete | None = None
    """All of the only completion, where it is known."""

    def left_s(self, now_unix_s: float) -> float:
        """What is left of the time that the request was first given."""
        return self.deadline_unix_s - now_unix_s

    @property
    def is_told_again(self) -> bool:
        """Whether nothing of it is new."""
        return self.complete is not None

    @property
    def earlier_tokens(self) -> int:
        """Of the output, those that were generated before."""
        complete = 0 if self.complete is None else len(self.complete.tokens.token_ids)
        return complete + sum(held.end_index for held in self.held.values())


NOTHING = Resumption({}, ())


class Answer:
    """See the module docstring."""

    def __init__(
        self,
        request: ValidRequest,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        *,
        fleet: Fleet,
        settings: RouterSettings,
        metrics: RouterMetrics,
        meter: Meter,
        timeline: Timeline,
        deadline_s: float,
        hashes: SequenceHashes,
        resumption: Resumption = NOTHING,
        span: Span = NO_SPAN,
    ) -> None:
        """`deadline_s` is on the monotonic clock; to keep it is the caller's part. `hashes` are the prompt's; `span` is the request's."""
        self._request = request
        self._fleet = fleet
        self._held = resumption.held
        self.outputs: list[Output] = []
        self.generations: list[Generation] = []
        for choice in range(request.sampling.n):
            known = resumption.known[choice] if choice < len(resumption.known) else Known()
            text = OutputText(
                tokenizer,
                request.sampling,
                prompt=request.prompt,
                eos_token_ids=facts.eos_token_ids,
            )
            output = Output(
                text,
                request.sampling.max_tokens,
                max_unread_bytes=settings.max_unread_bytes,
                choice=choice,
                known_tokens=known.tokens,
                known_characters=known.characters,
            )
            generation = Generation(
                request,
                output,
                # The request's stages are those of its first completion.
                timeline if choice == 0 else Timeline(received_s=timeline.received_s),
                fleet=fleet,
                settings=settings,
                metrics=metrics,
                meter=meter,
                deadline_s=deadline_s,
                hashes=hashes if choice == 0 else hashes.fork(),
                choice=choice,
                held=resumption.held.get(choice),
                complete=resumption.complete,
                span=span,
            )
            self.outputs.append(output)
            self.generations.append(generation)
        self.reasons: list[FinishReason] = []
        """How each completion ended, once all have."""

    @property
    def stage(self) -> str:
        """What the request waits for, for its deadline's error."""
        return self.generations[0].stage

    @property
    def rests(self) -> bool:
        """Whether tokens come joined already, as the workers were told."""
        return all(generation.rests for generation in self.generations)

    @property
    def completion_tokens(self) -> int:
        return sum(len(output.generated) for output in self.outputs)

    @property
    def longest_tokens(self) -> int:
        """Of its longest completion."""
        return max(len(output.generated) for output in self.outputs)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Outputs]:
        """Generates inside the context, which is left normally once all outputs were taken. Raises what a generation fails with."""
        self.generations[0].begin()
        drivers = [
            asyncio.create_task(self._drive(choice), name=f"{self._request.request_id}/{choice}")
            for choice in range(len(self.generations))
        ]
        try:
            yield Outputs(self.outputs)
            # A failed one closed all outputs: its error comes before those of the tasks that still run.
            for driver in drivers:
                if driver.done():
                    driver.result()
            self.reasons = [await driver for driver in drivers]
        finally:
            for driver in drivers:
                driver.cancel()
            # Where its task was cancelled before it ran.
            self.generations[0].let_go()
            if not all(driver.done() for driver in drivers):
                await asyncio.wait(drivers)
            for driver in drivers:
                if not driver.cancelled():
                    driver.exception()  # raised above, or something else ended the request first

    async def _drive(self, choice: int) -> FinishReason:
        generation, output = self.generations[choice], self.outputs[choice]
        try:
            if choice and choice not in self._held:
                await self._prompt_cached(generation)
            reason = await generation.run()
            output.finish()
        except BaseException:
            for each in self.outputs:
                each.close()
            raise
        finally:
            output.close()
        return reason

    async def _prompt_cached(self, waiting: Generation) -> None:
        first = self.generations[0]
        await first.prompt_cached.wait()
        if first.decode_worker:
            # Its next heartbeat will say so too, but the other completions are placed now.
            self._fleet.note_cached(first.decode_worker, waiting.hashes)

"""A long prompt's KV goes to decode while the rest of the prompt is computed.

The prefill engine's last chunk waits until the test lets it go: what decode does before, it does while the prompt is computed.
"""

import asyncio
import threading
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace

import pytest

from baton.engine.batch import BatchRow, Sampled
from baton.engine.sim import SimRunner
from baton.errors import BatonError, CorruptKVError, InternalError
from baton.kv.spec import SealedKV
from baton.service.settings import WorkerSettings
from baton.types import AttemptKey
from tests.worker_rig import SIM, Rig, error_of, key, sequence, worker_pair

LONG = replace(SIM, num_blocks=512, max_batch_tokens=128)
SEQUENCE = sequence(2000, max_tokens=8)
TOKEN_BYTES = 16
PIECES = WorkerSettings(max_pull_bytes=300 * TOKEN_BYTES)
"""[0, 1488) in five pieces, and [1488, 2000) in two."""
EARLY = 6
"""So many end before the last chunk does, which begins at token 1920."""
WAIT_S = 10.0


@dataclass
class Story:
    """What happened, in order, and what the last chunk waits for."""

    events: list[str] = field(default_factory=list)
    may_end: threading.Event = field(default_factory=threading.Event)
    fails: bool = False
    imported: int = 0
    waiters: list[tuple[int, asyncio.Event]] = field(default_factory=list)

    async def pieces(self, count: int) -> None:
        """Returns once decode has imported so many; they must come."""
        told = asyncio.Event()
        self.waiters.append((count, told))
        self._tell()
        async with asyncio.timeout(WAIT_S):
            await told.wait()

    def saw_import(self) -> None:
        self.events.append("import")
        self.imported += 1
        self._tell()

    def _tell(self) -> None:
        for count, told in self.waiters:
            if self.imported >= count:
                told.set()


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Story:
    """Of the engines of a pair that is started later."""
    story, run = Story(), SimRunner.run

    def gated(runner: SimRunner, rows: Rows[BatchRow]) -> list[Sampled | None]:
        if any(len(row.token_ids) > 1 and row.sample is not None for row in rows):
            assert story.may_end.wait(WAIT_S), "nobody let the last chunk go"
            if story.fails:
                raise InternalError("logits are not finite")
            results = run(runner, rows)
            story.events.append("last chunk")
            return results
        return run(runner, rows)

    monkeypatch.setattr(SimRunner, "run", gated)
    return story


def watch_imports(rig: Rig, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = rig.decode.host.engine
    import_kv = engine.import_kv

    async def seen(attempt: AttemptKey, first: int, kv: SealedKV) -> None:
        await import_kv(attempt, first, kv)
        story.saw_import()

    monkeypatch.setattr(engine, "import_kv", seen)


async def expected_tokens() -> list[int]:
    """What one worker alone says."""
    async with worker_pair(decode_sim=LONG) as rig:
        return (await rig.generate_locally(key("local"), SEQUENCE)).tokens


@pytest.mark.parametrize(
    ("settings", "early", "late"),
    [(WorkerSettings(), 1, 1), (PIECES, EARLY, 1)],
    ids=["two pieces", "many pieces"],
)
async def test_kv_is_imported_before_the_last_chunk_is_computed(
    story: Story, monkeypatch: pytest.MonkeyPatch, settings: WorkerSettings, early: int, late: int
) -> None:
    """Promise: for prompts over 1,024 tokens the handoff overlaps the computation; what is left after the prompt is the last piece."""
    async with worker_pair(prefill_sim=LONG, decode_sim=LONG, settings=settings) as rig:
        watch_imports(rig, story, monkeypatch)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(rig.generate(key("a"), SEQUENCE))
            await story.pieces(early)
            load = await rig.decode.host.engine.refresh_load()
            story.may_end.set()
        answer = running.result()
        assert story.events == [*["import"] * early, "last chunk", *["import"] * late]
        assert load.reserved_blocks * 16 > 2000, "decode held the blocks of the whole prompt before"
        assert answer.kv_bytes == 2000 * TOKEN_BYTES
        await rig.settled()
    assert answer.tokens == await expected_tokens()


async def test_a_short_prompt_is_handed_over_once_it_is_done(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    story.may_end.set()
    async with worker_pair(prefill_sim=LONG, decode_sim=LONG) as rig:
        watch_imports(rig, story, monkeypatch)
        await rig.generate(key("a"), sequence(1024))
        await rig.settled()
    assert story.events == ["last chunk", "import"]


async def test_without_room_for_copies_nothing_is_pulled_before_the_prompt_is_done(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: the host memory of copies is bounded, by a slower handoff with the same tokens."""
    story.may_end.set()
    settings = WorkerSettings(kept_kv_bytes=2000 * TOKEN_BYTES - 1)
    async with worker_pair(prefill_sim=LONG, decode_sim=LONG, settings=settings) as rig:
        watch_imports(rig, story, monkeypatch)
        answer = await rig.generate(key("a"), SEQUENCE)
        await rig.settled()
    assert story.events == ["last chunk", "import", "import"]
    assert answer.tokens == await expected_tokens()


@pytest.mark.parametrize("pieces", range(1, EARLY + 1))
@pytest.mark.parametrize("leaver", ["caller", "prefill", "decode"])
async def test_an_end_between_pieces_frees_everything_on_both_sides(
    story: Story, monkeypatch: pytest.MonkeyPatch, pieces: int, leaver: str
) -> None:
    """Promise: whoever ends an attempt, after whatever piece, no block, copy or credit stays held."""
    async with worker_pair(prefill_sim=LONG, decode_sim=LONG, settings=PIECES) as rig:
        watch_imports(rig, story, monkeypatch)
        decode = rig.decode_call(key("a"), SEQUENCE)
        await decode.read()
        prefill = rig.prefill_call(key("a"), SEQUENCE)
        await story.pieces(pieces)
        if leaver == "caller":
            decode.cancel()
            prefill.cancel()
        elif leaver == "prefill":
            prefill.cancel()
            # Let go before the worker knows, the last chunk would complete the handoff.
            async with asyncio.timeout(WAIT_S):
                while rig.prefill.host.num_calls:  # noqa: ASYNC110 - a worker tells nobody
                    await asyncio.sleep(0.001)
        else:
            decode.cancel()
        story.may_end.set()
        if leaver == "prefill":
            assert isinstance(await error_of(decode), BatonError)
        if leaver == "decode":
            prefill.cancel()
        await rig.settled()
        assert not rig.prefill._prefiller._kept_bytes


async def test_a_prompt_that_fails_after_pieces_were_pulled_goes_on_from_them(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: what decode has of a failed attempt is sound KV; the next attempt need not bring it again, and says the same."""
    story.fails = True
    async with worker_pair(prefill_sim=LONG, decode_sim=LONG, settings=PIECES) as rig:
        watch_imports(rig, story, monkeypatch)
        running = asyncio.create_task(rig.generate(key("a"), SEQUENCE))
        await story.pieces(EARLY)
        story.may_end.set()
        with pytest.raises(BatonError):
            await running
        await rig.settled()
        story.fails = False
        again = await rig.generate(key("a", 1), SEQUENCE)
        assert again.cached_tokens == 1744
        assert again.kv_bytes == (2000 - again.cached_tokens) * TOKEN_BYTES
        await rig.settled()
    assert again.tokens == await expected_tokens()


async def test_a_piece_that_is_not_what_was_sealed_fails_its_attempt_before_the_prompt_is_done(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: every piece is verified where it is imported, and one that is not sound leaves nothing behind."""
    async with worker_pair(prefill_sim=LONG, decode_sim=LONG, settings=PIECES) as rig:
        engine = rig.decode.host.engine
        import_kv = engine.import_kv

        async def flipping(attempt: AttemptKey, first: int, kv: SealedKV) -> None:
            if first and not story.may_end.is_set():
                data = kv.data.copy()
                data[0, 0, 0, 0, 0] += 1
                kv = SealedKV(data, kv.checksum)
            await import_kv(attempt, first, kv)

        monkeypatch.setattr(engine, "import_kv", flipping)
        decode = rig.decode_call(key("a"), SEQUENCE)
        await decode.read()
        prefill = rig.prefill_call(key("a"), SEQUENCE)
        assert isinstance(await error_of(decode), CorruptKVError)
        prefill.cancel()
        story.may_end.set()
        await rig.settled()
        again = await rig.generate(key("a", 1), SEQUENCE)
        assert again.cached_tokens == 297 // 16 * 16, "the first piece was sound"
    assert again.tokens == await expected_tokens()


async def test_many_long_prompts_at_once_keep_their_own_tokens(story: Story) -> None:
    """Promise: pieces of one prompt never reach another, whatever order they come in, also where credit lasts for one at a time."""
    story.may_end.set()
    small = replace(LONG, num_blocks=64, max_batch_tokens=32)
    settings = WorkerSettings(overlap_tokens=8, max_pull_bytes=7 * TOKEN_BYTES)
    async with worker_pair(prefill_sim=small, decode_sim=small, settings=settings) as rig:
        jobs = [sequence(30 + 7 * i, max_tokens=5, start=i) for i in range(12)]
        answers = await asyncio.gather(
            *(rig.generate(key(f"r{i}"), job) for i, job in enumerate(jobs))
        )
        for i, job in enumerate(jobs):
            alone = await rig.generate_locally(key(f"local{i}"), job)
            assert answers[i].tokens == alone.tokens
        await rig.settled()

"""Records of requests that never ran, for tests of what follows from them."""

from collections.abc import Sequence

from hypothesis import strategies as st

from baton.bench.levels import Level, Measured
from baton.bench.records import OK, UNFINISHED, Record
from baton.client import Timings


def record(
    index: int = 0,
    *,
    due_s: float = 10.0,
    late_s: float = 0.0,
    ttft_s: float = 0.1,
    gaps_s: Sequence[float] = (0.02, 0.02),
    tokens: int | None = None,
    status: str = OK,
) -> Record:
    """Sent `late_s` after it was due; one token in each part, or `tokens` in all by the server's count."""
    sent_s = due_s + late_s
    chunks = [sent_s + ttft_s]
    for gap_s in gaps_s:
        chunks.append(chunks[-1] + gap_s)
    return Record(
        index=index,
        scheduled_s=due_s,
        sent_s=sent_s,
        was_sent=True,
        chunk_s=chunks,
        chunk_tokens=[1] * len(chunks),
        ended_s=chunks[-1] + 0.001,
        planned_input_tokens=7,
        planned_output_tokens=len(chunks),
        prompt_tokens=8,
        cached_tokens=0,
        completion_tokens=tokens,
        status=status,
        message="" if status in (OK, UNFINISHED) else "no room",
    )


TIMINGS = Timings(
    admitted_at_s=0.01,
    placed_at_s=0.02,
    reserved_at_s=0.03,
    prefill_started_at_s=0.04,
    first_token_at_s=0.09,
    kv_received_at_s=0.1,
    last_token_at_s=0.2,
    finished_at_s=0.2,
    prefill_queue_s=0.0,
    prefill_s=0.05,
    handoff_s=0.01,
    handoff_bytes=10,
    preemptions=0,
)

durations = st.floats(0, 30)
records = st.builds(
    record,
    index=st.integers(0, 1000),
    due_s=st.floats(1, 100),
    late_s=durations,
    ttft_s=durations,
    gaps_s=st.lists(durations, max_size=5),
    tokens=st.none() | st.integers(1, 9),
    status=st.sampled_from((OK, OK, UNFINISHED, "RESOURCE_EXHAUSTED", "429")),
)


def measured(*given: Record, level: Level | None = None, **changes: object) -> Measured:
    values: dict[str, object] = {
        "level": level or Level(concurrency=2),
        "records": given,
        "began_s": 10.0,
        "began_unix_s": 1.7e9,
        "wall_s": 2.0,
        "client_cpu_s": 0.1,
        "lost": "",
        "interrupted": False,
    }
    return Measured(**values | changes)  # type: ignore[arg-type]

"""How far a model's weights are loaded, and when that is worth telling. Torch-free, because whoever shows it may be another process."""

import time
from collections.abc import Callable

Progress = Callable[[int, int], object]
"""Called with (loaded bytes, all bytes)."""

FIRST_S = 0.5
"""A load that takes less is not worth a word."""
LINE_INTERVAL_S = 5.0
"""Between two lines of a log."""


def paced(
    progress: Progress,
    *,
    interval_s: float = LINE_INTERVAL_S,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Passes on what is reported from `FIRST_S` after the first report on, and at most one report in each interval."""
    due_s: float | None = None

    def pass_on(loaded_bytes: int, total_bytes: int) -> None:
        nonlocal due_s
        now_s = clock()
        if due_s is None:
            due_s = now_s + FIRST_S
        if now_s >= due_s:
            due_s = now_s + interval_s
            progress(loaded_bytes, total_bytes)

    return pass_on


def in_words(loaded_bytes: int, total_bytes: int) -> str:
    """`512 of 15,360 MiB of weights`."""
    return f"{loaded_bytes >> 20:,} of {total_bytes >> 20:,} MiB of weights"

"""What `baton serve` tells its terminal: progress while workers start, the banner, and events of the fleet afterwards.

All of it goes to stderr. Where stdout is no terminal, it gets one line for scripts: `ready 127.0.0.1:50051`.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from baton import __version__
from baton.cli.config import ServeConfig
from baton.engine.progress import Progress, in_words, paced
from baton.service.settings import LogFormat
from baton.types import WorkerInfo

BAR_CELLS = 40


class LoadBars:
    """A step under way, with a bar beneath it for each worker that loads its weights. Changed on the event loop, drawn by rich's thread."""

    def __init__(self, step: str) -> None:
        self._step = step
        self._loaded: dict[str, tuple[int, int]] = {}

    def show(self, worker_id: str, loaded_bytes: int, total_bytes: int) -> None:
        self._loaded[worker_id] = (loaded_bytes, total_bytes)

    def remove(self, worker_id: str) -> None:
        """It may have none."""
        self._loaded.pop(worker_id, None)

    def __rich__(self) -> RenderableType:
        bars = Table.grid(padding=(0, 1))
        for worker_id, (loaded, total) in list(self._loaded.items()):
            bar = ProgressBar(total=total, completed=loaded, width=BAR_CELLS)
            bars.add_row(escape(worker_id), bar, in_words(loaded, total))
        step = f"[bold]{escape(self._step)}[/]"
        return Group(step, bars) if bars.rows else Text.from_markup(step)


class Announcer:
    """Speaks to people, or with JSON logs to machines. Used on the serve process's event loop only."""

    def __init__(
        self,
        console: Console,
        log_format: LogFormat,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._json = log_format is LogFormat.JSON
        self._clock = clock
        self._bars: LoadBars | None = None
        """While a terminal shows a step."""
        self._began_s = clock()

    @contextmanager
    def starting(self, step: str) -> Iterator[None]:
        """Shows that something is under way: a spinner on a terminal, a line elsewhere."""
        if self._json or not self._console.is_terminal:
            self.event(step)
            yield
            return
        self._bars = LoadBars(step)
        try:
            with self._console.status(self._bars):
                yield
        finally:
            self._bars = None

    @contextmanager
    def loading(self, worker_id: str) -> Iterator[Progress]:
        """Shows how much of its weights a worker has loaded, where that takes a while: a bar beneath the spinner, or a line now and then.
        To be told on the event loop.
        """
        bars = self._bars
        if bars is None:
            yield paced(
                lambda *loaded: self.event(f"{worker_id} loaded {in_words(*loaded)}"),
                clock=self._clock,
            )
            return
        try:
            yield paced(partial(bars.show, worker_id), interval_s=0.0, clock=self._clock)
        finally:
            bars.remove(worker_id)

    def event(self, message: str, *, style: str = "dim") -> None:
        """One line about the fleet."""
        if self._json:
            self._write_json("event", message=message)
        else:
            elapsed_s = self._clock() - self._began_s
            self._console.print(
                f"[dim]{elapsed_s:6.1f} s[/]  [{style}]{escape(message)}[/]", soft_wrap=True
            )

    def banner(self, config: ServeConfig, workers: Sequence[WorkerInfo], *, tls: bool) -> None:
        """Everything that one wants to know of a deployment; `tls` is what its clients have to speak."""
        settings = effective(config)
        if self._json:
            self._write_json("config", **settings)
            return
        first = workers[0]
        self._console.print(f"\n[bold]Baton {__version__}[/]  {escape(first.model)}")
        grid = Table.grid(padding=(0, 2))
        spec = first.spec
        grid.add_row(
            "model",
            f"{spec.dtype.value} on {first.device}, {spec.num_layers} layers, vocabulary {first.vocab_size}, "
            f"context {first.max_context_tokens} tokens, weights {spec.model_fingerprint[:12]}",
        )
        grid.add_row(
            "router",
            f"{config.address}  [dim]metrics http://{_host(config)}:{config.metrics_port}/metrics[/]",
        )
        if config.http:
            url = f"{'https' if tls else 'http'}://{config.http}"
            grid.add_row("OpenAI API", f"{url}/v1")
            grid.add_row("status page", f"{url}/")
        for worker in workers:
            grid.add_row(worker.role.value, _describe(worker))
        grid.add_row(
            "config", escape(" ".join(f"{name}={value}" for name, value in settings.items()))
        )
        self._console.print(grid)

    def ready(self, config: ServeConfig) -> None:
        """The line that scripts wait for."""
        elapsed_s = self._clock() - self._began_s
        if self._json:
            seconds = round(elapsed_s, 3)
            self._write_json("ready", address=config.address, http=config.http, seconds=seconds)
        else:
            self._console.print(
                f"\n[bold green]ready[/] in {elapsed_s:.1f} s. Ask: [bold]baton chat --address {config.address}[/]; "
                "Ctrl-C drains and stops.\n",
                soft_wrap=True,
            )
            if not sys.stdout.isatty():
                print(f"ready {config.address}", flush=True)

    def _write_json(self, kind: str, **fields: object) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "kind": kind, **fields}, default=str)
        print(line, file=sys.stdout if kind == "ready" else sys.stderr, flush=True)


def _host(config: ServeConfig) -> str:
    return config.address.rpartition(":")[0]


def _weights(worker: WorkerInfo) -> str:
    own = worker.weight_format.value
    return "" if own == worker.spec.dtype.value else f"{own} weights, "


def _describe(worker: WorkerInfo) -> str:
    tokens = worker.num_blocks * worker.block_size_tokens
    pool = tokens * worker.spec.token_bytes / 2**20
    metrics = f", metrics http://{worker.metrics_address}/metrics" if worker.metrics_address else ""
    return (
        f"{worker.address}  {_weights(worker)}KV pool {tokens:,} tokens ({worker.num_blocks:,} blocks of {worker.block_size_tokens}, "
        f"{pool:,.0f} MiB)  [dim]{escape(worker.worker_id)}, pid {worker.pid}{metrics}[/]"
    )


_TOLD_BY_ROLE = {"engine", "weights", "imports_prompts", "prompt_weights"}


def effective(config: ServeConfig) -> dict[str, object]:
    """Every setting by name, as resolved; enums by their value."""
    named: dict[str, object] = {}
    for group in (config, config.engine):
        for each in dataclasses.fields(group):
            value: object = getattr(group, each.name)
            if each.name not in _TOLD_BY_ROLE:
                named[each.name] = value.value if isinstance(value, Enum) else value
    return named

"""Runs an engine on a thread of its own and speaks to it from an event loop.

The engine's thread owns the engine: it is built there and touched nowhere else. The loop sends commands through a thread-safe
queue; they run between steps, in order. Whatever a turn of the thread brings about (results of commands, events, load, prefix
changes) goes back to the loop in one `call_soon_threadsafe`.

Once a step raises, the engine has failed for good: every open request and every later command gets `InternalError`.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from baton.engine.base import (
    Engine,
    EngineEvent,
    EngineInfo,
    EngineRequest,
    Failed,
    Held,
    Token,
)
from baton.engine.motion import Motion, StepClock
from baton.engine.pace import Pace
from baton.errors import AlreadyExistsError, InternalError
from baton.kv.spec import SealedKV
from baton.types import AttemptKey, BlockHash, PrefixDelta, WorkerLoad

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_Command = Callable[[Engine, list[Callable[[], None]]], None]
"""Runs between steps; adds what the loop is to be told."""

LOAD_INTERVAL_S = 0.02
"""Counting blocks costs as much as a small step, so the load snapshot of a busy engine may be this old."""


class PrefixFeed:
    """One reader's view of the prefix cache's changes. Used on the loop."""

    def __init__(self, hashes: set[BlockHash], close: Callable[["PrefixFeed"], None]) -> None:
        self._stored = set(hashes)
        self._evicted: set[BlockHash] = set()
        self._close = close

    def take(self) -> PrefixDelta:
        """Changes since the last call; the first call returns the whole cache."""
        delta = PrefixDelta(stored=tuple(self._stored), evicted=tuple(self._evicted))
        self._stored.clear()
        self._evicted.clear()
        return delta

    def close(self) -> None:
        self._close(self)

    def apply(self, delta: PrefixDelta) -> None:
        """Adds a change. Called by the engine's owner only."""
        for block_hash in delta.evicted:
            self._stored.discard(block_hash)
            self._evicted.add(block_hash)
        for block_hash in delta.stored:
            self._evicted.discard(block_hash)
            self._stored.add(block_hash)


class _Stream:
    """Events of one request that the loop has not consumed yet."""

    def __init__(self, pace: Pace | None) -> None:
        self._pace = pace
        self._has_begun = False
        """The first token has come."""
        self._events: list[EngineEvent] = []
        self._finished = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def push(self, event: EngineEvent) -> None:
        if isinstance(event, Failed):
            return self.fail(event.error)
        self._events.append(event)
        if isinstance(event, Token):
            self._finished = event.finish is not None
            rests, self._has_begun = self._has_begun and not self._finished, True
        else:
            rests = False
        if rests and self._pace is not None:
            self._pace.wake(self._changed)
        else:
            self.wake()
        return None

    def fail(self, error: Exception) -> None:
        self._error = error
        self.wake()

    def wake(self) -> None:
        """Whatever there is can be read now."""
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[tuple[EngineEvent, ...]]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._events:
                yield self._take()
            if self._error is not None:
                raise self._error
            if self._finished and not self._events:
                return

    def _take(self) -> tuple[EngineEvent, ...]:
        """What has come; nothing here holds it any longer."""
        events, self._events = tuple(self._events), []
        return events


@dataclass(slots=True)
class _Turn:
    """What one turn of the engine's thread has to tell the loop."""

    results: list[Callable[[], None]]
    events: tuple[EngineEvent, ...]
    load: WorkerLoad | None
    prefix: PrefixDelta


class AsyncEngine:
    """See the module docstring. All methods belong to the loop on which `start` was called."""

    def __init__(self, build: Callable[[], Engine], *, name: str) -> None:
        """`build` runs on the engine's thread."""
        self._build = build
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._streams: dict[AttemptKey, _Stream] = {}
        self._feeds: list[PrefixFeed] = []
        self._hashes: set[BlockHash] = set()
        self._load = WorkerLoad()
        self._failure: str | None = None
        self._clock = StepClock()
        self._motion = Motion()
        self._pending: set[asyncio.Future[Any]] = set()
        """Calls that the thread has not answered."""

    async def start(self) -> EngineInfo:
        """Builds the engine and starts stepping. Raises what `build` raises."""
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._thread.start()
        self._info = await self._ready
        return self._info

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def load(self) -> WorkerLoad:
        """The latest snapshot."""
        return self._load

    @property
    def failed(self) -> bool:
        """Whether a step raised; nothing works any more then."""
        return self._failure is not None

    @property
    def stalled_s(self) -> float:
        """How long the current step or command has been running; 0 while idle."""
        return self._clock.stalled_s

    @property
    def expected_s(self) -> float | None:
        """What the current step should take at most, by those of its size before it; None where nothing tells."""
        return self._clock.expected_s

    @property
    def stuck_s(self) -> float:
        """How long requests have waited while nothing was computed and no block changed hands; 0 while none waits."""
        return self._motion.stuck_s(time.monotonic())

    @asynccontextmanager
    async def open(
        self, request: EngineRequest, pace: Pace | None = None
    ) -> AsyncIterator[AsyncIterator[tuple[EngineEvent, ...]]]:
        """Queues a request and yields its events; see `baton.engine.base`. Each item holds all events since the one before it; the
        iterator ends after the last event and raises a `Failed` event's error. Tokens come at the pace, where there is one; the first and
        the last one, and all other events, at once, with what was left. Leaving the context, however, releases all that is
        held under the key.

        Raises `InvalidRequestError` and `AlreadyExistsError`.
        """
        key = request.key
        if key in self._streams:
            raise AlreadyExistsError(f"attempt {key} is already here")
        stream = self._streams[key] = _Stream(pace)
        try:
            await self._call(lambda engine: engine.add(request))
            yield aiter(stream)
        finally:
            del self._streams[key]
            self._post(lambda engine: engine.release(key))

    async def export_kv(self, key: AttemptKey, first: int, last: int) -> SealedKV:
        """See `Engine.export_kv`."""
        return await self._call(lambda engine: engine.export_kv(key, first, last))

    async def hold(self, key: AttemptKey) -> Held:
        """See `Engine.hold`. The request's stream stays open, and has every token before this returns."""
        held = await self._call(lambda engine: engine.hold(key))
        if stream := self._streams.get(key):
            stream.wake()
        return held

    def resume(self, key: AttemptKey) -> None:
        """See `Engine.resume`. After what was asked before."""
        self._post(lambda engine: engine.resume(key))

    async def import_kv(self, key: AttemptKey, first: int, kv: SealedKV) -> None:
        """See `Engine.import_kv`. The buffer must stay valid until this returns or, if cancelled, until the engine has moved on: the
        command keeps a reference to it.
        """
        await self._call(lambda engine: engine.import_kv(key, first, kv))

    async def start_decode(self, key: AttemptKey, first_token: int | None) -> None:
        """See `Engine.start_decode`."""
        await self._call(lambda engine: engine.start_decode(key, first_token))

    async def release(self, key: AttemptKey) -> bool:
        """See `Engine.release`. An open stream of that key ends with an error."""
        stream = self._streams.get(key)
        if stream is not None:
            stream.fail(InternalError(f"attempt {key} was released"))
        return await asyncio.shield(self._send(lambda engine: engine.release(key)))

    async def check_integrity(self) -> None:
        """See `Engine.check_integrity`."""
        await self._call(lambda engine: engine.check_integrity())

    async def refresh_load(self) -> WorkerLoad:
        """The load after every command sent so far."""
        self._load = await self._call(lambda engine: engine.load())
        return self._load

    async def orphaned_blocks(self) -> int:
        """Blocks that are held, but by no request whose stream is open. A release that is under way comes first."""
        owned = frozenset(self._streams)
        return await self._call(lambda engine: engine.orphaned_blocks(owned))

    def prefix_feed(self) -> PrefixFeed:
        """A new reader of the prefix cache's changes; close it when done."""
        feed = PrefixFeed(self._hashes, self._feeds.remove)
        self._feeds.append(feed)
        return feed

    def give_up(self, why: str) -> None:
        """Declares the engine failed, for an owner that sees it hang."""
        self._fail(f"the engine failed: {why}")

    async def stop(self) -> None:
        """Ends the thread after the current step. Open streams fail, also where the caller does not wait for the end."""
        self._commands.put(None)
        try:
            await self._ended.wait()
        finally:
            self._fail("the engine was stopped")

    async def _call(self, command: Callable[[Engine], _T]) -> _T:
        """What `command` returns. A caller that is cancelled before the engine gets to it leaves the engine as it is."""
        return await self._send(command)

    def _send(self, command: Callable[[Engine], _T]) -> asyncio.Future[_T]:
        if self._failure is not None:
            raise InternalError(self._failure)
        future: asyncio.Future[_T] = self._loop.create_future()

        def run(engine: Engine, results: list[Callable[[], None]]) -> None:
            if future.cancelled():
                return
            try:
                value = command(engine)
            except Exception as error:  # noqa: BLE001 - it belongs to the caller
                results.append(partial(_reject, future, error))
            else:
                results.append(partial(_resolve, future, value))

        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._commands.put(run)
        return future

    def _post(self, command: Callable[[Engine], object]) -> None:
        """Like `_call`, for commands that cannot fail and that nobody waits for."""

        def run(engine: Engine, _results: list[Callable[[], None]]) -> None:
            command(engine)

        self._commands.put(run)

    def _run(self) -> None:
        """The engine's thread."""
        _name_for_the_system("baton-engine")
        try:
            self._build_and_turn()
        finally:
            self._tell(self._ended.set)

    def _build_and_turn(self) -> None:
        try:
            engine = self._build()
        except BaseException as error:  # noqa: BLE001 - it belongs to `start`
            self._tell(partial(_reject, self._ready, error))
            return
        self._tell(partial(_resolve, self._ready, engine.info))
        try:
            self._turn_until_stopped(engine)
        except Exception as error:  # noqa: BLE001 - logged, and told to every caller
            _log.exception("the engine failed")
            self._tell(partial(self._fail, f"the engine failed: {error}"))

    def _turn_until_stopped(self, engine: Engine) -> None:
        load_at_s = 0.0
        while True:
            results: list[Callable[[], None]] = []
            wait = not engine.has_work()
            while True:
                try:
                    command = self._commands.get(block=wait)
                except queue.Empty:
                    break
                if command is None:
                    return
                self._clock.begin()
                command(engine, results)
                self._clock.end()
                wait = False
                del command  # its buffers are not kept while idle
            events: tuple[EngineEvent, ...] = ()
            if engine.has_work():
                self._clock.begin()
                events = engine.step(self._clock.computes)
                self._clock.end()
            load = None
            now_s = time.monotonic()
            if not engine.has_work() or now_s - load_at_s > LOAD_INTERVAL_S:
                load, load_at_s = engine.load(), now_s
            turn = _Turn(results, events, load, engine.take_prefix_delta())
            self._tell(partial(self._settle, turn))
            del results, events, turn  # nor are copies of KV

    def _tell(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            _log.debug("the event loop has closed before the engine stopped")

    def _settle(self, turn: _Turn) -> None:
        """On the loop: delivers one turn."""
        if turn.load is not None:
            self._motion.saw(turn.load, time.monotonic(), computed=bool(turn.events))
            self._load = turn.load
        elif turn.events:
            self._motion.saw(self._load, time.monotonic(), computed=True)
        if turn.prefix.stored or turn.prefix.evicted:
            self._hashes.difference_update(turn.prefix.evicted)
            self._hashes.update(turn.prefix.stored)
            for feed in self._feeds:
                feed.apply(turn.prefix)
        for deliver in turn.results:
            deliver()
        for event in turn.events:
            stream = self._streams.get(event.key)
            if stream is not None:
                stream.push(event)

    def _fail(self, message: str) -> None:
        """On the loop: nothing works any more."""
        self._failure = message
        for stream in self._streams.values():
            stream.fail(InternalError(message))
        for future in list(self._pending):
            _reject(future, InternalError(message))


def _resolve(future: asyncio.Future[_T], value: _T) -> None:
    if not future.done():
        future.set_result(value)


def _reject(future: asyncio.Future[_T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _name_for_the_system(name: str) -> None:
    """What `top` and `ps` call this thread: 15 characters at most, on Linux only. Python does not tell the system its own names."""
    with suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)

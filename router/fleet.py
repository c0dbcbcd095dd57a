"""Membership: workers join over gRPC, hold a lease by heartbeat, and are told of to whoever uses them.

`Fleet` puts the pure parts to work: the registry's books, the policy's choice, one `Member` with a channel for each worker. A membership
is one Join call (`router.joining`), and ends with it or with its lease. All on the router's event loop; nothing here awaits while
the books are open.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from baton.errors import FieldViolation, InvalidRequestError, UnavailableError
from baton.kv.prefix import SequenceHashes
from baton.kv.spec import WeightFormat
from baton.service.channel import open_channel
from baton.service.metrics import RouterMetrics
from baton.service.settings import RouterSettings
from baton.types import PrefixDelta, Role, WorkerId, WorkerInfo, WorkerLoad
from router.members import Member, Pair
from router.placement import (
    FleetView,
    NoWorker,
    Placement,
    PlaceRequest,
    Policy,
    Resident,
)
from router.registry import Claim, Registry
from router.releases import Releases

_log = logging.getLogger(__name__)

SILENCE_S = 1.0
"""A member that was not heard for two heartbeats, and for so long at least, gets requests only where no other can."""


MAX_GONE = 64
"""Workers that are no members any more, and may join again, for which releases are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReport:
    """A member, for who watches the fleet."""

    info: WorkerInfo
    load: WorkerLoad
    member_s: float
    """How long it has been a member."""
    heard_s: float
    """How long ago it reported."""
    draining: bool
    stalled: bool
    silent: bool
    suspect: bool


@dataclass(frozen=True, slots=True)
class Held:
    """The workers of one attempt, and its load on them until `release`."""

    placement: Placement
    pair: Pair
    _registry: Registry
    _decode: Claim
    _prefill: Claim | None

    def sent(self) -> None:
        """Decode was called: later heartbeats include this attempt."""
        self._registry.sent(self._decode, time.monotonic())

    def prefill_sent(self) -> None:
        """Prefill was called."""
        assert self._prefill is not None
        self._registry.sent(self._prefill, time.monotonic())

    def release(self) -> None:
        """Takes the load off. Idempotent."""
        self._registry.release(self._decode)
        if self._prefill is not None:
            self._registry.release(self._prefill)


@dataclass(frozen=True, slots=True)
class _Placed:
    """The last decision, and all that it follows from."""

    hashes: SequenceHashes
    asked: tuple[object, ...]
    version: int
    placement: Placement | NoWorker


class Fleet:
    """See the module docstring."""

    def __init__(
        self,
        settings: RouterSettings,
        policy: Policy,
        metrics: RouterMetrics,
        rest_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`rest_s` tells how long tokens may wait for more."""
        self._rest_s = rest_s
        self.registry = Registry(silence_s=max(SILENCE_S, 2 * settings.heartbeat_s))
        self._settings = settings
        self._policy = policy
        self._metrics = metrics
        self._members: dict[WorkerId, Member] = {}
        self._releases: dict[WorkerId, Releases] = {}
        """Of members, and of some that were; whoever joined last stands last."""
        self._draining: set[WorkerId] = set()
        self._changed = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._turn = 0
        self._placed: _Placed | None = None

    def join(self, info: WorkerInfo) -> Member:
        """Makes a worker a member, in place of an earlier one of the same id."""
        earlier = self._members.get(info.worker_id)
        if earlier is not None:
            self.leave(earlier, "it joined anew")
        session = self.registry.join(info, time.monotonic())
        releases = self._releases.pop(info.worker_id, None) or Releases()
        self._releases[info.worker_id] = releases
        channel = open_channel(info.address, self._settings)
        member = Member(info, session, channel, releases, self._rest_s)
        self._members[info.worker_id] = member
        _log.info("%s worker %s joined at %s", info.role.value, info.worker_id, info.address)
        self._tell()
        return member

    def heartbeat(
        self,
        member: Member,
        load: WorkerLoad,
        prefix: PrefixDelta,
        *,
        draining: bool,
        stalled: bool = False,
    ) -> None:
        """Takes a member's report in. A stalled one is given nothing new, but keeps what it runs."""
        closed = draining or stalled
        current = self.registry.heartbeat(
            member.worker_id,
            member.session,
            load,
            prefix,
            draining=closed,
            now_s=time.monotonic(),
        )
        if not current:
            return
        member.set_draining(draining=draining)
        member.stalled = stalled
        if closed != (member.worker_id in self._draining):
            self._draining ^= {member.worker_id}
            why = "drains" if draining else "stalls"
            _log.info("worker %s %s", member.worker_id, why if closed else "takes requests again")
            self._tell()

    def change_role(self, member: Member, info: WorkerInfo) -> None:
        """A member tells that its role is another: what runs on it goes on, new requests come in the new role. Raises
        `InvalidRequestError` where it tells of any other difference.
        """
        if replace(info, role=member.info.role) != member.info:
            raise InvalidRequestError(
                FieldViolation("announce.info", "nothing but the role of a member can change")
            )
        if self.registry.change_role(member.worker_id, member.session, info.role):
            member.info = info
            self._metrics.record_role_change(info.role)
            _log.info("worker %s is a %s worker now", member.worker_id, info.role.value)
            self._tell()

    def leave(self, member: Member, why: str) -> None:
        """Ends a membership: its attempts fail now, its channel closes when they have let go. Idempotent."""
        if not self.registry.leave(member.worker_id, member.session):
            return
        del self._members[member.worker_id]
        self._draining.discard(member.worker_id)
        _log.info("worker %s left: %s", member.worker_id, why)
        member.lose(why)
        gone = [worker_id for worker_id in self._releases if worker_id not in self._members]
        for worker_id in gone[:-MAX_GONE]:
            del self._releases[worker_id]
        task = asyncio.create_task(member.close(), name=f"close {member.worker_id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self._tell()

    def place(
        self,
        hashes: SequenceHashes,
        *,
        avoid: frozenset[WorkerId] = frozenset(),
        digest: str | None = None,
        weights: WeightFormat | None = None,
        moves: bool = False,
        resident: Resident | None = None,
    ) -> Placement | NoWorker:
        """Chooses workers for a sequence; what the policy's `PlaceRequest` says of the arguments. Asked again before anything changed, it
        tells what it told.
        """
        asked = (len(hashes), avoid, digest, weights, moves, resident)
        last, version = self._placed, self.registry.version
        if (
            last is not None
            and last.hashes is hashes
            and (last.asked, last.version) == (asked, version)
        ):
            return last.placement
        self._turn += 1
        request = PlaceRequest(
            num_tokens=len(hashes),
            turn=self._turn,
            avoid=avoid,
            digest=digest,
            weights=weights,
            moves=moves,
            last_decode=None if resident is None else resident.worker_id,
        )
        began_s = time.perf_counter()
        placement = self._policy.place(self._view(hashes, resident), request)
        self._metrics.record_placement(time.perf_counter() - began_s)
        self._placed = _Placed(hashes, asked, self.registry.version, placement)
        return placement

    def predicted_ttft_s(self, hashes: SequenceHashes, resident: Resident | None) -> float | None:
        """From now to the first token, were a sequence placed now; None where that is not known."""
        placement = self.place(hashes, resident=resident)
        return placement.predicted_ttft_s if isinstance(placement, Placement) else None

    def can_place(self) -> bool:
        """Whether a short request would find its workers now."""
        view = self.registry.view({}, time.monotonic())
        return isinstance(self._policy.place(view, PlaceRequest(num_tokens=1)), Placement)

    def hold(self, placement: Placement, num_tokens: int, *, moves: bool = False) -> Held:
        """Puts an attempt's load on its workers. Precondition: placed just now. One that `moves` has its KV computed; decode takes it from
        another decode worker.
        """
        decode, prefill = placement.decode, placement.prefill
        computes = prefill is None and not moves
        local_tokens = num_tokens - placement.skip_tokens if computes else 0
        pair = Pair(None, self._members[decode.info.worker_id])
        own, other = _claim(decode.info, local_tokens, num_tokens), None
        self.registry.claim(own)
        if prefill is not None:
            tokens = num_tokens - placement.prefill_cached_tokens
            other = _claim(prefill.info, tokens, num_tokens)
            pair = Pair(self._members[prefill.info.worker_id], pair.decode)
            self.registry.claim(other)
        return Held(placement, pair, self.registry, own, other)

    def note_cached(self, worker_id: WorkerId, hashes: SequenceHashes) -> None:
        """A worker was seen to hold a sequence's KV; its heartbeats go on from there."""
        for size in self.registry.block_sizes():
            self.registry.note_cached(worker_id, size, hashes.of(size))

    def reports(self) -> list[MemberReport]:
        """Every member, in order of joining."""
        now_s = time.monotonic()
        reports = []
        for heard in self.registry.heard(now_s):
            member = self._members[heard.info.worker_id]
            report = MemberReport(
                info=heard.info,
                load=heard.load,
                member_s=now_s - member.joined_at_s,
                heard_s=now_s - heard.at_s,
                draining=member.draining,
                stalled=member.stalled,
                silent=heard.silent,
                suspect=heard.suspect,
            )
            reports.append(report)
        return reports

    def members(self) -> list[Member]:
        """Everybody."""
        return list(self._members.values())

    def decode_members(self) -> list[Member]:
        """Whoever can hold a request's attempts: the draining ones too, and those that turned to prefill since."""
        members = self._members.values()
        return [m for m in members if Role.DECODE in (m.info.role, *m.info.can_be)]

    async def set_role(self, worker_id: WorkerId, role: Role, drain_timeout_s: float) -> None:
        """Has a member turn to another role. Raises `UnavailableError` where it is no member, and what `Member.set_role` raises."""
        member = self._members.get(worker_id)
        if member is None:
            raise UnavailableError(f"worker {worker_id} is no member")
        await member.set_role(role, drain_timeout_s)

    def suspect(self, worker_id: WorkerId) -> None:
        """A worker failed an attempt; see `Registry.suspect`."""
        self.registry.suspect(worker_id, time.monotonic())

    async def wait_for_change(self, timeout_s: float) -> bool:
        """Returns once a worker joined, left, or changed its mind about draining; False after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def keep_orphans(self) -> None:
        """From now on, what decode does for requests that end here is not released: this router stops."""
        for member in self._members.values():
            member.keeps_orphans = True

    async def close(self) -> None:
        """Loses every member. Idempotent."""
        for member in tuple(self._members.values()):
            self.leave(member, "the router stops")
        while self._closing:
            await asyncio.wait(self._closing)

    def _view(self, hashes: SequenceHashes, resident: Resident | None) -> FleetView:
        by_size = {size: hashes.of(size) for size in self.registry.block_sizes()}
        view = self.registry.view(by_size, time.monotonic())
        return view if resident is None else view.knowing(resident)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        states = (
            (info.role, "draining" if info.worker_id in self._draining else "ready")
            for info in self.registry.infos()
        )
        self._metrics.set_workers(dict(Counter[tuple[Role, str]](states)))


def _claim(info: WorkerInfo, prefill_tokens: int, num_tokens: int) -> Claim:
    return Claim(
        worker_id=info.worker_id,
        prefill_tokens=max(0, prefill_tokens),
        blocks=-(-num_tokens // info.block_size_tokens),
        made_at_s=time.monotonic(),
    )

"""Sessions in Redis, for several routers that share one truth.

    {baton}:session:TENANT:ID    hash: record, tokens, messages, expires_s, lease_id, holder, leased_until_s
    {baton}:tenant:TENANT        its session ids, in order
    {baton}:expiry               TENANT:ID by expiry
    {baton}:leases               TENANT:ID by the end of the lease

Operations that change anything are scripts, which Redis runs one at a time. The braces keep every key on one node of a cluster.
Redis itself forgets what no router has touched for a day after its expiry.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from baton.errors import SessionBusyError, UnavailableError
from router.sessions.record import (
    History,
    Lease,
    Session,
    SessionId,
    SessionKey,
    decode_history,
    decode_session,
    encode_messages,
    encode_session,
    encode_tokens,
    mark_in,
)
from router.sessions.store import Counts, Query

TIMEOUT_S = 5.0
"""How long Redis may take to answer."""
BACKSTOP_S = 86_400.0
SWEEP_BATCH = 500
LIST_BATCH = 200

_PREFIX = "{baton}:"
_EXPIRY = _PREFIX + "expiry"
_LEASES = _PREFIX + "leases"

_CREATE = """
if redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'record', ARGV[2], 'expires_s', ARGV[3], 'tokens', '', 'messages', '',
    'lease_id', '', 'leased_until_s', '0')
redis.call('PEXPIREAT', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], 0, ARGV[5])
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[6])
return 1
"""
_BEGIN = """
local now = tonumber(ARGV[1])
local held = redis.call('HMGET', KEYS[1], 'record', 'tokens', 'messages', 'expires_s', 'leased_until_s', 'lease_id')
if not held[1] then return 'none' end
local same_turn = held[6] == ARGV[2] or (ARGV[6] ~= '' and string.sub(held[6], 1, #ARGV[6]) == ARGV[6])
if tonumber(held[5]) > now and not same_turn then return 'busy' end
if tonumber(held[4]) <= now and tonumber(held[5]) <= now then return 'none' end
redis.call('HSET', KEYS[1], 'lease_id', ARGV[2], 'leased_until_s', ARGV[3], 'holder', ARGV[5])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[4])
return {held[1], held[2], held[3]}
"""
_RENEW = """
if redis.call('HGET', KEYS[1], 'lease_id') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'leased_until_s', ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[3])
return 1
"""
_END = """
local held = redis.call('HMGET', KEYS[1], 'lease_id', 'holder')
if held[1] ~= ARGV[1] then return 0 end
if not ARGV[7] and held[2] ~= ARGV[6] then return 0 end
redis.call('HSET', KEYS[1], 'record', ARGV[2], 'expires_s', ARGV[3], 'lease_id', '', 'leased_until_s', '0')
if ARGV[7] then redis.call('HSET', KEYS[1], 'tokens', ARGV[7], 'messages', ARGV[8]) end
redis.call('PEXPIREAT', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[5])
redis.call('ZREM', KEYS[3], ARGV[5])
return 1
"""
_REMOVE = """
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('ZREM', KEYS[4], ARGV[2])
return redis.call('DEL', KEYS[1])
"""
# A turn may have begun since the session was found to be due.
_REMOVE_DUE = """
local now = tonumber(ARGV[3])
local held = redis.call('HMGET', KEYS[1], 'expires_s', 'leased_until_s')
if held[1] and (tonumber(held[1]) > now or tonumber(held[2]) > now) then return 0 end
""" + _REMOVE.replace("return redis.call('DEL', KEYS[1])", "redis.call('DEL', KEYS[1])\nreturn 1")


class RedisStore:
    """A `router.sessions.store.SessionStore`."""

    def __init__(self, url: str) -> None:
        """Connects on first use. Raises `ValueError` for a malformed URL."""
        self._redis: Any = Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            # A script whose answer was lost may have run: a second run would meet its own lease.
            retry=Retry(NoBackoff(), 0),
        )
        script = self._redis.register_script
        self._create, self._begin, self._renew = script(_CREATE), script(_BEGIN), script(_RENEW)
        self._end, self._remove, self._remove_due = (
            script(_END),
            script(_REMOVE),
            script(_REMOVE_DUE),
        )

    async def create(self, session: Session, *, max_sessions: int) -> bool:
        keys = [_hash(session.key), _tenant(session.key.tenant), _EXPIRY]
        values: list[bytes | str | int] = [
            max_sessions,
            encode_session(session),
            repr(session.expires_s),
            _backstop_ms(session),
            session.key.session_id,
            _member(session.key),
        ]
        async with _reported():
            return bool(await self._create(keys, values))

    async def get(self, key: SessionKey, now_s: float) -> Session | None:
        async with _reported():
            fields = await self._redis.hmget(_hash(key), *_SHOWN)
        return _session(key, fields, now_s)

    async def list(self, query: Query, now_s: float) -> list[Session]:
        found: list[Session] = []
        after = query.after
        while len(found) < query.limit:
            async with _reported():
                names = await self._redis.zrange(
                    _tenant(query.tenant),
                    f"({after}" if after else "-",
                    "+",
                    bylex=True,
                    offset=0,
                    num=LIST_BATCH,
                )
                if not names:
                    break
                keys = [SessionKey(query.tenant, SessionId(name.decode())) for name in names]
                pipeline = self._redis.pipeline(transaction=False)
                for key in keys:
                    pipeline.hmget(_hash(key), *_SHOWN)
                rows = await pipeline.execute()
            after = keys[-1].session_id
            sessions = map(_session, keys, rows, [now_s] * len(keys))
            found += [
                session
                for session in sessions
                if session is not None and query.generating in (None, session.is_generating(now_s))
            ]
        return found[: query.limit]

    async def begin_turn(
        self, key: SessionKey, lease: Lease, now_s: float
    ) -> tuple[Session, History] | None:
        mark = mark_in(lease.lease_id)
        values = [
            repr(now_s),
            lease.lease_id,
            repr(lease.until_s),
            _member(key),
            lease.holder,
            mark and f"{mark}-",
        ]
        async with _reported():
            begun = await self._begin([_hash(key), _LEASES], values)
        if begun == b"none":
            return None
        if begun == b"busy":
            raise SessionBusyError(key.session_id)
        record, tokens, messages = begun
        return decode_session(key, record, lease.until_s), decode_history(tokens, messages)

    async def renew(self, key: SessionKey, lease: Lease) -> bool:
        values = [lease.lease_id, repr(lease.until_s), _member(key)]
        async with _reported():
            return bool(await self._renew([_hash(key), _LEASES], values))

    async def end_turn(self, session: Session, history: History | None, lease: Lease) -> bool:
        values: list[bytes | str | int] = [
            lease.lease_id,
            encode_session(session),
            repr(session.expires_s),
            _backstop_ms(session),
            _member(session.key),
            lease.holder,
        ]
        if history is not None:
            values += [encode_tokens(history.tokens), encode_messages(history)]
        async with _reported():
            return bool(await self._end([_hash(session.key), _EXPIRY, _LEASES], values))

    async def remove(self, key: SessionKey) -> bool:
        values = [key.session_id, _member(key)]
        async with _reported():
            return bool(await self._remove(_keys(key), values))

    async def sweep(self, now_s: float) -> int:
        removed, first = 0, 0
        async with _reported():
            while True:
                due = await self._redis.zrange(
                    _EXPIRY, "-inf", repr(now_s), byscore=True, offset=first, num=SWEEP_BATCH
                )
                if not due:
                    return removed
                gone = 0
                for member in due:
                    tenant, _, name = member.decode().rpartition(":")
                    key = SessionKey(tenant, SessionId(name))
                    values = [name, _member(key), repr(now_s)]
                    gone += await self._remove_due(_keys(key), values)
                # What stays, since a turn runs, stands before what is looked at next.
                removed += gone
                first += len(due) - gone

    async def count(self, now_s: float) -> Counts:
        async with _reported():
            held = await self._redis.zcard(_EXPIRY)
            busy = await self._redis.zcount(_LEASES, f"({now_s!r}", "+inf")
        return Counts(idle=max(0, held - busy), generating=busy)

    async def close(self) -> None:
        await self._redis.aclose()


_SHOWN = ("record", "expires_s", "leased_until_s")


def _session(key: SessionKey, fields: list[bytes | None], now_s: float) -> Session | None:
    record, expires_s, leased_until_s = fields
    if record is None or expires_s is None or leased_until_s is None:
        return None
    if max(float(expires_s), float(leased_until_s)) <= now_s:
        return None
    return decode_session(key, record, float(leased_until_s))


def _hash(key: SessionKey) -> str:
    return f"{_PREFIX}session:{_member(key)}"


def _tenant(tenant: str) -> str:
    return f"{_PREFIX}tenant:{tenant}"


def _member(key: SessionKey) -> str:
    """No session id has a colon; a tenant may."""
    return f"{key.tenant}:{key.session_id}"


def _keys(key: SessionKey) -> list[str]:
    return [_hash(key), _tenant(key.tenant), _EXPIRY, _LEASES]


def _backstop_ms(session: Session) -> int:
    return round((session.expires_s + BACKSTOP_S) * 1000)


@asynccontextmanager
async def _reported() -> AsyncIterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        # Its text may hold the address, which may hold a password.
        raise UnavailableError(f"the session store failed ({type(error).__name__})") from error

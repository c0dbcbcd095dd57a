"""Sessions in a SQLite file: the default. They outlive the router, and routers of one machine may share the file.

The connection belongs to one thread, in which operations run one after the other, each in a transaction of its own.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

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
    is_same_turn,
)
from router.sessions.store import Counts, Query
from router.sessions.thread import SerialThread

TIMEOUT_S = 5.0
"""How long an operation, or the end, may wait for those before it, and an operation for another process that holds the file."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    tenant TEXT NOT NULL,
    session_id TEXT NOT NULL,
    expires_s REAL NOT NULL,
    lease_id TEXT NOT NULL DEFAULT '',
    leased_until_s REAL NOT NULL DEFAULT 0,
    holder TEXT NOT NULL DEFAULT '',
    record BLOB NOT NULL,
    tokens BLOB NOT NULL DEFAULT x'',
    messages BLOB NOT NULL DEFAULT x'',
    PRIMARY KEY (tenant, session_id)
);
CREATE INDEX IF NOT EXISTS sessions_by_expiry ON sessions (expires_s);
CREATE INDEX IF NOT EXISTS sessions_by_lease ON sessions (leased_until_s);
"""
_KEY = "tenant = ? AND session_id = ?"
_HELD = f"{_KEY} AND lease_id = ?"
_LIVE = "max(expires_s, leased_until_s) > ?"

T = TypeVar("T")


class SqliteStore:
    """A `router.sessions.store.SessionStore`."""

    def __init__(self, path: Path | None) -> None:
        """Opens the file, and makes it, its folder too, for this user's eyes only; None keeps everything in memory. Blocks for as long
        as that takes. Raises `UnavailableError` where it cannot be used.
        """
        self._path = path
        self._thread = SerialThread("sessions")
        try:
            self._db = self._thread.submit(lambda: _open(path)).result()
        except (OSError, sqlite3.Error) as error:
            self._thread.stop()
            raise UnavailableError(f"cannot keep sessions in {path}: {error}") from error
        self._closed = False

    async def create(self, session: Session, *, max_sessions: int) -> bool:
        def act(db: sqlite3.Connection) -> bool:
            (held,) = db.execute("SELECT count(*) FROM sessions").fetchone()
            if held >= max_sessions:
                return False
            db.execute(
                "INSERT INTO sessions (tenant, session_id, expires_s, record) VALUES (?, ?, ?, ?)",
                (*_named(session.key), session.expires_s, encode_session(session)),
            )
            return True

        return await self._run(act)

    async def get(self, key: SessionKey, now_s: float) -> Session | None:
        def act(db: sqlite3.Connection) -> Session | None:
            row = db.execute(
                f"SELECT record, leased_until_s FROM sessions WHERE {_KEY} AND {_LIVE}",  # noqa: S608
                (*_named(key), now_s),
            ).fetchone()
            return None if row is None else decode_session(key, *row)

        return await self._run(act)

    async def list(self, query: Query, now_s: float) -> list[Session]:
        wanted = "" if query.generating is None else "AND (leased_until_s > ?) = ?"
        given = () if query.generating is None else (now_s, query.generating)

        def act(db: sqlite3.Connection) -> list[Session]:
            rows = db.execute(
                "SELECT session_id, record, leased_until_s FROM sessions "  # noqa: S608
                f"WHERE tenant = ? AND session_id > ? AND {_LIVE} {wanted} "
                "ORDER BY session_id LIMIT ?",
                (query.tenant, query.after, now_s, *given, query.limit),
            ).fetchall()
            return [
                decode_session(SessionKey(query.tenant, SessionId(session_id)), record, until_s)
                for session_id, record, until_s in rows
            ]

        return await self._run(act)

    async def begin_turn(
        self, key: SessionKey, lease: Lease, now_s: float
    ) -> tuple[Session, History] | None:
        def act(db: sqlite3.Connection) -> tuple[Session, History] | None:
            row = db.execute(
                "SELECT record, lease_id, leased_until_s, tokens, messages FROM sessions "  # noqa: S608
                f"WHERE {_KEY} AND {_LIVE}",
                (*_named(key), now_s),
            ).fetchone()
            if row is None:
                return None
            record, lease_id, leased_until_s, tokens, messages = row
            if leased_until_s > now_s and not is_same_turn(lease_id, lease.lease_id):
                raise SessionBusyError(key.session_id)
            db.execute(
                "UPDATE sessions SET lease_id = ?, leased_until_s = ?, holder = ? "  # noqa: S608
                f"WHERE {_KEY}",
                (lease.lease_id, lease.until_s, lease.holder, *_named(key)),
            )
            return decode_session(key, record, lease.until_s), decode_history(tokens, messages)

        return await self._run(act)

    async def renew(self, key: SessionKey, lease: Lease) -> bool:
        def act(db: sqlite3.Connection) -> bool:
            changed = db.execute(
                f"UPDATE sessions SET leased_until_s = ? WHERE {_HELD}",  # noqa: S608
                (lease.until_s, *_named(key), lease.lease_id),
            )
            return changed.rowcount == 1

        return await self._run(act)

    async def end_turn(self, session: Session, history: History | None, lease: Lease) -> bool:
        def act(db: sqlite3.Connection) -> bool:
            columns = "lease_id = '', leased_until_s = 0, expires_s = ?, record = ?"
            values: list[object] = [session.expires_s, encode_session(session)]
            where, whose = _HELD, [*_named(session.key), lease.lease_id]
            if history is None:
                where += " AND holder = ?"
                whose.append(lease.holder)
            else:
                columns += ", tokens = ?, messages = ?"
                values += [encode_tokens(history.tokens), encode_messages(history)]
            changed = db.execute(
                f"UPDATE sessions SET {columns} WHERE {where}",  # noqa: S608
                (*values, *whose),
            )
            return changed.rowcount == 1

        return await self._run(act)

    async def remove(self, key: SessionKey) -> bool:
        def act(db: sqlite3.Connection) -> bool:
            gone = db.execute(f"DELETE FROM sessions WHERE {_KEY}", _named(key))  # noqa: S608
            return gone.rowcount == 1

        return await self._run(act)

    async def sweep(self, now_s: float) -> int:
        def act(db: sqlite3.Connection) -> int:
            gone = db.execute(
                "DELETE FROM sessions WHERE expires_s <= ? AND leased_until_s <= ?", (now_s, now_s)
            )
            return gone.rowcount

        return await self._run(act)

    async def count(self, now_s: float) -> Counts:
        def act(db: sqlite3.Connection) -> Counts:
            (held,) = db.execute("SELECT count(*) FROM sessions").fetchone()
            (busy,) = db.execute(
                "SELECT count(*) FROM sessions WHERE leased_until_s > ?", (now_s,)
            ).fetchone()
            return Counts(idle=held - busy, generating=busy)

        return await self._run(act)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            closing = self._thread.submit(self._db.close)
            self._thread.stop()
            # A file behind an operation that hangs is closed with the process.
            with suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUT_S):
                    await asyncio.wrap_future(closing)

    async def _run(self, act: Callable[[sqlite3.Connection], T]) -> T:
        end_s = time.monotonic() + TIMEOUT_S

        def transact() -> T:
            left_ms = round(1000 * (end_s - time.monotonic()))
            if left_ms <= 0:
                raise sqlite3.OperationalError("those before it took too long")
            self._db.execute(f"PRAGMA busy_timeout = {left_ms}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                result = act(self._db)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            return result

        try:
            # A disk that hangs knows nothing of that.
            async with asyncio.timeout(2 * TIMEOUT_S):
                return await asyncio.wrap_future(self._thread.submit(transact))
        except TimeoutError:
            raise UnavailableError("the session store does not answer") from None
        except sqlite3.Error as error:
            # Its text speaks of the file, never of what was to be written.
            raise UnavailableError(f"the session store failed: {error}") from error


def _open(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    # Transactions are begun by hand.
    db = sqlite3.connect(path or ":memory:", timeout=TIMEOUT_S, isolation_level=None)
    # A crash of the process loses nothing; one of the machine, at most the last turns.
    _set_journal(db)
    db.execute("PRAGMA synchronous = NORMAL")
    db.executescript(_SCHEMA)
    _complete(db)
    return db


def _set_journal(db: sqlite3.Connection) -> None:
    """Of a new file, one process at a time can; SQLite does not wait for the other."""
    end_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() >= end_s:
                raise
            time.sleep(0.01)
        else:
            return


def _complete(db: sqlite3.Connection) -> None:
    """Adds what a file lacks whose table is there already. A process that knows nothing of it still uses the file."""
    db.execute("BEGIN IMMEDIATE")
    columns = [name for _, name, *_ in db.execute("PRAGMA table_info(sessions)")]
    if "holder" not in columns:
        db.execute("ALTER TABLE sessions ADD COLUMN holder TEXT NOT NULL DEFAULT ''")
    db.execute("COMMIT")


def _named(key: SessionKey) -> tuple[str, str]:
    return key.tenant, key.session_id

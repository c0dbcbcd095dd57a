"""Where sessions are kept: reads the setting `session_store`, and opens what it names.

sqlite:///PATH              a file; `~` is the home directory, `{port}` the router's port
sqlite://                   in memory, gone with the router
redis://HOST:PORT/DB        as redis-py reads it; rediss:// and unix:// too

A file that is named by the port is of no use to a router that takes any free port: that one keeps sessions in memory.
"""

from pathlib import Path

from baton.errors import FieldViolation, InvalidRequestError
from router.sessions.redis_store import RedisStore
from router.sessions.sqlite import SqliteStore
from router.sessions.store import SessionStore

_PORT = "{port}"


def open_store(url: str, port: int) -> SessionStore:
    """Raises `InvalidRequestError` for a URL that names no store, `UnavailableError` for a file that cannot be used. Never shows the URL:
    it may hold a password.
    """
    scheme, separator, rest = url.partition("://")
    match scheme:
        case "sqlite" if separator:
            return SqliteStore(_path(rest, port))
        case "redis" | "rediss" | "unix":
            try:
                return RedisStore(url)
            except ValueError:
                pass
    problem = "must be sqlite:///PATH, sqlite:// or redis://HOST:PORT/DB"
    raise InvalidRequestError(FieldViolation("session_store", problem))


def _path(rest: str, port: int) -> Path | None:
    if not rest.strip("/") or (_PORT in rest and not port):
        return None
    named = rest.replace(_PORT, str(port))
    home = named.lstrip("/")
    return Path(home).expanduser() if home.startswith("~") else Path(named)

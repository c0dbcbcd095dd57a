"""API keys: the file that holds them, and how a presented key is recognised. Pure, except for reading and writing the file.

    baton_<id>_<secret>

The file has the id and a salted hash of the secret, never the key, so that whoever reads the file cannot call. A fast hash is
enough: a secret has 256 random bits, which nobody guesses one by one, unlike a password. Hashes are compared in constant time: a
comparison that ends at the first wrong byte would tell a patient caller how much of a guess was right. An unknown id costs the
same comparison as a wrong secret.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fcntl import LOCK_EX, flock
from pathlib import Path

from baton.errors import FieldViolation, InvalidRequestError, NotFoundError

_KEY = re.compile(r"baton_([a-z0-9]{1,32})_([A-Za-z0-9_-]{16,128})")
_ID = re.compile(r"[a-z0-9]{1,32}")
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """What one tenant may use of one router. The default limits nothing."""

    max_running: int | None = None
    """Requests served at once; more of them wait."""
    tokens_per_s: float | None = None
    """Prompt and generated tokens; a request that comes too early is refused."""
    burst_tokens: int | None = None
    """Tokens that may come at once, after a rest; None is ten seconds' worth. A larger request takes all of a full bucket."""
    weight: float = 1.0
    """Its share of what the router serves while others wait too, in proportion to theirs; > 0."""
    max_priority: int | None = None
    """Highest priority of its requests; one that asks for more gets this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One entry of the file."""

    id: str
    """Not secret: names the key in lists and logs."""
    tenant: str
    salt: str
    hash: str
    """Hexadecimal, as is the salt."""
    created: str
    is_admin: bool = False
    """May see the fleet and call what is for administrators."""
    private_cache: bool = False
    """The tenant's prompts share KV with nobody else's."""
    limits: TenantLimits = field(default_factory=TenantLimits)

    def matches(self, secret: str) -> bool:
        """In constant time."""
        return hmac.compare_digest(_hash(self.salt, secret), self.hash)


_NOBODY = ApiKey(id="", tenant="", salt="00", hash="00" * 32, created="")


class KeyRing:
    """The keys of one file. Immutable."""

    def __init__(self, keys: tuple[ApiKey, ...] = ()) -> None:
        self.keys = keys
        self._by_id = {key.id: key for key in keys}
        self._limits = {key.tenant: key.limits for key in keys}

    def limits_of(self, tenant: str) -> TenantLimits:
        """Those of its last key; none for a tenant that has no key."""
        return self._limits.get(tenant, TenantLimits())

    def find(self, presented: str) -> ApiKey | None:
        """The entry of a key as its owner has it; None where there is none."""
        parsed = _KEY.fullmatch(presented)
        if parsed is None:
            return None
        entry = self._by_id.get(parsed[1], _NOBODY)
        return entry if entry.matches(parsed[2]) else None


def new_key(
    tenant: str, *, limits: TenantLimits, is_admin: bool = False, private_cache: bool = False
) -> tuple[ApiKey, str]:
    """An entry, and the key itself, which cannot be had from the entry. Raises `InvalidRequestError` for what no file may hold."""
    salt, secret = secrets.token_hex(16), secrets.token_urlsafe(_SECRET_BYTES)
    entry = ApiKey(
        id=secrets.token_hex(6),
        tenant=tenant,
        salt=salt,
        hash=_hash(salt, secret),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        is_admin=is_admin,
        private_cache=private_cache,
        limits=limits,
    )
    _check(entry, "key")
    return entry, f"baton_{entry.id}_{secret}"


def load_keys(path: str) -> KeyRing:
    """Raises `InvalidRequestError` naming the file and the entry that is unusable."""
    try:
        content: object = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _invalid(path, f"cannot be read as JSON: {type(error).__name__}") from None
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise _invalid(path, 'must be an object with a list "keys"')
    keys = tuple(_parse(entry, f"{path}: keys[{index}]") for index, entry in enumerate(entries))
    if len({key.id for key in keys}) < len(keys):
        raise _invalid(path, "two keys have one id")
    return KeyRing(keys)


def add_key(path: str, entry: ApiKey) -> None:
    """Writes a file that is not there yet. Raises what `load_keys` raises."""
    with _locked(path):
        keys = load_keys(path).keys if Path(path).exists() else ()
        _write(path, (*keys, entry))


def remove_key(path: str, key_id: str) -> None:
    """Raises `NotFoundError`, and what `load_keys` raises."""
    with _locked(path):
        keys = load_keys(path).keys
        rest = tuple(key for key in keys if key.id != key_id)
        if len(rest) == len(keys):
            raise NotFoundError("key", key_id)
        _write(path, rest)


def _hash(salt: str, secret: str) -> str:
    return hmac.new(bytes.fromhex(salt), secret.encode(), hashlib.sha256).hexdigest()


def _parse(entry: object, where: str) -> ApiKey:
    try:
        if not isinstance(entry, dict):
            raise TypeError  # noqa: TRY301 - one way out for all that is no entry
        limits = TenantLimits(**entry.get("limits", {}))
        key = ApiKey(**{**entry, "limits": limits})
    except TypeError:
        raise _invalid(where, "lacks a field, or has one that is not known") from None
    _check(key, where)
    return key


def _check(key: ApiKey, where: str) -> None:
    limits = key.limits
    texts = (key.id, key.tenant, key.salt, key.hash, key.created)
    rules = (
        ("fields", all(isinstance(text, str) for text in texts), "must be strings"),
        ("id", _matches(_ID, key.id), "must be 1 to 32 of a-z and 0-9"),
        (
            "tenant",
            _matches(_TENANT, key.tenant),
            "must be 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-'",
        ),
        ("salt", _is_hex(key.salt), "must be hexadecimal"),
        ("hash", _is_hex(key.hash) and len(key.hash) == 64, "must be 64 hexadecimal digits"),
        ("is_admin", isinstance(key.is_admin, bool), "must be true or false"),
        ("private_cache", isinstance(key.private_cache, bool), "must be true or false"),
        ("limits.max_running", _is_number(limits.max_running, int, 1), "must be an integer >= 1"),
        ("limits.tokens_per_s", _is_number(limits.tokens_per_s, float, 0), "must be > 0"),
        ("limits.burst_tokens", _is_number(limits.burst_tokens, int, 1), "must be an integer >= 1"),
        ("limits.weight", _is_number(limits.weight, float, 0, optional=False), "must be > 0"),
        ("limits.max_priority", _is_number(limits.max_priority, int, None), "must be an integer"),
    )
    for name, holds, description in rules:
        if not holds:
            raise _invalid(f"{where}.{name}", description)


def _matches(pattern: re.Pattern[str], text: object) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None


def _is_hex(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"([0-9a-f]{2})+", text) is not None


def _is_number(
    value: object, kind: type[int] | type[float], least: int | None, *, optional: bool = True
) -> bool:
    """Whether it is absent, or an int at or above the least, or a finite float above it."""
    if value is None:
        return optional
    if isinstance(value, bool) or not isinstance(value, int | kind):
        return False
    if least is None:
        return True
    return least <= value if kind is int else least < value < float("inf")


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Two commands that edit one file take turns."""
    directory = Path(path).resolve().parent
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise _invalid(path, f"cannot be written: {error.strerror}") from None
    try:
        flock(descriptor, LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: str, keys: tuple[ApiKey, ...]) -> None:
    """Readers see the old file or the new one, and nobody but the owner may read it."""
    content: Mapping[str, object] = {"keys": [asdict(key) for key in keys]}
    target = Path(path).resolve()
    try:
        # Made with mode 0600.
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        Path(name).replace(target)
    except OSError as error:
        raise _invalid(path, f"cannot be written: {error.strerror}") from None


def _invalid(field_name: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(field_name, description))

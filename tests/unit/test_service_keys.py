"""API keys: what the file holds, how a key is recognised, and the commands that edit the file."""

import json
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.cli.app import app
from baton.errors import InvalidRequestError, NotFoundError
from baton.service.access import LOCAL, Caller
from baton.service.keys import (
    ApiKey,
    KeyRing,
    TenantLimits,
    add_key,
    load_keys,
    new_key,
    remove_key,
)

LIMITS = TenantLimits(
    max_running=3, tokens_per_s=10.5, burst_tokens=100, weight=2.0, max_priority=5
)


def made(tenant: str = "acme") -> tuple[ApiKey, str]:
    return new_key(tenant, limits=LIMITS, is_admin=True, private_cache=True)


def test_a_key_is_recognised_and_nothing_close_to_it_is() -> None:
    entry, key = made()
    other, other_key = made()
    ring = KeyRing((entry, other))
    assert ring.find(key) == entry
    assert ring.find(other_key) == other
    crossed = f"baton_{entry.id}_{other_key.split('_', 2)[2]}"
    for wrong in ("", key[:-1], key + "a", key.upper(), f" {key}", "baton_", crossed, entry.hash):
        assert ring.find(wrong) is None
    assert KeyRing().find(key) is None


def test_the_file_keeps_everything_of_an_entry_but_not_the_key(tmp_path: Path) -> None:
    """Promise: whoever reads the file cannot call, and nobody but its owner reads it."""
    path = tmp_path / "keys.json"
    entry, key = made()
    add_key(str(path), entry)
    assert load_keys(str(path)).keys == (entry,)
    assert key.split("_", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_equal_secrets_would_have_unequal_hashes() -> None:
    assert len({made()[0].salt for _ in range(20)}) == 20


def test_keys_made_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    entries = [made()[0] for _ in range(16)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda entry: add_key(path, entry), entries))
    assert set(load_keys(path).keys) == set(entries)


def test_a_revoked_key_is_gone_and_the_others_stay(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    (first, _), (second, _) = made(), made("rival")
    add_key(path, first)
    add_key(path, second)
    remove_key(path, first.id)
    assert load_keys(path).keys == (second,)
    with pytest.raises(NotFoundError):
        remove_key(path, first.id)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tenant": "a/b"}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": 7}, "fields"),
        ({"id": "A"}, "id"),
        ({"salt": "xyz"}, "salt"),
        ({"hash": "00"}, "hash"),
        ({"is_admin": "yes"}, "is_admin"),
        ({"unknown": 1}, "keys[0]"),
        ({"limits": []}, "keys[0]"),
        ({"limits": {"unknown": 1}}, "keys[0]"),
        ({"limits": {"max_running": 0}}, "limits.max_running"),
        ({"limits": {"max_running": 1.5}}, "limits.max_running"),
        ({"limits": {"max_running": True}}, "limits.max_running"),
        ({"limits": {"tokens_per_s": 0}}, "limits.tokens_per_s"),
        ({"limits": {"tokens_per_s": float("inf")}}, "limits.tokens_per_s"),
        ({"limits": {"weight": -1}}, "limits.weight"),
        ({"limits": {"weight": 0}}, "limits.weight"),
        ({"limits": {"weight": None}}, "limits.weight"),
    ],
)
def test_an_unusable_entry_is_named(tmp_path: Path, change: dict[str, object], named: str) -> None:
    path = tmp_path / "keys.json"
    add_key(str(path), made()[0])
    content = json.loads(path.read_text())
    content["keys"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidRequestError, match=re.escape(named)):
        load_keys(str(path))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"keys": 1}', '{"keys": [1]}', "\x00\xff"])
def test_an_unusable_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InvalidRequestError, match=r"keys\.json"):
        load_keys(str(path))


def test_a_tenants_limits_are_those_of_its_last_key() -> None:
    old, new = (new_key("acme", limits=TenantLimits(max_running=number))[0] for number in (1, 2))
    ring = KeyRing((old, new, new_key("rival", limits=LIMITS)[0]))
    assert ring.limits_of("acme") == TenantLimits(max_running=2)
    assert ring.limits_of("rival") == LIMITS
    assert ring.limits_of("nobody") == TenantLimits()


def test_no_salt_of_one_tenant_is_anothers() -> None:
    """A tenant's name has no slash, so that what stands before the first one is the tenant."""
    callers = [Caller(tenant=name, private_cache=True) for name in ("a", "b", "")]
    salts = [caller.salted(salt) for caller in callers for salt in ("", "a", "a/", "/a", "b/")]
    assert len(set(salts)) == len(salts)
    assert Caller(tenant="a").salted("") == LOCAL.salted("") == ""
    assert Caller(tenant="a").salted("x") != Caller(tenant="b").salted("x")


def test_the_commands_make_list_and_revoke_keys(tmp_path: Path) -> None:
    """Promise: the key is printed once, alone on standard output, and never listed."""
    path = str(tmp_path / "keys.json")
    run = CliRunner().invoke
    created = run(app, ["keys", "create", "acme", "-f", path, "--max-running", "3", "--admin"])
    assert created.exit_code == 0
    key = created.stdout.strip()
    entry = load_keys(path).find(key)
    assert entry is not None
    assert (entry.tenant, entry.is_admin, entry.limits.max_running) == ("acme", True, 3)
    listed = run(app, ["keys", "list"], env={"BATON_API_KEYS_FILE": path})
    assert entry.id in listed.stdout
    assert "acme" in listed.stdout
    assert "max running 3" in listed.stdout
    assert key not in listed.stdout
    assert entry.hash not in listed.stdout
    assert run(app, ["keys", "revoke", entry.id, "-f", path]).exit_code == 0
    assert load_keys(path).find(key) is None
    assert run(app, ["keys", "revoke", entry.id, "-f", path]).exit_code == 2
    assert run(app, ["keys", "create", "a/b", "-f", path]).exit_code == 2
    assert run(app, ["keys", "create", "a", "-f", str(tmp_path / "no" / "k")]).exit_code == 2

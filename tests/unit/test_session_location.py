"""Which store a URL names, and what becomes of one that cannot be used."""

import stat
from pathlib import Path

import pytest

from baton.errors import BatonError, InvalidRequestError, UnavailableError
from baton.service.settings import RouterSettings
from router.sessions.location import open_store
from router.sessions.sqlite import SqliteStore


async def opened(url: str, port: int) -> SqliteStore:
    store = open_store(url, port)
    assert isinstance(store, SqliteStore)
    await store.close()
    return store


async def test_the_default_is_a_file_in_the_home_directory_that_only_its_user_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    await opened(RouterSettings().session_store, 50051)
    file = tmp_path / ".local/state/baton/sessions-50051.db"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


async def test_a_router_that_takes_any_port_keeps_them_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    await opened(RouterSettings().session_store, 0)
    assert [*tmp_path.iterdir()] == []  # noqa: ASYNC240


@pytest.mark.parametrize(
    "url", ["", "mysql://x", "sqlite", "redis://h:port", "postgres://u:secret@h"]
)
def test_a_url_that_names_no_store_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="session_store") as refused:
        open_store(url, 1)
    assert "secret" not in str(refused.value)


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "not-a-db").write_text("x" * 5000, encoding="utf-8")
    for path in (tmp_path, tmp_path / "not-a-db", tmp_path / "not-a-db" / "below"):
        with pytest.raises(UnavailableError, match="cannot keep sessions in"):
            open_store(f"sqlite://{path}", 1)


async def test_a_password_is_in_no_message() -> None:
    store = open_store("redis://:secret@127.0.0.1:1/0", 1)
    with pytest.raises(BatonError) as failed:
        await store.count(0.0)
    await store.close()
    assert "secret" not in str(failed.value)
    assert "secret" not in repr(RouterSettings(session_store="redis://:secret@h"))

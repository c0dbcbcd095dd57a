"""Everybody's part, and each tenant's: what a tenant does is in both, and what it sees is its own."""

from baton.service.access import LOCAL, Caller
from router.scoped import MAX_TENANTS, Scoped
from router.sessions.recent import MAX_RECENT, RecentSessions
from router.sessions.record import Session, SessionId, SessionKey


def test_a_tenant_sees_its_own_part_and_who_administers_sees_all() -> None:
    scoped: Scoped[list[str]] = Scoped(list)
    for tenant in ("acme", "bolt", ""):
        for part in scoped.of(tenant):
            part.append(tenant or "nobody")
    assert scoped.seen_by(Caller(tenant="acme")) == ["acme"]
    assert scoped.seen_by(Caller(tenant="stranger")) == []
    assert scoped.seen_by(LOCAL) == ["acme", "bolt", "nobody"]


def test_tenants_are_bounded_and_the_idlest_goes_first() -> None:
    scoped: Scoped[list[int]] = Scoped(list)
    scoped.of("first")[1].append(1)
    for number in range(MAX_TENANTS):
        scoped.of("first")
        scoped.of(f"tenant-{number}")[1].append(number)
    assert scoped.seen_by(Caller(tenant="first")) == [1]
    assert scoped.seen_by(Caller(tenant="tenant-0")) == []


def session(number: int, tenant: str = "") -> Session:
    return Session(
        key=SessionKey(tenant, SessionId(f"s{number}")),
        model="m",
        created_s=0.0,
        updated_s=float(number),
        ttl_s=1000.0,
        idle_s=100.0,
    )


def test_recent_sessions_are_bounded_and_the_latest_comes_first() -> None:
    recent = RecentSessions()
    for number in range(MAX_RECENT + 5):
        recent.saw(session(number))
    recent.saw(session(7), generating=True)
    numbers = [each.session.key.session_id for each in recent.seen_by(LOCAL, 50.0)]
    assert len(numbers) == MAX_RECENT
    assert numbers[:2] == ["s7", f"s{MAX_RECENT + 4}"]


def test_a_session_whose_time_has_come_is_told_of_only_while_a_turn_runs() -> None:
    recent = RecentSessions()
    recent.saw(session(1), generating=True)
    assert len(recent.seen_by(LOCAL, 500.0)) == 1
    recent.rest(session(1).key)
    assert len(recent.seen_by(LOCAL, 100.0)) == 1
    assert recent.seen_by(LOCAL, 500.0) == []
    recent.forget(session(1).key)
    assert recent.seen_by(LOCAL, 0.0) == []


def test_a_session_that_is_closed_is_gone_for_its_tenant_too() -> None:
    recent = RecentSessions()
    recent.saw(session(1, "acme"))
    recent.saw(session(2, "bolt"))
    assert len(recent.seen_by(Caller(tenant="acme"), 0.0)) == 1
    recent.forget(session(1, "acme").key)
    assert recent.seen_by(Caller(tenant="acme"), 0.0) == []
    assert len(recent.seen_by(LOCAL, 0.0)) == 1

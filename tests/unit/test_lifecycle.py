"""A request's timeline: what stages last, and what a recovery leaves of the attempt before."""

from baton.lifecycle import (
    LOCAL_STAGES,
    MOVED_STAGES,
    REQUEST_STAGES,
    SPLIT_STAGES,
    STAGES,
    Event,
    Timeline,
)


def timeline(*events: tuple[Event, float]) -> Timeline:
    made = Timeline(received_s=10.0)
    for event, at_s in events:
        made.record(event, 10.0 + at_s)
    return made


def test_stages_of_a_split_request_follow_each_other() -> None:
    order = [event for event in Event if event not in (Event.RECEIVED, Event.LOST, Event.RECOVERED)]
    made = timeline(*((event, float(position)) for position, event in enumerate(order, start=1)))
    attempt, request = dict(made.durations(SPLIT_STAGES)), dict(made.durations(REQUEST_STAGES))
    assert attempt == dict.fromkeys(("placement", "reserve", "prefill_queue", "prefill"), 1.0) | {
        "handoff": 2.0
    }
    assert request == {"queue": 1.0, "first_token": 1.0, "decode": 1.0}
    assert set(attempt) | set(request) == set(STAGES)


def test_what_never_happened_is_no_stage() -> None:
    made = timeline((Event.ADMITTED, 1), (Event.PLACING, 1), (Event.PLACED, 2))
    assert dict(made.durations(SPLIT_STAGES)) == {"placement": 1.0}
    assert dict(made.durations(REQUEST_STAGES)) == {"queue": 1.0}


def test_a_new_attempt_forgets_what_the_last_one_met() -> None:
    """Promise: an attempt that fails early does not count stages of the one before it again, and the first token stays where it was."""
    made = timeline(
        (Event.PLACING, 1),
        (Event.PLACED, 2),
        (Event.RESERVED, 3),
        (Event.PREFILL_STARTED, 4),
        (Event.PREFILLED, 5),
        (Event.FIRST_TOKEN, 6),
        (Event.KV_RECEIVED, 7),
        (Event.LAST_TOKEN, 8),
        (Event.PLACING, 20),
        (Event.PLACED, 21),
    )
    assert dict(made.durations(SPLIT_STAGES)) == {"placement": 1.0}
    assert made.at_s(Event.FIRST_TOKEN) == 6
    made.record(Event.RESERVED, 32.0)
    made.record(Event.KV_RECEIVED, 35.0)
    made.record(Event.FIRST_TOKEN, 36.0)
    assert made.at_s(Event.FIRST_TOKEN) == 6
    assert dict(made.durations(LOCAL_STAGES)) == {"placement": 1, "reserve": 1, "prefill": 3}
    assert dict(made.durations(MOVED_STAGES)) == {"placement": 1, "reserve": 1, "handoff": 3}


def test_a_first_token_of_an_earlier_attempt_is_no_stage_of_a_later_one() -> None:
    made = timeline((Event.FIRST_TOKEN, 1), (Event.PREFILLED, 5), (Event.KV_RECEIVED, 6))
    assert "first_token" not in dict(made.durations(REQUEST_STAGES))

"""What a worker is owed is sent once it can be, until it has answered."""

from baton.types import AttemptKey, RequestId, Role
from router.releases import MAX_OWED, Release, Releases


def release(number: int) -> Release:
    return Release(Role.DECODE, AttemptKey(RequestId(str(number))), "me")


def test_what_was_not_answered_is_sent_at_every_membership() -> None:
    owed, sent = Releases(), list[Release]()
    owed.owe(release(1))
    assert sent == []
    owed.connect(sent.append)
    owed.owe(release(2))
    assert sent == [release(1), release(2)]
    owed.settle(release(1))
    owed.settle(release(1))
    owed.disconnect()
    owed.owe(release(3))
    again = list[Release]()
    owed.connect(again.append)
    assert (sent, again) == ([release(1), release(2)], [release(2), release(3)])


def test_a_worker_that_never_comes_back_is_owed_a_bounded_number() -> None:
    """The latest."""
    owed, sent = Releases(), list[Release]()
    for number in range(MAX_OWED + 10):
        owed.owe(release(number))
    owed.connect(sent.append)
    assert sent == [release(number) for number in range(10, MAX_OWED + 10)]

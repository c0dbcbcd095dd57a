"""What is kept for everybody together and for each tenant apart, so that a tenant can be shown its own and nothing else.

Bounded: of more than `MAX_TENANTS`, the one that was heard of the longest ago is forgotten. Callers without an identity are only part of
everybody. Used on one event loop.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from baton.service.access import Caller

MAX_TENANTS = 256

T = TypeVar("T")


class Scoped(Generic[T]):
    """See the module docstring."""

    def __init__(self, new: Callable[[], T]) -> None:
        """`new` makes the empty part of one tenant."""
        self._new = new
        self._all = new()
        self._tenants: OrderedDict[str, T] = OrderedDict()

    def of(self, tenant: str) -> tuple[T, ...]:
        """The parts that what a tenant does belongs to."""
        if not tenant:
            return (self._all,)
        part = self._tenants.get(tenant)
        if part is None:
            part = self._tenants[tenant] = self._new()
            if len(self._tenants) > MAX_TENANTS:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(tenant)
        return (self._all, part)

    def seen_by(self, caller: Caller) -> T:
        """Everything for who administers, else the caller's own; empty where nothing is known."""
        if caller.is_admin:
            return self._all
        return self._tenants.get(caller.tenant) or self._new()

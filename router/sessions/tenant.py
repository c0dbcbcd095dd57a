"""Whose call it is: the one place that tells sessions apart by their owner."""

from baton.service.calls import Context


def tenant_of(_context: Context) -> str:
    """The caller's tenant; empty for none. Callers have no identity, so that all share one."""
    return ""

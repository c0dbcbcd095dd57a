"""What a failed TaskGroup means. Pure."""

from collections.abc import Iterator

from baton.errors import BatonError


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The leaf that best says why a TaskGroup failed: a BatonError where there is one, else the first."""
    leaves = list(_leaves(group))
    return next((leaf for leaf in leaves if isinstance(leaf, BatonError)), leaves[0])


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error

"""The source's end of every transport: failures leave it as values, see `baton.transfer.receive` for the other end.

Runs in the prefill worker's event loop.
"""

import asyncio
import logging

from baton.errors import BatonError, DeadlineError, InternalError
from baton.kv.spec import WireKV
from baton.transfer.base import KVMeta, KVSource, Piece, PullRequest, Ready, Refused, Underway
from baton.types import AttemptKey

_LOG = logging.getLogger(__name__)


class SourceEndpoint:
    """A `KVSource` whose answers are always values, and in time: an error becomes `Refused`, and so does a source that forgets."""

    def __init__(self, source: KVSource) -> None:
        self._source = source

    async def ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._source.ready(key, timeout_s, piece)
        except TimeoutError:
            return Refused(DeadlineError.reason, f"{key} is not ready after {timeout_s:.3g} s")
        except Exception as error:  # noqa: BLE001 - a pickled exception would tie decode to prefill's classes
            return _refusal(error)

    async def pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        try:
            async with asyncio.timeout(request.timeout_s):
                return await self._source.pull(request)
        except TimeoutError:
            told = f"{request.key} was not exported in {request.timeout_s:.3g} s"
            return Refused(DeadlineError.reason, told), None
        except Exception as error:  # noqa: BLE001 - as above
            return _refusal(error), None


def _refusal(error: Exception) -> Refused:
    if isinstance(error, BatonError):
        return Refused(error.reason, error.message)
    _LOG.error("the KV source failed", exc_info=error)
    return Refused(InternalError.reason, f"{type(error).__name__}: {error}")

"""Files that may change while a process runs: certificates and API keys.

`Reloaded` looks at the files whenever it is asked, so that a change counts from the next call or handshake on and no timer runs.
Asked on the event loop and on gRPC's own threads.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from baton.errors import BatonError

_log = logging.getLogger(__name__)

RETRY_S = 1.0
"""How long files that could not be read are left alone: what failed may have been the reading."""

T = TypeVar("T")

_Stamp = tuple[tuple[int, int, int], ...]
"""Of each file: when it was written, its size, its inode. A file that is swapped by a link has another inode."""


class Reloaded(Generic[T]):
    """What some files say. A change that cannot be read leaves what was read before in force, and one line in the log, and is
    tried again.
    """

    def __init__(self, paths: Sequence[str], load: Callable[[], T]) -> None:
        """Reads at once. Raises what `load` raises, a `BatonError`."""
        self._paths = tuple(paths)
        self._load = load
        self._lock = Lock()
        self._stamp = self._look()
        self._value = load()
        self._version = 0
        self._failed_at_s: float | None = None
        """When a change could not be read."""

    @property
    def value(self) -> T:
        """The latest that could be read."""
        return self.versioned[0]

    @property
    def versioned(self) -> tuple[T, int]:
        """The latest that could be read, and a number that is another one after every change."""
        with self._lock:
            stamp = self._look()
            failed_s, now_s = self._failed_at_s, time.monotonic()
            changed = stamp != self._stamp
            if changed or (failed_s is not None and now_s - failed_s >= RETRY_S):
                # Taken before reading: what is written meanwhile is read next time.
                self._stamp = stamp
                self._reload(now_s, changed=changed)
            return self._value, self._version

    def _reload(self, now_s: float, *, changed: bool) -> None:
        try:
            self._value = self._load()
        except BatonError as error:
            self._failed_at_s = now_s
            if changed:
                _log.error("what was read before stays in force: %s", error.message)
        else:
            self._failed_at_s = None
            self._version += 1
            _log.info("read anew: %s", ", ".join(self._paths))

    def _look(self) -> _Stamp | None:
        """None where a file is not there."""
        try:
            found = [Path(path).stat() for path in self._paths]
        except OSError:
            return None
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in found)

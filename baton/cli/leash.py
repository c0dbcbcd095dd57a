"""Runs a Python module as a child that does not outlive its parent: `python leash.py MODULE [ARGS]`.

Started by path, so that the child imports nothing of `baton.cli`. On Linux the kernel sends SIGTERM when the parent dies,
however it dies; elsewhere the parent's own cleanup has to do.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Replaces this process by `python -m MODULE`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()

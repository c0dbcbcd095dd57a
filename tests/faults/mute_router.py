"""`python -m tests.faults.mute_router`: a router that is killed in the instant between a session's second turn becoming part of the session
and its client being told so.
"""

import os
import signal

from router import app
from router.__main__ import main
from router.sessions.manager import SessionManager
from router.sessions.record import Session
from router.sessions.turn import Turn

FATAL_TURN = 2


class MuteManager(SessionManager):
    """See the module docstring."""

    async def _commit(self, turn: Turn, session: Session) -> None:
        await super()._commit(turn, session)
        if session.turns == FATAL_TURN:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    app.SessionManager = MuteManager  # type: ignore[attr-defined]
    main()

"""`python -m prefill_worker`; see `baton.worker.command`."""

import sys

from baton.types import Role
from baton.worker.command import main
from prefill_worker.actor import PrefillActor

if __name__ == "__main__":
    sys.exit(main(Role.PREFILL, PrefillActor))

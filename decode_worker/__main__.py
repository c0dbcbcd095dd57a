"""`python -m decode_worker`; see `baton.worker.command`."""

import sys

from baton.types import Role
from baton.worker.command import main
from decode_worker.actor import DecodeActor

if __name__ == "__main__":
    sys.exit(main(Role.DECODE, DecodeActor))

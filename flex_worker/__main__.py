"""`python -m flex_worker --role prefill`; see `baton.worker.command`."""

import sys

from baton.worker.command import main
from flex_worker.actor import FlexActor

if __name__ == "__main__":
    sys.exit(main(None, FlexActor))

"""`python -m monitoring [DIRECTORY]`: writes every dashboard, and removes what is none any more."""

import sys
from pathlib import Path

from monitoring import faults, fleet, kv, latency, sessions
from monitoring.panels import to_json

BOARDS = (fleet.BOARD, latency.BOARD, kv.BOARD, sessions.BOARD, faults.BOARD)
DIRECTORY = Path(__file__).parent.parent / "k8s" / "monitoring" / "dashboards"


def write(directory: Path) -> None:
    """Makes the directory where there is none."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.json"):
        old.unlink()
    for board in BOARDS:
        (directory / f"{board.uid}.json").write_text(to_json(board))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY)

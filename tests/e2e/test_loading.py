"""What `baton serve` tells while a large model loads."""

import re
from pathlib import Path

import pytest

from tests.hollow import hollow_checkpoint
from tests.served import Served, served, started, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

FLAGS = ("--prefill", "0", "--threads", "1", "--kv-tokens", "1024")


def loaded(running: Served) -> list[tuple[int, int]]:
    """Reports so far: MiB loaded, MiB in all."""
    found = re.findall(r"decode-0 loaded ([\d,]+) of ([\d,]+) MiB of weights", running.output())
    return [(int(part.replace(",", "")), int(whole.replace(",", ""))) for part, whole in found]


@pytest.mark.parametrize("transport", ["memory", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_load_that_takes_a_while_is_told_in_a_line_now_and_then(
    tmp_path: Path, transport: str
) -> None:
    """Promise: nobody has to wonder whether a large model still loads."""
    total_mib = hollow_checkpoint(tmp_path / "model", num_layers=10) >> 20
    flags = (*FLAGS, "--transport", transport, "--model", str(tmp_path / "model"))
    with served(tmp_path, *flags) as running:
        reports = loaded(running)
        assert 1 <= len(reports) <= 10
        assert {whole for _, whole in reports} == {total_mib}
        assert all(0 < part <= total_mib for part, _ in reports)


def test_a_load_can_be_interrupted(tmp_path: Path) -> None:
    """Promise: a stop signal while the model loads ends it within seconds and cleanly, in one process too."""
    hollow_checkpoint(tmp_path / "model", num_layers=20)
    flags = (*FLAGS, "--transport", "memory", "--model", str(tmp_path / "model"))
    with started(tmp_path, *flags) as running:
        until(lambda: bool(loaded(running)), 30, "a report")
        assert running.stop() == 0, running.output()
        assert not running.address
        assert not running.processes()

"""Files that change while a process runs count from the next look on, or as soon as they can be read."""

from pathlib import Path

import pytest

from baton.errors import FieldViolation, InvalidRequestError
from baton.service import reload
from baton.service.reload import Reloaded


class Reader:
    """Reads a file, or cannot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fails = False
        self.reads = 0

    def __call__(self) -> str:
        self.reads += 1
        if self.fails:
            raise InvalidRequestError(FieldViolation(str(self.path), "too many open files"))
        return self.path.read_text()


def test_a_change_that_could_not_be_read_counts_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: a key that was revoked while the process could open no file does not stay valid until the file changes again."""
    path = tmp_path / "keys"
    path.write_text("one")
    reader = Reader(path)
    content = Reloaded([str(path)], reader)
    reader.fails = True
    path.write_text("another")
    for _ in range(3):
        assert content.value == "one"
    assert reader.reads == 2, "it is not tried with every call"
    monkeypatch.setattr(reload, "RETRY_S", 0.0)
    assert content.value == "one"
    assert caplog.text.count("stays in force") == 1
    reader.fails = False
    assert content.versioned == ("another", 1)
    assert content.versioned == ("another", 1)
    assert reader.reads == 4

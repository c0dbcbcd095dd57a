"""Typed reading of a JSON file of a checkpoint: every field that is absent, or not what it must be, raises a `ModelLoadError` that names
file and field. Torch-free.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from baton.errors import ModelLoadError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object, and where it stands. A default of None in a reader makes the field required; null reads as absent."""

    path: str
    """The file, for messages."""
    values: Mapping[str, object]
    prefix: str = ""
    """Where the object stands inside the file, such as `rope_scaling.`."""

    def fail(self, name: str, problem: str) -> ModelLoadError:
        """The error to raise for a field."""
        return ModelLoadError(self.path, f"{self.prefix}{name} {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(name, f"must be an integer of at least {least}, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, f"must be a number, not {value!r}")
        if not 0 < value < float("inf"):
            raise self.fail(name, f"must be positive and finite, not {value!r}")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        value = self._get(name, None)
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(name, f"must be a list of {count} numbers")
        items = Fields(self.path, dict(enumerate_names(value)), f"{self.prefix}{name}.")
        return tuple(items.number(str(i)) for i in range(count))

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, f"must be true or false, not {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.fail(name, f"must be a string, not {value!r}")
        return value

    def choice(self, name: str, choices: Iterable[str], default: str | None = None) -> str:
        """One of a few strings."""
        value, allowed = self.text(name, default), sorted(choices)
        if value not in allowed:
            raise self.fail(name, f"is {value!r}; supported: {', '.join(allowed)}")
        return value

    def nested(self, name: str) -> "Fields":
        """An object inside this one; empty where absent."""
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.fail(name, f"must be an object, not {value!r}")
        return Fields(self.path, value, f"{self.prefix}{name}.")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """An integer, a list of integers, or nothing."""
        value = self.values.get(name)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in items):
            raise self.fail(name, f"must be a token id or a list of them, not {value!r}")
        return tuple(items)

    def _get(self, name: str, default: T | None) -> object:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.fail(name, "is missing")
        return default


def enumerate_names(items: Iterable[object]) -> Iterable[tuple[str, object]]:
    """A list's items, named by their index."""
    return ((str(i), item) for i, item in enumerate(items))


def read_fields(path: Path) -> Fields:
    """The JSON object in a file."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(str(path), "file is missing") from None
    except OSError as error:
        raise ModelLoadError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(str(path), f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(str(path), "must hold a JSON object")
    return Fields(str(path), values)

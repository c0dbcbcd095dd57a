"""Recorded loads: when requests came, how long they and their answers were and, in Mooncake's, which prefixes they shared. Pure, except
`read_trace`.

    Mooncake, JSONL        {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}
                           milliseconds since the beginning; each id stands for the next 512 tokens of the prompt
    Azure LLM inference    a CSV with the columns TIMESTAMP (a date and a time), ContextTokens, GeneratedTokens
"""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from baton.errors import FieldViolation, InvalidRequestError

MOONCAKE_BLOCK_TOKENS = 512
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MAX_TOKENS = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEntry:
    """One recorded request."""

    at_s: float
    """Since the trace's first."""
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Names of the prompt's blocks of tokens, in order; requests that begin with the same names share that prefix."""


@dataclass(frozen=True, slots=True)
class Trace:
    """In the order of arrival."""

    entries: tuple[TraceEntry, ...]
    block_tokens: int = MOONCAKE_BLOCK_TOKENS


def read_trace(path: Path) -> Trace:
    """Tells the formats apart by the first line. Raises `InvalidRequestError` naming file and line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            parse = parse_mooncake if first.lstrip().startswith("{") else parse_azure
            entries = parse(file, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid(str(path), str(error)) from None
    if not entries:
        raise _invalid(str(path), "holds no requests")
    return Trace(in_order(entries))


def parse_mooncake(lines: Iterable[str], name: str) -> list[TraceEntry]:
    """In the file's order and with its times. Raises `InvalidRequestError`."""
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            entry = TraceEntry(
                at_s=_time(fields["timestamp"]) / 1000,
                input_tokens=_count(fields["input_length"]),
                output_tokens=_count(fields["output_length"]),
                blocks=tuple(int(block) for block in fields.get("hash_ids") or ()),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise _unreadable(
                name, number, error, "timestamp, input_length and output_length"
            ) from None
        entries.append(entry)
    return entries


def parse_azure(lines: Iterable[str], name: str) -> list[TraceEntry]:
    """In the file's order and with its times since the Unix epoch. Raises `InvalidRequestError`."""
    rows = csv.DictReader(lines)
    missing = [column for column in _AZURE if column not in (rows.fieldnames or ())]
    if missing:
        raise _invalid(
            name,
            f"is neither a Mooncake trace (JSON lines) nor an Azure one (CSV): no {missing[0]} column",
        )
    entries = []
    try:
        for row in rows:
            at = datetime.fromisoformat(row["TIMESTAMP"].strip())
            entry = TraceEntry(
                at_s=(at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp(),
                input_tokens=_count(row["ContextTokens"]),
                output_tokens=_count(row["GeneratedTokens"]),
            )
            entries.append(entry)
    except (ValueError, TypeError, AttributeError, OverflowError, csv.Error) as error:
        raise _unreadable(name, rows.line_num, error, " and ".join(_AZURE)) from None
    return entries


def in_order(entries: Sequence[TraceEntry]) -> tuple[TraceEntry, ...]:
    """By arrival; the first comes at 0."""
    ordered = sorted(entries, key=lambda entry: entry.at_s)
    first_s = ordered[0].at_s if ordered else 0.0
    return tuple(replace(entry, at_s=entry.at_s - first_s) for entry in ordered)


def rescaled(trace: Trace, *, speed: float, length_scale: float) -> Trace:
    """The same load, that much faster, of requests that much longer; blocks scale as the lengths do, so that the same share of each prompt
    is shared. Precondition: both are positive.
    """

    def length(tokens: int) -> int:
        return max(1, round(tokens * length_scale))

    entries = tuple(
        replace(
            entry,
            at_s=entry.at_s / speed,
            input_tokens=length(entry.input_tokens),
            output_tokens=length(entry.output_tokens),
        )
        for entry in trace.entries
    )
    return Trace(entries, length(trace.block_tokens))


def _time(value: object) -> float:
    number = float(value)  # type: ignore[arg-type]  # raises what the caller expects
    if not math.isfinite(number):
        raise ValueError("a time that is no number")
    return number


def _count(value: object) -> int:
    # Requests without an answer are recorded with 0 tokens; nobody can ask for those.
    number = int(value)  # type: ignore[call-overload]  # raises what the caller expects
    if not 0 <= number <= _MAX_TOKENS:
        raise ValueError(f"{number} tokens")
    return max(1, int(number))


def _unreadable(name: str, line: int, error: Exception, columns: str) -> InvalidRequestError:
    problem = f"no {error}" if isinstance(error, KeyError) else str(error)
    return _invalid(f"{name}, line {line}", f"expected {columns}: {problem}")


def _invalid(name: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(name, description))

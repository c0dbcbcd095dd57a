"""A run as a JSON file: what was asked, what was found, and each request as it was seen, so that every figure can be computed again.

Instants in the file are seconds since their level began.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from baton import __version__
from baton.bench.figures import Slo
from baton.bench.levels import Level, Measured
from baton.bench.records import Record
from baton.bench.target import Described
from baton.client.types import Timings
from baton.errors import FieldViolation, InvalidRequestError

FORMAT = "baton-bench-1"
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run."""

    target: Described
    settings: Mapping[str, object]
    """As the command was given them."""
    slos: tuple[Slo, ...]
    levels: tuple[Measured, ...]


def write_report(report: Report) -> str:
    """JSON."""
    return json.dumps(
        {
            "format": FORMAT,
            "version": __version__,
            "target": asdict(report.target),
            "settings": dict(report.settings),
            "levels": [_level(measured, report.slos) for measured in report.levels],
        }
    )


def read_report(path: Path, slos: Sequence[Slo]) -> Report:
    """A file's, judged by these objectives. Raises `InvalidRequestError` for anything else."""
    try:
        return _report(json.loads(path.read_text(encoding="utf-8")), slos)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequestError(
            FieldViolation(str(path), f"is no report of `baton bench --json`: {error}")
        ) from None


def _report(written: Mapping[str, Any], slos: Sequence[Slo]) -> Report:
    if written["format"] != FORMAT:
        raise ValueError(f"format {written['format']!r}")
    target = written["target"]
    return Report(
        target=Described(**target | {"eos_token_ids": tuple(target["eos_token_ids"])}),
        settings=written["settings"],
        slos=tuple(slos),
        levels=tuple(_measured(level) for level in written["levels"]),
    )


def _level(measured: Measured, slos: tuple[Slo, ...]) -> dict[str, Any]:
    return {
        "load": asdict(measured.level),
        "began_unix_s": measured.began_unix_s,
        "wall_s": round(measured.wall_s, _DIGITS),
        "client_cpu_s": round(measured.client_cpu_s, _DIGITS),
        "lost": measured.lost,
        "interrupted": measured.interrupted,
        "figures": asdict(measured.figures(slos)),
        "requests": [_record(record, measured.began_s) for record in measured.records],
    }


def _record(record: Record, began_s: float) -> dict[str, Any]:
    def since(at_s: float) -> float:
        return round(at_s - began_s, _DIGITS)

    written = asdict(record)
    told = {"scheduled_s", *(("sent_s", "ended_s") if record.was_sent else ())}
    written |= {name: since(written[name]) for name in told}
    written["chunk_s"] = [since(at_s) for at_s in record.chunk_s]
    return written


def _measured(level: Mapping[str, Any]) -> Measured:
    records = tuple(_read_record(each) for each in level["requests"])
    return Measured(
        level=Level(**level["load"]),
        records=records,
        began_s=0.0,
        began_unix_s=level["began_unix_s"],
        wall_s=level["wall_s"],
        client_cpu_s=level["client_cpu_s"],
        lost=level["lost"],
        interrupted=level["interrupted"],
    )


def _read_record(written: Mapping[str, Any]) -> Record:
    known = {each.name for each in fields(Record)}
    record = Record(**{name: value for name, value in written.items() if name in known})
    timings = written["timings"]
    return replace(record, timings=None if timings is None else Timings(**timings))

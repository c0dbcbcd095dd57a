"""What a dashboard is made of, as plain data, and how it becomes Grafana's. Panels are placed row by row, three side by side where
nothing else is said, and numbered in order.
"""

import json
from dataclasses import dataclass
from enum import Enum

from grafana_foundation_sdk.builders import (
    common as common_builders,
)
from grafana_foundation_sdk.builders import (
    dashboard as builders,
)
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

COLUMNS = 24
"""Grafana's grid."""
DATASOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
NO_VARIABLES_FIELDS = ("id", "auto", "auto_min", "auto_count")
"""The library writes these, and a dashboard's style; Grafana's schema does not know them."""
JOBS = 'label_values({__name__=~"baton_workers|baton_worker_info"}, job)'
"""Routers' and workers' scrape jobs."""


class Kind(Enum):
    """How a panel shows its queries."""

    LINES = "lines"
    STACK = "stack"
    """Lines on top of each other."""
    NUMBER = "number"
    """The latest value."""
    HEATMAP = "heatmap"


@dataclass(frozen=True, slots=True)
class Query:
    """One expression, and what its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel."""

    title: str
    unit: str
    """Grafana's name of a unit."""
    queries: tuple[Query, ...]
    description: str = ""
    kind: Kind = Kind.LINES
    width: int = 8
    height: int = 8
    min: float | None = 0
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a title."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard."""

    uid: str
    """Its file's name, too."""
    title: str
    description: str
    rows: tuple[Row, ...]


def to_json(board: Board) -> str:
    """The dashboard as Grafana imports it."""
    made = json.loads(JSONEncoder().encode(_dashboard(board)))
    del made["style"]
    for variable in made["templating"]["list"]:
        for field in NO_VARIABLES_FIELDS:
            del variable[field]
    return json.dumps(made, sort_keys=True, indent=2) + "\n"


def _dashboard(board: Board) -> dashboard.Dashboard:
    result = (
        builders.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["baton"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(_job_variable())
    )
    number, y = 0, 0
    for row in board.rows:
        number += 1
        place = dashboard.GridPos(x=0, y=y, w=COLUMNS, h=1)
        result.with_row(builders.Row(row.title).id(number).grid_pos(place))
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            number += 1
            place = dashboard.GridPos(x=x, y=y, w=panel.width, h=panel.height)
            result.with_panel(_panel(panel).id(number).grid_pos(place))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return result.build()


def _job_variable() -> builders.QueryVariable:
    every = dashboard.VariableOption(text=["All"], value=["$__all"])
    return (
        builders.QueryVariable("job")
        .label("Job")
        .datasource(DATASOURCE)
        .query({"query": JOBS, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(every)
    )


_Builder = timeseries.Panel | stat.Panel | heatmap.Panel


def _panel(panel: Panel) -> _Builder:
    made = _shown(panel.kind, panel.unit)
    made.title(panel.title).unit(panel.unit).datasource(DATASOURCE)
    if panel.description:
        made.description(panel.description)
    if panel.min is not None:
        made.min(panel.min)
    if panel.max is not None:
        made.max(panel.max)
    for position, query in enumerate(panel.queries):
        made.with_target(_target(query, panel.kind).ref_id(chr(ord("A") + position)))
    return made


def _shown(kind: Kind, unit: str) -> _Builder:
    if kind is Kind.NUMBER:
        latest = common_builders.ReduceDataOptions().calcs(["lastNotNull"])
        return stat.Panel().reduce_options(latest).graph_mode(common.BigValueGraphMode.AREA)
    if kind is Kind.HEATMAP:
        return heatmap.Panel().calculate(False).y_axis(heatmap.YAxisConfig().unit(unit))
    legend = (
        common_builders.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.LIST)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    lines = (
        timeseries.Panel().legend(legend).tooltip(tooltip).show_points(common.VisibilityMode.NEVER)
    )
    if kind is Kind.STACK:
        stacked = common_builders.StackingConfig().mode(common.StackingMode.NORMAL)
        lines.stacking(stacked).fill_opacity(25)
    return lines


def _target(query: Query, kind: Kind) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).datasource(DATASOURCE).range()
    if kind is Kind.HEATMAP:
        return target.format(PromQueryFormat.HEATMAP).legend_format("{{le}}")
    return target.legend_format(query.legend or "__auto")

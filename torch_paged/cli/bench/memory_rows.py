"""One row of `bench memory`: what was counted here beside what was published, as a table, JSON and bars."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from torch_paged.cli.bench.plot import Panel
from torch_paged.cli.bench.published import Published

FIGURES = {"waste": "waste of pre-allocation", "users": "times the users"}


@dataclass(frozen=True)
class Row:
    """A scenario and its one headline figure.

    Attributes:
        scenario: which one.
        setting: its sizes, in words.
        without: what contiguous pre-allocation takes, or what sequences take that share nothing.
        blocks: what blocks take.
        ours: the figure that the published one speaks of, counted here.
        published: the same as others told it.
        unit: of both; parts are shown as percent.
        details: everything counted, for JSON.
    """

    scenario: str
    setting: str
    without: str
    blocks: str
    ours: float
    published: Published
    details: dict[str, Any]
    unit: Literal["part", "times"] = "part"

    def as_text(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "part" else f"{value:.1f}x"

    @property
    def published_text(self) -> str:
        low, high = (f"{100 * x:.3g}" if self.unit == "part" else f"{x:g}" for x in self._range)
        return (low if low == high else f"{low}–{high}") + ("%" if self.unit == "part" else "x")

    @property
    def _range(self) -> tuple[float, float]:
        return self.published.low, self.published.high

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            **self.details,
            "ours": self.ours,
            "published": list(self._range),
            "published_source": self.published.source,
            "unit": self.unit,
        }


def table(rows: Sequence[Row]) -> Table:
    made = Table(title="What blocks save")
    for header in ("scenario", "setting", "figure"):
        made.add_column(header)
    for header in (
        "pre-allocated,\nor nothing shared",
        "in blocks",
        "ours\n(counted here)",
        "published\n(by others)",
    ):
        made.add_column(header, justify="right")
    for row in rows:
        figure = FIGURES.get(row.scenario, "blocks saved")
        cells = (row.scenario, row.setting, figure, row.without, row.blocks, row.as_text(row.ours), row.published_text)
        made.add_row(*cells)
    return made


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Bars of ours and of both ends of the published range, parts and times apart."""
    made = []
    for unit, name, factor in (
        ("part", "waste of pre-allocation, or blocks saved, %", 100),
        ("times", "users, times", 1),
    ):
        mine = [row for row in rows if row.unit == unit]
        labels = [_label(row) for row in mine]
        series: dict[str, list[float | None]] = {
            "ours, counted here": [factor * row.ours for row in mine],
            "published, lowest": [factor * row.published.low for row in mine],
            "published, highest": [factor * row.published.high for row in mine],
        }
        made.append(Panel("What blocks save" if unit == "part" else "Users in the same memory", name, labels, series))
    return made


def _label(row: Row) -> str:
    if "width" in row.details:
        return f"{row.details['width']} {row.scenario}, {row.details['mix']}"
    return row.scenario

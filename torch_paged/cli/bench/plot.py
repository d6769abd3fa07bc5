"""Draws the figures of a bench as bars, one panel per subject."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch_paged.cli.errors import CommandError

BAR_INCHES = 0.22
PANEL_INCHES = 1.4
WIDTH_INCHES = 11.0


@dataclass(frozen=True)
class Panel:
    """Bars of one unit.

    Attributes:
        title: what they show.
        unit: of every bar.
        labels: one per group of bars.
        series: per name one value per label; None draws nothing.
    """

    title: str
    unit: str
    labels: list[str]
    series: dict[str, list[float | None]]


def require_matplotlib(file: str) -> None:
    """Find out before the measurements whether the picture can be drawn.

    Raises:
        CommandError: matplotlib is not installed, or draws no files with this ending.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise CommandError("--plot: matplotlib is not installed; run `pip install 'torch_paged[bench]'`") from None
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if file.rpartition(".")[2].lower() not in kinds or "." not in file:
        raise CommandError(f"--plot {file}: must end in one of .{', .'.join(kinds)}")


def draw(panels: Sequence[Panel], title: str, note: str, file: str) -> None:
    """Write the panels below one another to `file`.

    Raises:
        CommandError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [PANEL_INCHES + BAR_INCHES * len(panel.labels) * (len(panel.series) + 1) for panel in panels]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    figure.supxlabel(note, fontsize=7)
    column = figure.subplots(len(panels), height_ratios=heights, squeeze=False)[:, 0]
    for axes, panel in zip(column, panels, strict=True):
        count = len(panel.series)
        for number, (name, values) in enumerate(panel.series.items()):
            bars = [(row + number / (count + 1), value) for row, value in enumerate(values) if value is not None]
            drawn = axes.barh([place for place, _ in bars], [value for _, value in bars], 1 / (count + 1), label=name)
            axes.bar_label(drawn, fmt="{:.3g}", fontsize=7, padding=2)
        middle = (count - 1) / (count + 1) / 2
        axes.set_yticks([row + middle for row in range(len(panel.labels))], panel.labels, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.1, y=0.02)
        axes.set_xlabel(panel.unit)
        axes.set_title(panel.title, fontsize=10)
        if count > 1:
            axes.legend(fontsize=7)
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise CommandError(f"--plot {file}: {error.strerror}") from None

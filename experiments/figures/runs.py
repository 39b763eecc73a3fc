"""Figures that compare runs: accuracy against bytes, initialisations, cost."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.figures.style import COLUMN, INITS, METHODS, PAGE, Look, look, styled, title
from experiments.runs import CELL, one_of_each_seed

_MEASURES = {"top1": "top-1 accuracy (%)", "kl": "KL divergence to the original (nats)"}
_COSTS = {
    "compress_seconds": ("compression (s)", 1.0),
    "peak_rss_bytes": ("peak memory (GB)", 1e9),
}
_MB = 1e6


def pareto_front(sizes: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """Which points no other is at least as good as in both respects, and better in one.

    Args:
        sizes: (n,) smaller is better.
        values: (n,) larger is better.

    Returns:
        (n,) bool.
    """
    sizes, values = np.asarray(sizes, float), np.asarray(values, float)
    front = np.zeros(len(sizes), bool)
    best, best_size = -math.inf, math.nan
    for index in np.lexsort((-values, sizes)):
        if values[index] > best or (values[index] == best and sizes[index] == best_size):
            front[index] = True
            best, best_size = values[index], sizes[index]
    return front


@styled
def plot_pareto(runs: pd.DataFrame, measure: str = "top1") -> Figure:
    """Draw accuracy or divergence against the size of the packed file, for each method.

    A point is the mean over seeds, its bar the standard error. Points of one method and the same
    options at several goals are joined.

    Args:
        runs: of `experiments.runs.read_runs`.
        measure: top1 or kl.

    Raises:
        ValueError: no run has the measure.
    """
    means = _means(runs, ["file_bytes", measure])
    names = sorted(means["panel"].unique())
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    size = (COLUMN if columns == 1 else PAGE, 0.9 + 2.3 * rows)
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, panel in zip(names, panels, strict=False):
        cells = means[means["panel"] == name]
        better = cells[measure] if measure == "top1" else -cells[measure]
        front = cells[pareto_front(cells["file_bytes"], better)].sort_values("file_bytes")
        panel.step(
            front["file_bytes"] / _MB,
            front[measure],
            where="post",
            color="0.8",
            linewidth=2.5,
            zorder=1,
            label="Pareto front",
        )
        if measure == "kl":
            _divergence_axis(panel, cells["kl"])
        _draw_methods(panel, cells, measure)
        original = runs[runs["panel"] == name]
        if measure == "top1":
            panel.set_ylim(-3, 103)
        accuracy = original.groupby("seed")["original_top1"].mean().mean()
        panel.axhline(
            accuracy if measure == "top1" else 0,
            color="black",
            linestyle=(0, (4, 2)),
            linewidth=0.8,
            zorder=1.5,
            label="original",
        )
        megabytes = original["reference_bytes"].max() / _MB
        panel.set_title(f"{title(name)}, original {megabytes:.3g} MB")
        panel.set_xlabel("packed file (MB)")
        panel.set_ylabel(_MEASURES[measure])
    for panel in panels:  # the rest of the last row
        panel.remove()
    _legend(figure)
    return figure


@styled
def plot_init(runs: pd.DataFrame) -> Figure:
    """Draw divergence against the size of the packed file, for each clustering method.

    A row of panels for each network, a panel for each encoding.

    Args:
        runs: of `experiments.runs.read_runs`; those without data are drawn.

    Raises:
        ValueError: there is none.
    """
    means = _means(runs[runs["method"] == "jlcm_init"], ["file_bytes", "kl"])
    encodings = sorted(means["encoding"].unique(), reverse=True)
    figure, grid = _rows_of_panels(means, len(encodings), sharey="row")
    for row, (name, of_network) in zip(grid, means.groupby("panel"), strict=True):
        _divergence_axis(row[0], of_network["kl"])
        row[0].set_ylabel(_MEASURES["kl"])
        for panel, encoding in zip(row, encodings, strict=True):
            cells = of_network[of_network["encoding"] == encoding]
            for init, points in cells.groupby("init"):
                _draw_line(panel, points, "kl", INITS.get(init) or look(init))
            panel.set_title(f"{title(name)}, {encoding.replace('_', '-')}")
    _legend(figure)
    return figure


@styled
def plot_cost(runs: pd.DataFrame) -> Figure:
    """Draw time and peak memory of the compression against the size of the packed file.

    A row of panels for each network; points as in `plot_pareto`.

    Args:
        runs: of `experiments.runs.read_runs`.

    Raises:
        ValueError: no run has both.
    """
    means = _means(runs, ["file_bytes", *_COSTS])
    figure, grid = _rows_of_panels(means, len(_COSTS))
    for row, (name, cells) in zip(grid, means.groupby("panel"), strict=True):
        for panel, (measure, (label, unit)) in zip(row, _COSTS.items(), strict=True):
            _draw_methods(panel, cells, measure, unit)
            _log_axis(panel)
            panel.set_ylabel(label)
            panel.set_title(title(name))
    _legend(figure)
    return figure


def _means(runs: pd.DataFrame, measures: list[str]) -> pd.DataFrame:
    """Mean over seeds of each cell, and `<measure>_error`, its standard error (NaN of one seed)."""
    runs = runs.dropna(subset=measures)
    if runs.empty:
        raise ValueError(f"no run has {' and '.join(measures)}")
    runs = runs.astype(dict.fromkeys(measures, float))
    groups = one_of_each_seed(runs).groupby(CELL, dropna=False)[measures]
    return groups.mean().join(groups.sem().add_suffix("_error")).reset_index()


def _rows_of_panels(
    means: pd.DataFrame, columns: int, sharey: str | bool = False
) -> tuple[Figure, np.ndarray]:
    rows = means["panel"].nunique()
    figure = Figure((PAGE, 0.5 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex="row", sharey=sharey, squeeze=False)
    for panel in grid.flat:
        panel.set_xlabel("packed file (MB)")
    return figure, grid


def _draw_methods(panel: Axes, cells: pd.DataFrame, measure: str, unit: float = 1.0) -> None:
    """A line for each method and set of its options, best known last."""
    known = [name for name in METHODS if name in set(cells["method"])]
    others = sorted(set(cells["method"]) - METHODS.keys())
    for method in reversed([*known, *others]):
        of_method = cells[cells["method"] == method]
        series = [_without_bits(options) for options in of_method["options"]]
        for _, points in of_method.groupby([series, "init", "encoding"], dropna=False):
            _draw_line(panel, points, measure, look(method), unit)


def _without_bits(options: str) -> str:
    kept = json.loads(options)
    kept.pop("method.bits", None)
    return json.dumps(kept)


def _draw_line(
    panel: Axes, points: pd.DataFrame, measure: str, style: Look, unit: float = 1.0
) -> None:
    points = points.sort_values("file_bytes")
    errors = points[f"{measure}_error"] / unit
    panel.errorbar(
        points["file_bytes"] / _MB,
        points[measure] / unit,
        yerr=None if errors.isna().all() else errors,
        color=style.colour,
        marker=style.marker,
        markeredgecolor=style.colour if style.marker == "x" else "white",
        markersize=9 if style.marker == "*" else None,
        label=style.label,
    )


def _divergence_axis(panel: Axes, values: pd.Series) -> None:
    """Logarithmic down to the smallest positive divergence, then linear to 0, the original's."""
    positive = values[values > 0]
    smallest = 10.0 ** math.floor(math.log10(positive.min() if len(positive) else 1.0))
    panel.set_yscale("symlog", linthresh=smallest, linscale=0.5)
    panel.set_ylim(-smallest / 4, 3 * max(float(values.max()), smallest))


def _log_axis(panel: Axes) -> None:
    """Plain numbers, and several of each decade where there are few."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    ticks = (1, 1.5, 2, 3, 5, 7) if high < 30 * low else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=ticks))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure) -> None:
    """One entry for each label of the panels, below them, in a fixed order."""
    found = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found[label] = handle[0] if isinstance(handle, ErrorbarContainer) else handle
    order = [style.label for style in (METHODS | INITS).values()]
    labels = sorted(found, key=lambda label: (order.index(label) if label in order else 99, label))
    columns = 3 if figure.get_figwidth() < PAGE else 7
    figure.legend(
        [found[label] for label in labels], labels, loc="outside lower center", ncols=columns
    )

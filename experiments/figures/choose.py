"""Which runs a figure shows: those that can be compared, or the one that shows it best."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.figures.layers import (
    plot_histogram,
    plot_layers,
    plot_learning,
    plot_mapping_gradient,
    plot_reorder,
    with_codebooks,
)
from experiments.figures.runs import plot_cost, plot_init, plot_pareto
from experiments.figures.style import METHODS, look, title
from experiments.records import PACKED_FILE, read_record
from experiments.runs import default_options, one_of_each_seed
from jlcm.checkpoint import packed_weights
from jlcm.packed import StoredWeight
from jlcm.reading import read_tensors

Record = dict[str, Any]
#: A figure, and what it was drawn from.
Drawn = tuple[Figure, str]


def draw(name: str, runs: pd.DataFrame, chosen: set[str], layer: str | None = None) -> Drawn:
    """Draw one figure.

    Args:
        name: of `experiments.figures.CAPTIONS`.
        runs: of `experiments.runs.read_runs`.
        chosen: options that the runs were chosen by. In figures that compare methods the others are
            at their defaults.
        layer: of the figures that show one; None for one in the middle of the network.

    Raises:
        ValueError: what it needs is missing.
        OSError: a file cannot be read.
    """
    if name == "mapping_gradient":
        return plot_mapping_gradient(), "the library"
    if runs.empty:
        raise ValueError("there is no finished run: run something first, for instance make run")
    match name:
        case "pareto_top1":
            return _compare(
                runs, chosen, ["top1"], lambda found: plot_pareto(_compared(found), "top1")
            )
        case "pareto_kl":
            return _compare(runs, chosen, ["kl"], lambda found: plot_pareto(_compared(found), "kl"))
        case "cost":
            return _compare(runs, chosen, ["compress_seconds", "peak_rss_bytes"], plot_cost)
        case "init":
            runs = runs[runs["method"] == "jlcm_init"]
            if runs.empty:
                raise ValueError("there is no run without data: python run.py method=jlcm_init")
            return _compare(runs, chosen | {"init.method", "encoding.kind"}, ["kl"], plot_init)
        case "layers":
            return _first(runs, plot_layers)
        case "learning":
            return _first(_longest_curves(runs), plot_learning)
        case "histogram":
            return _histogram(runs, layer)
        case "reorder":
            return _reorder(runs, layer)
    raise ValueError(f"no figure is called {name}")


def _compare(
    runs: pd.DataFrame, free: set[str], measures: list[str], plot: Callable[[pd.DataFrame], Figure]
) -> Drawn:
    """Draw the runs that differ from the defaults in nothing but `free`; say what was left out."""
    usual = default_options(runs, free)
    if usual.empty:
        raise ValueError("no run has the default options of its method: choose others by --where")
    found = one_of_each_seed(usual.dropna(subset=measures))
    parts = [f"{len(found)} run{'s' if len(found) > 1 else ''}"]
    left_out = {
        f"without a finite {' or '.join(measures)}": int(usual[measures].isna().any(axis=1).sum()),
        "with other options than the defaults": len(runs) - len(usual),
    }
    parts += [f"left out {count} {why}" for why, count in left_out.items() if count]
    return plot(found), "; ".join(parts)


def _compared(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of the panels in which methods can be compared; all, if there is no such panel."""
    several = runs.groupby("panel")["method"].transform("nunique") > 1
    return runs[several] if several.any() else runs


def _preferred(runs: pd.DataFrame) -> Iterator[tuple[pd.Series, Record]]:
    """Runs with a record: default options first, our method first, then high goals, low seeds."""
    runs = runs[runs["folder"].notna()]
    order = list(METHODS)
    keys = [
        (row.options != "{}", order.index(row.method) if row.method in order else len(order))
        + (-row.alpha_goal, row.seed, row.run_id, index)
        for index, row in runs.iterrows()
    ]
    for *_, index in sorted(keys):
        yield runs.loc[index], read_record(runs.loc[index, "folder"])


def _longest_curves(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs whose layers were learned in the most steps; ours, if there is one."""
    if (runs["method"] == "jlcm").any():
        runs = runs[runs["method"] == "jlcm"]
    steps = {row.name: _steps(record) for row, record in _preferred(runs)}
    most = max(steps.values(), default=0)
    return runs.loc[[index for index, count in steps.items() if count == most]]


def _steps(record: Record) -> int:
    return max((len(part.get("curve") or []) for part in record["learning"]), default=0)


def _first(runs: pd.DataFrame, plot: Callable[[Record, str], Figure]) -> Drawn:
    """Draw the first of the preferred runs that has what the figure needs."""
    reason = "it needs the record of a run, and there are only tables: run something first"
    for row, record in _preferred(runs):
        try:
            return plot(record, _title(row)), str(row["folder"])
        except ValueError as error:
            reason = str(error)
    raise ValueError(reason)


def _histogram(runs: pd.DataFrame, layer: str | None) -> Drawn:
    """The pair of runs that differ in learning alone and have most layers laid out alike."""
    without, pairs = {}, []
    for row, record in _preferred(runs[runs["method"] == "jlcm_init"]):
        if (row["folder"] / PACKED_FILE).is_file():
            without.setdefault(_besides_learning(row["config"]), (row, record))
    for row, record in _preferred(runs[runs["method"] == "jlcm"]):
        start = without.get(_besides_learning(row["config"]))
        if start is not None and (row["folder"] / PACKED_FILE).is_file():
            alike = sum(map(_alike, start[1]["layers"], record["layers"]))
            pairs.append((alike, start, (row, record)))
    if not pairs:
        raise ValueError(
            "it needs the packed files of two runs that differ in learning alone: "
            "python run.py, and the same with learn=none"
        )
    _, (start, _), (end, _) = max(pairs, key=lambda pair: pair[0])  # the first of equals
    before, after = _weights(start["folder"]), _weights(end["folder"])
    names = [n for n in before if with_codebooks(before[n]) and with_codebooks(after.get(n))]
    if layer is not None and layer not in names:
        raise ValueError(f"no layer with codebooks is called {layer}: {', '.join(names)}")
    same = [name for name in names if before[name].bits == after[name].bits]
    name = layer or _middle(same or names, [*before])
    figure = plot_histogram(before[name], after[name], name, _title(end))
    return figure, f"{start['folder']} and {end['folder']}"


def _reorder(runs: pd.DataFrame, layer: str | None) -> Drawn:
    """The first run with a stored order whose groups span several rows, else with any."""
    found = []
    for row, record in _preferred(runs):
        stored = [x for x in record["layers"] if x["stored_order"] and layer in (None, x["name"])]
        wide = [x for x in stored if 4 * max(x["codebooks"], x["scales"]) <= x["shape"][0]]
        if stored and (row["folder"] / PACKED_FILE).is_file():
            candidates = [x["name"] for x in wide or stored]
            name = _middle(candidates, [x["name"] for x in record["layers"]])
            found.append((bool(wide), row, name))
    if not found:
        of_layer = "" if layer is None else f" of {layer}"
        raise ValueError(
            f"it needs the packed file of a run that stores an order{of_layer}: "
            "python run.py method=jlcm_init reorder=stored"
        )
    _, row, name = max(found, key=lambda entry: entry[0])  # the first of equals
    return plot_reorder(_weights(row["folder"])[name], name, _title(row)), str(row["folder"])


def _middle(candidates: list[str], layers: list[str]) -> str:
    """The candidate nearest to the middle of the network."""
    return min(candidates, key=lambda name: abs(layers.index(name) - len(layers) // 2))


def _besides_learning(config: dict[str, Any]) -> frozenset[tuple[str, str]]:
    return frozenset(
        (k, str(v)) for k, v in config.items() if not k.startswith(("learn.", "method."))
    )


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("name", "bits", "codebooks", "scales"))


def _weights(folder: Path) -> dict[str, StoredWeight]:
    return packed_weights(*read_tensors(folder / PACKED_FILE))


def _title(row: pd.Series) -> str:
    """Two lines: the network and data, then the method and its goal."""
    learn = row["config"].get("learn.kind")
    how = f", {learn}" if learn and '"learn.' in row["options"] else ""
    network = title(row["panel"]).replace("\n", ", ")
    return f"{network}\n{look(row['method']).label}{how}, alpha {row['alpha_goal']:g}"

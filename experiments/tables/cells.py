"""Cells of a table: the runs of its sweep, and what the records of these runs say."""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.config import DATA_PLACES, NOT_IDENTITY, configurations, identity
from experiments.runs import compression_seconds
from experiments.tables.specs import TABLES, Measure, Table, paper_numbers


@dataclass(frozen=True)
class Cell:
    """One run of a sweep but for its seed: values of the swept keys, and what identifies it."""

    keys: dict[str, str]
    identity: str


def narrowed(name: str, overrides: Sequence[str]) -> list[str]:
    """Overrides that make a table another one.

    Those that choose a part of the sweep, seeds, the place of the data, or what does not change
    the result, leave the table what it is.

    Args:
        name: of the experiment.
        overrides: of the command line.

    Raises:
        hydra.errors.HydraException: for an override that cannot be read.
    """
    swept = _sweep(name)
    kept = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.get_key_element().lstrip("+~")
        head, _, tail = key.partition(".")
        if key == "seed" or head.partition("/")[0] in NOT_IDENTITY:
            continue
        if head == "data" and tail in DATA_PLACES:
            continue
        if key in swept and set(_values(override)) <= set(swept[key]):
            continue
        kept.append(override.input_line)
    return kept


@cache
def cells(name: str, overrides: tuple[str, ...] = ()) -> tuple[Cell, ...]:
    """All cells of an experiment's sweep.

    Args:
        name: of the experiment.
        overrides: further ones, as `narrowed` returns them.
    """
    swept = dict(_sweep(name))
    fixed = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.get_key_element() in swept or override.is_sweep_override():
            swept[override.get_key_element()] = _values(override)
        else:
            fixed.append(override.input_line)
    found = []
    with configurations():
        for values in itertools.product(*swept.values()):
            keys = dict(zip(swept, values, strict=True))
            chosen = [f"{key}={value}" for key, value in keys.items()]
            config = compose("config", overrides=[f"experiment={name}", *fixed, *chosen])
            found.append(Cell(keys=keys, identity=_without_seed(identity(config))))
    return tuple(found)


def tidy(
    name: str, records: Iterable[dict[str, Any]], overrides: Sequence[str] = ()
) -> pd.DataFrame:
    """A table as data: one line per cell and measure, finished or not.

    Args:
        name: of the experiment.
        records: of any runs; those that belong to no cell are left aside.
        overrides: that make the table another one (`narrowed`).

    Returns:
        Columns: the swept keys, `measure`, `paper`, `ours` (mean over the seeds), `difference`
        (only at the paper's scale), `status` (reproduced, reduced scale, not run),
        `standard_error` (over the samples), `seeds`, `seed_std`, `original`, then what the runs
        have in common. Empty where nothing is known.

    Raises:
        ValueError: the runs of the table were evaluated on different data.
    """
    table = TABLES[name]
    by_cell: dict[str, dict[str, dict]] = {}
    for record in records:
        seeds = by_cell.setdefault(_without_seed(record["config"]), {})
        seeds[str(record["config"].get("seed"))] = record
    lines, used = [], []
    for cell in cells(name, tuple(overrides)):
        runs = list(by_cell.get(cell.identity, {}).values())
        used += runs
        lines += [
            {**cell.keys, "measure": heading, **_numbers(runs, measure), **_common(runs)}
            for heading, measure in table.measures.items()
        ]
    _check_data(name, used)
    return _beside_the_paper(table, pd.DataFrame(lines), reduced=bool(overrides))


@cache
def _sweep(name: str) -> dict[str, list[str]]:
    """Keys and values of an experiment's sweep, in its order."""
    with configurations():
        config = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
    params = config.hydra.sweeper.params or {}
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    return {override.get_key_element(): _values(override) for override in parsed}


def _values(override) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _without_seed(kept: dict[str, Any]) -> str:
    """Identity of a run but for its seed and the place of its data, which all of a table share."""
    kept = {key: value for key, value in kept.items() if key != "seed"}
    apart = (*DATA_PLACES, "distill_epochs")  # learn.distill.epochs has these where they count
    kept["data"] = {k: v for k, v in kept.get("data", {}).items() if k not in apart}
    if weights := kept["model"].get("weights"):
        kept["model"] = kept["model"] | {"weights": Path(weights).name}
    return json.dumps(kept, sort_keys=True, default=str)


def _check_data(name: str, records: list[dict[str, Any]]) -> None:
    """One table shows one set of samples per kind of data."""
    found: dict[tuple, list[str]] = {}
    for record in records:
        data = record["config"].get("data", {})
        places = tuple(Path(data[k]).name for k in DATA_PLACES[:2] if data.get(k))
        found.setdefault((*places, _samples(record)), []).append(record["run_id"])
    if len(found) > 1:
        runs = "; ".join(f"{data}: {', '.join(ids)}" for data, ids in found.items())
        raise ValueError(f"{name}: its runs were evaluated on different data: {runs}")


def _numbers(records: list[dict[str, Any]], measure: Measure) -> dict[str, Any]:
    values = pd.Series([at(r, measure.path) for r in records], dtype=float) / measure.unit
    errors = pd.Series([at(record, measure.standard_error) for record in records], dtype=float)
    originals = pd.Series([at(record, measure.original) for record in records], dtype=float)
    return {
        "ours": values.mean(),
        "standard_error": errors.mean(),
        "seed_std": values.std(),
        "seeds": len(values),
        "original": originals.mean(),
    }


#: Columns by their place in the record: means over the seeds.
_MEANS = {
    "true alpha": "footprint.alpha_layers",
    "alpha total": "footprint.alpha_total",
    "file bytes": "footprint.file_bytes",
    "KL": "packed.kl",
}


def _common(records: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(numbers) -> float:
        return pd.Series(list(numbers), dtype=float).mean()

    notes = dict.fromkeys(note for record in records for note in record.get("notes", ()))
    return {
        **{name: mean(at(r, path) for r in records) for name, path in _MEANS.items()},
        "samples": mean(map(_samples, records)),
        "seconds": mean(map(compression_seconds, records)),
        "nominal alpha": mean(map(nominal_alpha, records)),
        "peak GB": mean(at(r, "peak_rss_bytes") for r in records) / 1e9,
        "data": " ".join(sorted({r["config"].get("data", {}).get("kind", "") for r in records})),
        "runs": " ".join(record["run_id"] for record in records),
        "notes": "; ".join(notes),
    }


def _samples(record: dict[str, Any]) -> int | None:
    return at(record, "packed.samples") or at(record, "results.precision.float32.samples")


def nominal_alpha(record: dict[str, Any]) -> float | None:
    """Compression that the bits of the codes alone would give: 16 / bits for uniform methods."""
    layers = record.get("layers") or ()
    sizes = [float(pd.Series(layer["shape"]).prod()) for layer in layers]
    bits = sum(size * layer["bits"] for size, layer in zip(sizes, layers, strict=True))
    return 16 * sum(sizes) / bits if bits else None


def at(record: dict[str, Any], path: str | None) -> Any:
    """A number of a record; None for no path, or one that the record does not have."""
    value: Any = record
    for key in path.split(".") if path else ():
        value = value.get(key) if isinstance(value, dict) else None
    return value if path else None


def _beside_the_paper(table: Table, lines: pd.DataFrame, *, reduced: bool) -> pd.DataFrame:
    """Add the paper's numbers, the difference to them and the status of each cell."""
    keys = [*table.lines, *table.columns]
    numbers = paper_numbers(table)
    if numbers is None:
        lines["paper"] = float("nan")
    else:
        shared = [key for key in numbers if key in keys]
        numbers = numbers.melt(shared, var_name="measure", value_name="paper")
        # A sweep without this key has one value of it, and the paper another.
        if set(shared) <= set(lines):
            lines = lines.merge(numbers, how="left", on=[*shared, "measure"])
        else:
            lines["paper"] = float("nan")
    full = table.full_scale is not None and not reduced
    at_scale = full & ((lines["samples"] >= (table.full_scale or 0)) | (not table.full_scale))
    lines["difference"] = (lines["ours"] - lines["paper"]).where(at_scale)
    lines["status"] = "reduced scale"
    lines.loc[at_scale, "status"] = "reproduced"
    lines.loc[lines["ours"].isna(), "status"] = "not run"
    swept = list(lines.columns[: lines.columns.get_loc("measure")])
    first = [*swept, "measure", "paper", "ours", "difference", "status"]
    return lines[[*first, *(column for column in lines if column not in first)]]

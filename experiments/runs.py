"""Finished runs as one table, a line each."""

import functools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose

from experiments.config import DATA_PLACES, configurations, identity
from experiments.records import load_records

_log = logging.getLogger(__name__)

#: Columns of a table, and where a record has them.
COLUMNS = {
    "run_id": "run_id",
    "model": "config.model.name",
    "data": "config.data.kind",
    "samples": "packed.samples",
    "seed": "config.seed",
    "method": "config.method.name",
    "first_last": "config.encoding.first_last",
    "init": "config.init.method",
    "encoding": "config.encoding.kind",
    "learn": "config.learn.kind",
    "allocation": "config.learn.allocation",
    "distill_epochs": "config.learn.distill.epochs",
    "alpha_goal": "config.alpha",
    "alpha_layers": "footprint.alpha_layers",
    "alpha_total": "footprint.alpha_total",
    "file_bytes": "footprint.file_bytes",
    "original_top1": "original.top1",
    "top1": "packed.top1",
    "top1_standard_error": "packed.top1_standard_error",
    "top5": "packed.top5",
    "agreement": "packed.agreement",
    "kl": "packed.kl",
    "compress_seconds": "seconds.compress",
    "peak_rss_bytes": "peak_rss_bytes",
    "notes": "notes",
}
_NUMBERS = ("samples", "seed", "alpha_goal", "alpha_total", "file_bytes", "top1")
#: Without these a run is not shown.
NEEDED = ("model", "data", *_NUMBERS)
#: Runs that are equal in these are those of several seeds.
CELL = ["panel", "method", "options", "init", "encoding", "alpha_goal"]
#: Options that a compared method may set differently without becoming a variant of itself.
_FREE = {"method.bits", "encoding.first_last"}
#: Options that make a run more than its initialisation.
_LEARNED = ("learn.rotation", "learn.importance", "learn.blocks", "learn.distill")
#: Options of data that a title says otherwise, or not.
_UNTITLED = {"kind", "limit", *DATA_PLACES}


def as_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Records as a table of `COLUMNS`; what a record does not have is NaN."""
    frame = pd.json_normalize(records).reindex(columns=list(COLUMNS.values()))
    table = frame.rename(columns={path: name for name, path in COLUMNS.items()})
    table["compress_seconds"] = [compression_seconds(record) for record in records]
    table["notes"] = table["notes"].map("; ".join)
    return table


def compression_seconds(record: dict[str, Any]) -> float:
    """Time of the compression, with that of the layers and blocks that another run has learned.

    NaN for records of other tasks.
    """
    restored = sum(part["seconds"] for part in record.get("learning", ()) if part.get("restored"))
    return record["seconds"].get("compress", float("nan")) + restored


def read_runs(results: Path) -> pd.DataFrame:
    """All runs of networks that were compressed, below a folder of results.

    Damaged records are left out, with a warning that names them.

    Returns:
        The table has `COLUMNS` and
        `config`: options by dotted name, without those that are null;
        `folder`: of the run, None for a published record;
        `panel`: network and data, as a title;
        `options`: JSON of what differs from the defaults;
        `reference_bytes`: of the original at 16 bits.
    """
    records = [r for r in load_records(results).values() if _is_whole(r)]
    if not records:
        return pd.DataFrame(columns=[*COLUMNS, "config", "folder"])
    folders = [results / "runs" / record["run_id"] for record in records]
    table = as_table(records).assign(
        config=[flatten(record["config"]) for record in records],
        folder=[folder if folder.is_dir() else None for folder in folders],
    )
    return _described(table)


def select(runs: pd.DataFrame, conditions: Iterable[str]) -> pd.DataFrame:
    """Runs whose options have the given values, each KEY=VALUE as on the command line of `run.py`.

    Raises:
        ValueError: no run has the option, or none has the value.
    """
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not (key and equals):
            raise ValueError(f"a condition is KEY=VALUE, not {condition}")
        found = [
            row.run_id if key == "run_id" else row.config.get(key) for row in runs.itertuples()
        ]
        if value != "null" and all(option is None for option in found):
            raise ValueError(f"no run has the option {key}")
        runs = runs[[_text(option) == value for option in found]]
        if runs.empty:
            raise ValueError(f"no run fits {key}={value}")
    return runs


def default_options(runs: pd.DataFrame, free: set[str] = frozenset()) -> pd.DataFrame:
    """Runs that differ from the defaults of `conf/` in nothing but `free` (and bits, and ends)."""
    kept = [set(json.loads(options)) <= _FREE | set(free) for options in runs["options"]]
    return runs[kept]


def one_of_each_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """One run of each cell and seed."""
    return runs.drop_duplicates([*CELL, "seed"])


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by dotted name, without those that are null."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


@functools.cache
def default_config() -> dict[str, Any]:
    """The defaults of `conf/`, flattened."""
    with configurations():
        return flatten(identity(compose("config")))


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether a record has what a line of the table needs; a divergence may be missing."""
    if "packed" not in record:
        return False  # of another task
    try:
        line, _ = as_table([record]).iloc[0], record["layers"]
        numbers = pd.to_numeric(line[list(_NUMBERS)], errors="coerce")
        missing = [name for name in NEEDED if pd.isna(numbers.get(name, line[name]))]
    except (AttributeError, KeyError, NotImplementedError, TypeError) as error:
        missing = [repr(error)]
    if missing:
        _log.warning("%s is left out, it lacks: %s", record["run_id"], ", ".join(missing))
    return not missing


def _described(runs: pd.DataFrame) -> pd.DataFrame:
    places = [_place(config) for config in runs["config"]]
    runs = runs.assign(
        method=[_method(config) for config in runs["config"]],
        panel=[_panel(row.config, row.samples) for row in runs.itertuples()],
        options=[json.dumps(_differences(config), sort_keys=True) for config in runs["config"]],
        reference_bytes=[round(row.alpha_total * row.file_bytes) for row in runs.itertuples()],
    )
    # Lists of images of equal length under one title are told apart by their names.
    several = runs.assign(place=places).groupby("panel")["place"].transform("nunique") > 1
    named = [f"{panel}, {place}" for panel, place in zip(runs["panel"], places, strict=True)]
    return runs.assign(panel=runs["panel"].mask(several & pd.Series(places).notna(), named))


def _place(config: dict[str, Any]) -> str | None:
    path = config.get("data.list") or config.get("data.root")
    return None if path is None else Path(path).name


def _method(config: dict[str, Any]) -> str:
    method = config.get("method.name", "jlcm")
    learned = (
        config.get("learn.kind", "none") != "none"
        or config.get("learn.allocation", "uniform") != "uniform"
        or any(k.startswith(_LEARNED) for k in config)
    )
    return "jlcm_init" if method == "jlcm" and not learned else method


def _looked_at(config: dict[str, Any], method: str) -> dict[str, Any]:
    """Options that the method looks at."""
    groups = {"jlcm": (), "jlcm_init": ("learn.",)}
    ignored = groups.get(method, ("init.", "encoding.", "reorder.", "learn."))
    ignored += ("model.", "data.", "method.name", "alpha", "seed")
    kept = {key: value for key, value in config.items() if not key.startswith(ignored)}
    if ends := config.get("encoding.first_last"):
        kept["encoding.first_last"] = ends
    return kept


def _differences(config: dict[str, Any]) -> dict[str, Any]:
    """Options that are not at their defaults; null, false and missing are the same."""
    method = _method(config)
    given, usual = _looked_at(config, method), _looked_at(default_config(), method)
    keys = sorted(given.keys() | usual.keys())
    return {k: given.get(k) for k in keys if (given.get(k) or None) != (usual.get(k) or None)}


def _panel(config: dict[str, Any], samples: float) -> str:
    """Title of what a run compresses and is evaluated on."""
    title = (
        f"{config['model.name']}, {config['data.kind'].replace('_', ' ')}, {samples:,.0f} images"
    )
    if weights := config.get("model.weights"):
        title += f", {Path(weights).stem}"
    usual = default_config()
    for key in sorted(config):
        group, _, option = key.partition(".")
        if group == "data" and option not in _UNTITLED and config[key] != usual.get(key):
            title += f", {option}={config[key]}"
    return title


def _text(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
    return str(value)

"""From records to the files of tables and the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.figures import CAPTIONS
from experiments.records import load_records, publish_record
from experiments.tables.cells import narrowed, tidy
from experiments.tables.html import write_report
from experiments.tables.pictures import picture_grid
from experiments.tables.specs import TABLES
from experiments.tables.write import write_table
from jlcm.config import check_choice


def make_tables(
    results_dir: Path, names: list[str] | None = None, overrides: Sequence[str] = ()
) -> list[Path]:
    """Write tables and the report from records alone.

    Args:
        results_dir: with `runs/` or `records/`. Tables go to `tables/`, the report to
            `report.html`, and the records behind them to `records/`.
        names: of experiments; None for every table that has a record.
        overrides: of the command line of the sweep. Those that change the runs (data.limit=100)
            make a table of their own, named after them.

    Returns:
        The files of the tables and of the report.

    Raises:
        Invalid: (a ValueError) for a name that is no table.
        ValueError: a table's runs were evaluated on different data, or none of those named has
            a record.
    """
    for name in names or ():
        check_choice("table", name, tuple(TABLES))
    records = load_records(results_dir)
    files = []
    for name in names or TABLES:
        extra = narrowed(name, overrides)
        table = tidy(name, records.values(), extra)
        used = " ".join(table["runs"]).split()
        if not used:
            continue
        for run_id in used:
            publish_record(results_dir, records[run_id])
        stem = "@".join([name, *(text.replace("/", "_") for text in extra)])
        files += write_table(results_dir / "tables", stem, TABLES[name], table)
    if not files:
        wanted = ", ".join(names) if names else "any table"
        raise ValueError(f"no record below {results_dir} belongs to {wanted}: run it first")
    return [*files, _make_report(results_dir, records)]


def after_sweep(arguments: list[str]) -> list[Path]:
    """Write the table that a sweep was for.

    Args:
        arguments: of the command line.

    Returns:
        The files; none where the sweep was for no table.

    Raises:
        ValueError: as `make_tables` does.
    """
    overrides = [text for text in arguments if not text.startswith("-")]
    chosen = dict(text.split("=", 1) for text in overrides if "=" in text)
    name = chosen.get("experiment")
    if name not in TABLES or not {"-m", "--multirun"} & set(arguments):
        return []
    return make_tables(Path(chosen.get("results_dir", "results")), [name], overrides)


def _make_report(results_dir: Path, records: dict[str, dict[str, Any]]) -> Path:
    """Write the page of all tables that were made, and of all figures."""
    tables = {path.stem: read_tidy(path) for path in sorted((results_dir / "tables").glob("*.csv"))}
    used = {run_id for table in tables.values() for run_id in " ".join(table["runs"]).split()}
    records = {k: v for k, v in records.items() if k in used}
    drawn = {name: results_dir / "figures" / f"{name}.png" for name in CAPTIONS}
    figures = {path: CAPTIONS[name] for name, path in drawn.items() if path.is_file()}
    for stem, table in tables.items():
        file = results_dir / "figures" / f"pictures_{stem}.png"
        text = picture_grid(file, TABLES[stem.partition("@")[0]], table, results_dir)
        if text is not None:
            figures[file] = text
    path = results_dir / "report.html"
    write_report(path, tables, records, figures)
    return path


def read_tidy(path: Path) -> pd.DataFrame:
    """A tidy table as it was written."""
    keys = {key for table in TABLES.values() for key in (*table.lines, *table.columns)}
    texts = dict.fromkeys((*keys, "runs", "notes"), str)
    table = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])
    return table.fillna({"runs": "", "notes": ""})

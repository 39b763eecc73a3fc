"""One self-contained page of all tables and figures."""

import base64
import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.labels import LABELS
from experiments.runs import flatten
from experiments.tables.cells import at
from experiments.tables.specs import TABLES, Table, paper_numbers
from experiments.tables.write import DIGITS, caption, footnotes, label, number, paper_heading, shown
from jlcm.files import replacing

#: What the page says of a run when it is pointed at, beside its configuration.
_SHOWN = {
    "bytes": "footprint.file_bytes",
    "alpha of the layers": "footprint.alpha_layers",
    "alpha of the file": "footprint.alpha_total",
    "KL, nats": "packed.kl",
    "samples": "packed.samples",
    "seconds to compress": "seconds.compress",
    "peak memory, bytes": "peak_rss_bytes",
    "device": "device",
    "torch": "versions.torch",
}


def write_report(
    path: Path,
    tables: dict[str, pd.DataFrame],
    records: dict[str, dict[str, Any]],
    figures: dict[Path, str],
) -> None:
    """Write the page.

    Args:
        path: of the page. Links to records are relative to its folder.
        tables: tidy tables by the name of their experiment, and overrides after it if any (@);
            an experiment without one is shown as not run.
        records: of the tables' runs, by run_id.
        figures: PNG files and their captions.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    names = [*tables, *(name for name in TABLES if name not in tables)]
    sections = [
        _section(name, tables.get(name))
        for name in sorted(names, key=lambda n: (n not in tables, n))
    ]
    text = environment.get_template("report.html.jinja").render(
        sections=sections,
        figures=[
            {"caption": text, "data": base64.b64encode(file.read_bytes()).decode()}
            for file, text in figures.items()
        ],
        runs=_runs(records),
        number=number,
    )
    with replacing(path) as temporary:
        temporary.write_text(text)


def _section(name: str, tidy: pd.DataFrame | None) -> dict[str, Any]:
    """What the page shows of one table."""
    experiment, *overrides = name.split("@")
    table = TABLES[experiment]
    command = f"python run.py -m experiment={experiment} {' '.join(overrides)} {table.command}"
    section = {
        "name": name,
        "command": " ".join(command.split()),
        "keys": [LABELS.get(key, key) for key in table.lines],
        "paper": paper_heading(table),
        "compared": table.full_scale is not None,
    }
    if tidy is None:
        return section | {"caption": f"{table.title}.", "notes": [], "groups": _published(table)}
    groups = shown(table, tidy).groupby([*table.columns, "measure"], sort=False)
    return section | {
        "caption": caption(table, tidy),
        "notes": footnotes(table, tidy),
        "groups": [
            {"title": _title(table, group), "lines": [_line(table, cell) for cell in _dicts(cells)]}
            for group, cells in groups
        ],
    }


def _title(table: Table, group: tuple[str, ...]) -> str:
    return ", ".join((*map(label, table.columns, group), group[-1]))


def _dicts(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Lines as dictionaries; what is not known is None."""
    return cells.astype(object).where(cells.notna(), None).to_dict("records")


def _line(table: Table, cell: dict[str, Any]) -> dict[str, Any]:
    measure = table.measures[cell["measure"]]
    group = {key: cell[key] for key in ("paper", "ours", "difference", "standard_error", "status")}
    return group | {
        "names": [label(key, cell[key]) for key in table.lines],
        "digits": measure.digits,
        "better": measure.better,
        "original": cell["original"],
        "details": {key: number(cell[key], DIGITS[key]) for key in table.details},
        "runs": (cell["runs"] or "").split(),
    }


def _published(table: Table) -> list[dict[str, Any]]:
    """The paper's numbers of a table that was not run."""
    numbers = paper_numbers(table)
    if numbers is None or table.full_scale is None:
        return []
    measures = [m for m in table.measures if m in numbers]
    keys = [*table.lines, *table.columns]
    tidy = numbers.melt(keys, measures, var_name="measure", value_name="paper")
    blank = ["ours", "difference", "standard_error", "original", *table.details, "runs"]
    tidy = tidy.assign(status="not run", **dict.fromkeys(blank))
    groups = tidy.groupby([*table.columns, "measure"], sort=False)
    return [
        {"title": _title(table, group), "lines": [_line(table, cell) for cell in _dicts(cells)]}
        for group, cells in groups
    ]


def _runs(records: dict[str, dict[str, Any]]) -> str:
    """Configuration and bytes of each run as JSON that may stand inside a script element."""
    found = {
        run_id: flatten(record["config"])
        | {name: at(record, path) for name, path in _SHOWN.items() if at(record, path) is not None}
        for run_id, record in records.items()
    }
    return json.dumps(found).replace("<", "\\u003c")

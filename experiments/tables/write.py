"""A tidy table as a printed one: CSV, LaTeX (booktabs) and Markdown."""

import io
from pathlib import Path

import pandas as pd

from experiments.labels import LABELS
from experiments.tables.specs import Measure, Table
from jlcm.files import replacing

#: Digits after the point of the details.
DIGITS = {"KL": 4, "true alpha": 2, "seconds": 0, "peak GB": 1}
#: Runs that compress by a smaller part of the goal are not compared with others.
REACHED = 0.95


def label(key: str, value: str) -> str:
    """A value of a swept key as it is printed."""
    return f"alpha {value}" if key == "alpha" else LABELS.get(value, value)


def paper_heading(table: Table) -> str:
    """Heading of the paper's numbers; says of what data where ours are of another."""
    return "paper" if table.full_scale is not None else "paper (ImageNet)"


def shown(table: Table, tidy: pd.DataFrame) -> pd.DataFrame:
    """A tidy table without the groups of columns that nobody has numbers for."""
    known = tidy["ours"].notna() | tidy["paper"].notna()
    groups = tidy.groupby([*table.columns, "measure"], sort=False)
    return tidy[known.groupby([tidy[k] for k in groups.keys], sort=False).transform("any")]


def wide(table: Table, tidy: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A tidy table with lines and columns as they are printed.

    Args:
        table: its layout.
        tidy: from `experiments.tables.cells.tidy`, with a number of ours or the paper's.

    Returns:
        (texts, best) of equal shape: what stands in each cell, empty where nothing was run, and
        whether it is the best of its column, of ours among the runs that reached the goal. The
        original network, if any, is the first line.
    """
    tidy = shown(table, tidy)
    texts, best = {}, {}
    for group, column in tidy.groupby([*table.columns, "measure"], sort=False):
        measure = table.measures[group[-1]]
        heading = (*map(label, table.columns, group), group[-1])
        if column["paper"].notna().any():
            name = paper_heading(table)
            texts[*heading, name] = ["", *_numbers(column["paper"], measure.digits)]
            best[*heading, name] = [False, *_best(column["paper"], measure)]
        numbers = pd.concat([pd.Series([column["original"].mean()]), column["ours"]])
        texts[*heading, "ours"] = _numbers(numbers, measure.digits)
        compared = column["ours"].where(_reached(table, column))
        best[*heading, "ours"] = [False, *_best(compared, measure)]
        if group[-1] != list(table.measures)[-1]:
            continue  # details belong to the run: once for all its measures
        for detail in table.details:
            texts[*heading, detail] = ["", *_numbers(column[detail], DIGITS[detail])]
            best[*heading, detail] = [False] * (1 + len(column))
    # All groups have the same lines: a sweep is a grid.
    lines = column[list(table.lines)].itertuples(index=False)
    names = [("original, fp16", *[""] * (len(table.lines) - 1))]
    names += [tuple(map(label, table.lines, line)) for line in lines]
    index = pd.MultiIndex.from_tuples(names, names=[LABELS.get(k, k) for k in table.lines])
    texts, best = (pd.DataFrame(v).set_index(index) for v in (texts, best))
    if tidy["original"].isna().all():
        texts, best = texts.iloc[1:], best.iloc[1:]
    one = [k for k in range(texts.columns.nlevels - 1) if texts.columns.unique(k).size == 1]
    return texts.droplevel(one, axis=1), best.droplevel(one, axis=1)


def number(value: float | None, digits: int) -> str:
    """A number as it is printed; nothing where there is none."""
    return "" if pd.isna(value) else f"{value:,.{digits}f}"


def _numbers(values: pd.Series, digits: int) -> list[str]:
    return [number(value, digits) for value in values]


def _best(values: pd.Series, measure: Measure) -> list[bool]:
    """Cells that print the same as the best one."""
    rounded = values.round(measure.digits)
    if measure.better is None or rounded.notna().sum() < 2:
        return [False] * len(values)
    return list(rounded == (rounded.max() if measure.better == "high" else rounded.min()))


def _reached(table: Table, tidy: pd.DataFrame) -> pd.Series:
    """Which runs are as small as asked; where nothing is known, they count as such."""
    if "alpha" not in table.columns:
        return pd.Series(True, index=tidy.index)
    return ~(tidy["true alpha"] < REACHED * pd.to_numeric(tidy["alpha"]))


def caption(table: Table, tidy: pd.DataFrame) -> str:
    """Title of a table, what all its columns share, and how much stands behind its numbers."""
    tidy = shown(table, tidy)
    parts = [
        label(key, tidy[key].iloc[0])
        for key in (*table.columns, "measure")
        if tidy[key].nunique() == 1
    ]
    run = tidy[tidy["seeds"] > 0]
    if not run.empty:
        if run["samples"].notna().any():
            parts.append(f"{run['samples'].max():,.0f} samples")
        least, most = int(run["seeds"].min()), int(run["seeds"].max())
        seeds = str(most) if least == most else f"{least} to {most}"
        parts.append(f"{seeds} seed{'s' if most > 1 else ''}")
    return f"{table.title} ({', '.join(parts)})." if parts else f"{table.title}."


def footnotes(table: Table, tidy: pd.DataFrame) -> list[str]:
    """What runs did otherwise than asked: each note once, with the lines that it belongs to."""
    found: dict[str, dict[str, None]] = {}
    run = tidy[tidy["seeds"] > 0]
    for _, cell in run.iterrows():
        name = ", ".join(label(key, cell[key]) for key in table.lines)
        for note in (cell["notes"] or "").split("; "):
            found.setdefault(note, {})[name] = None
    found.pop("", None)
    lines = len(run[list(table.lines)].drop_duplicates())
    notes = [
        note if len(names) == lines > 1 else f"{'; '.join(names)}: {note}"
        for note, names in found.items()
    ]
    larger = run[~_reached(table, run)]
    if not larger.empty:
        names = [
            ", ".join(label(key, cell[key]) for key in (*table.lines, "alpha"))
            for _, cell in larger.iterrows()
        ]
        notes.append(f"larger than asked, and not marked: {'; '.join(dict.fromkeys(names))}")
    return notes


def latex(name: str, table: Table, tidy: pd.DataFrame) -> str:
    """A table environment that needs the package booktabs alone."""
    texts, best = wide(table, tidy)
    bold = best.replace({True: "textbf:--rwrap;", False: ""})
    style = texts.style.format(escape="latex").apply(lambda _: bold, axis=None)
    for axis in (0, 1):
        style = style.format_index(escape="latex", axis=axis)
        style = style.format_index_names(escape="latex", axis=axis)
    source = style.to_latex(
        hrules=True,
        multirow_align="naive",
        multicol_align="c",
        column_format="l" * texts.index.nlevels + "r" * texts.shape[1],
        position_float="centering",
        caption=_escaped(caption(table, tidy)),
        label=f"tab:{name}",
    )
    notes = [f"\\par {_escaped(note)}\n" for note in footnotes(table, tidy)]
    end = "\\end{table}"
    small = "\\par\\smallskip\\footnotesize\n" if notes else ""
    return source.replace("\\centering", "\\centering\\small").replace(
        end, f"{small}{''.join(notes)}{end}"
    )


def _escaped(text: str) -> str:
    """Text for LaTeX, by the same rules as cells."""
    style = pd.DataFrame([text]).style.format(escape="latex").hide(axis=0).hide(axis=1)
    return style.to_latex().splitlines()[1].removesuffix(" \\\\")


def markdown(table: Table, tidy: pd.DataFrame) -> str:
    """A table of Markdown, headings joined, the best of each column in bold."""
    texts, best = wide(table, tidy)
    numbers = texts.where(~best, "**" + texts + "**")
    joined = [c if isinstance(c, str) else ", ".join(c) for c in texts.columns]
    out = io.StringIO()
    print(caption(table, tidy), end="\n\n", file=out)
    print(f"| {' | '.join([*texts.index.names, *joined])} |", file=out)
    print("|" + "---|" * texts.index.nlevels + "---:|" * texts.shape[1], file=out)
    for line, values in zip(numbers.index, numbers.to_numpy(), strict=True):
        names = line if isinstance(line, tuple) else (line,)
        print(f"| {' | '.join((*names, *values))} |", file=out)
    if notes := footnotes(table, tidy):
        print("", *(f"- {note}" for note in notes), sep="\n", file=out)
    return out.getvalue()


def write_table(folder: Path, name: str, table: Table, tidy: pd.DataFrame) -> list[Path]:
    """Write a table as CSV, LaTeX and Markdown, each atomically.

    Args:
        folder: that the files go to.
        name: of the files.
        table: layout.
        tidy: from `experiments.tables.cells.tidy`.

    Returns:
        The files.
    """
    texts = {
        ".csv": tidy.to_csv(index=False, float_format="%.6g"),
        ".tex": latex(name, table, tidy),
        ".md": markdown(table, tidy),
    }
    for suffix, text in texts.items():
        with replacing(folder / f"{name}{suffix}") as temporary:
            temporary.write_text(text)
    return [folder / f"{name}{suffix}" for suffix in texts]

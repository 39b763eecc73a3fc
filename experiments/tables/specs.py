"""What each table shows: its lines, columns and measures, by the name of its experiment.

A table belongs to the sweep in `conf/experiment/<name>.yaml`; lines and columns are keys of that
sweep. The paper's numbers are in `paper/`, under the same keys.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

#: The paper's numbers: tables 1 to 5 of its text, the throughput from its rebuttal.
PAPER = Path(__file__).with_name("paper")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number of a record.

    Attributes:
        path: keys in the record, joined by dots.
        standard_error: the same for its standard error over the samples, None if it has none.
        original: the same for the original network's number.
        better: "high" or "low", None where neither is.
        digits: after the decimal point.
        unit: what the record's number is divided by.
    """

    path: str
    standard_error: str | None = None
    original: str | None = None
    better: str | None = "high"
    digits: int = 2
    unit: float = 1


def _with_error(name: str) -> Measure:
    """A result of packed and original networks that has a standard error."""
    return Measure(
        path=f"packed.{name}",
        standard_error=f"packed.{name}_standard_error",
        original=f"original.{name}",
    )


#: Measures by their heading.
TOP1 = {"top-1 %": _with_error("top1")}


_LANGUAGE = {
    "accuracy %": _with_error("questions.average.acc"),
    "perplexity": Measure(path="packed.perplexity", original="original.perplexity", better="low"),
    "KL": Measure(path="packed.kl", better="low", digits=4),
}
_PICTURES = {
    "CLIP score": _with_error("clip_score"),
    "PSNR dB": Measure(path="packed.psnr"),
    "perceptual distance": Measure(path="packed.perceptual", better="low", digits=4),
}
_DIGITS = {"digits %": _with_error("digit_accuracy")}
_FOOTPRINT = {
    "weights %": Measure(path="results.footprint.weights_percent", better=None),
    "activations %": Measure(path="results.footprint.activations_percent", better=None),
    "reference MB": Measure(path="results.footprint.total_bytes", better=None, unit=1e6),
}


def _time(path: str, better: str | None = None) -> Measure:
    return Measure(path=f"results.latency.{path}", better=better)


_LATENCY = {
    "CPU ms": _time("cpu.batch_1.fp32.ms"),
    "GPU ms": _time("cuda.batch_1.fp16.ms"),
    "disk ms": _time("cpu.batch_1.disk_offload.ms"),
    "packed ms": _time("cpu.batch_1.packed.ms"),
    "disk / CPU": _time("cpu.batch_1.disk_offload.time_ratio"),
    "packed / CPU": _time("cpu.batch_1.packed.time_ratio"),
}
_THROUGHPUT = {
    "GPU / s": _time("cuda.best_batch.fp16.per_second"),
    "GPU, disk / s": _time("cuda.best_batch.disk_offload.per_second"),
    "CPU / s": _time("cpu.best_batch.fp32.per_second"),
    "CPU, disk / s": _time("cpu.best_batch.disk_offload.per_second"),
    "CPU, packed / s": _time("cpu.best_batch.packed.per_second"),
}
_PRECISION = {
    f"{name} top-1 %": Measure(
        path=f"results.precision.{dtype}.top1",
        standard_error=f"results.precision.{dtype}.top1_standard_error",
        better=None,
    )
    for name, dtype in {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.items()
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Layout of a table.

    Attributes:
        title: of the table, in a sentence.
        lines: keys of the sweep that name a line.
        columns: keys of the sweep that name a group of columns.
        measures: numbers by their heading.
        details: columns of the tidy table that stand beside the measures, by their heading.
        paper: file of the paper's numbers.
        full_scale: samples of the paper's evaluation; None for a table at reduced scale, whose
            numbers are not compared with the paper's. 0 where no samples are evaluated.
        command: arguments that the experiment needs beside its name.
    """

    title: str
    lines: tuple[str, ...]
    columns: tuple[str, ...]
    measures: dict[str, Measure]
    details: tuple[str, ...] = ()
    paper: str | None = None
    full_scale: int | None = None
    command: str = ""


_LISTS = "data.root=DIR data.list=FILE.tsv data.calibration_root=DIR data.calibration_list=FILE.tsv"
_IMAGENET = 50_000
_QUESTIONS = 20_465  # of the seven tasks
_PROMPTS = 1_000  # of DiffusionDB; the paper does not say how many it took


def _measured(title: str, measures: dict[str, Measure], **options) -> Table:
    return Table(title=title, lines=("model",), columns=(), measures=measures, **options)


def _accuracy(scale: str, *, title: str, **options) -> Table:
    columns = ("model", "alpha")
    return Table(title=f"{title}, {scale}", columns=columns, measures=TOP1, **options)


_table3 = partial(
    _accuracy,
    title="Table 3, clustering of the data-free initialisation",
    lines=("encoding", "init"),
    paper="table3",
)
_table4 = partial(_accuracy, title="Table 4, what is learned", lines=("learn",), paper="table4")
_table5 = partial(
    _accuracy,
    title="Table 5, compared methods",
    lines=("method",),
    details=("KL", "true alpha", "seconds", "peak GB"),
    paper="table5",
)
_table6b = partial(
    Table,
    lines=("method",),
    columns=("model", "alpha"),
    measures=_LANGUAGE,
    details=("true alpha", "seconds", "peak GB"),
    paper="table6b",
)
_table6a = partial(
    Table,
    lines=("method",),
    columns=("model", "alpha"),
    details=("true alpha", "seconds", "peak GB"),
    paper="table6a",
)


#: Tables by the name of their experiment.
TABLES: dict[str, Table] = {
    "table1": _measured(
        "Table 1, memory of a forward pass at 16 bits", _FOOTPRINT, paper="table1", full_scale=0
    ),
    "table1_digits": _measured("Table 1, memory of a forward pass, digits", _FOOTPRINT),
    "table2": _measured("Table 2, time for an image", _LATENCY, paper="table2", full_scale=0),
    "table2_language": _measured(
        "Table 2, time for a text of 128 tokens", _LATENCY, paper="table2_language", full_scale=0
    ),
    "table2_digits": _measured("Table 2, time for an image, digits", _LATENCY),
    "throughput": _measured(
        "Rebuttal, images per second", _THROUGHPUT, paper="throughput", full_scale=0
    ),
    "throughput_digits": _measured("Rebuttal, images per second, digits", _THROUGHPUT),
    "table7": _measured(
        "Table 7, 32 and 16 bits", _PRECISION, full_scale=_IMAGENET, command="data.root=DIR"
    ),
    "table7_digits": _measured("Table 7, 32 and 16 bits, digits", _PRECISION),
    "table3": _table3("ImageNet", full_scale=_IMAGENET, command="data.root=DIR"),
    "table3_digits": _table3("digits"),
    "table3_lite": _table3("EfficientNet-Lite0", command="data.root=DIR data.list=FILE.tsv"),
    "table4": _table4("ImageNet", full_scale=_IMAGENET, command="data.root=DIR"),
    "table4_digits": _table4("digits"),
    "table4_lite": _table4("EfficientNet-Lite0", command=_LISTS),
    "table5": _table5("ImageNet", full_scale=_IMAGENET, command="data.root=DIR"),
    "table5_digits": _table5("digits"),
    "table5_lite": _table5("labelled lists", command=_LISTS),
    "table6a": _table6a(
        title="Table 6a, Stable Diffusion", measures=_PICTURES, full_scale=_PROMPTS
    ),
    "table6a_tiny": _table6a(
        title="Table 6a, a small pipeline for digits", measures=_PICTURES | _DIGITS
    ),
    "table6b": _table6b(title="Table 6b, language models", full_scale=_QUESTIONS),
    "table6b_small": _table6b(title="Table 6b, SmolLM2-135M"),
}


def paper_numbers(table: Table) -> pd.DataFrame | None:
    """The paper's numbers: a column per key, as text, and one per measure.

    Returns:
        None for a table that the paper does not have.
    """
    if table.paper is None:
        return None
    keys = (*table.lines, *table.columns)
    return pd.read_csv(PAPER / f"{table.paper}.csv", dtype=dict.fromkeys(keys, str))

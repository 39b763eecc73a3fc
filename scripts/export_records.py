"""Write the records of finished runs as one CSV, a line per run.

python scripts/export_records.py results table.csv --where model.name=resnet18
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from experiments.records import load_records

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


def main() -> None:
    """Read records, keep those asked for, sort, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of results, usually results")
    parser.add_argument("output", type=Path, help="CSV to write")
    parser.add_argument(
        "--where",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this configuration",
    )
    arguments = parser.parse_args()
    frame = pd.json_normalize(list(load_records(arguments.results).values()))
    if frame.empty:
        sys.exit(f"error: no record below {arguments.results}: run something first")
    for condition in arguments.where:
        key, _, value = condition.partition("=")
        if f"config.{key}" not in frame:
            sys.exit(f"error: no record has the option {key}")
        frame = frame[frame[f"config.{key}"].astype(str) == value]
    if frame.empty:
        sys.exit(f"error: no record below {arguments.results} fits {' '.join(arguments.where)}")
    # Stages that a run left out have no options in its record.
    table = frame.reindex(columns=list(COLUMNS.values()))
    table = table.rename(columns={v: k for k, v in COLUMNS.items()})
    table["notes"] = table["notes"].map("; ".join)
    table = table.sort_values(["model", "method", "encoding", "alpha_goal", "init", "seed"])
    table.to_csv(arguments.output, index=False, float_format="%.6g")
    print(f"{len(table)} runs -> {arguments.output}")


if __name__ == "__main__":
    main()

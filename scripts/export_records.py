"""Write the records of finished runs as one CSV, a line per run.

python scripts/export_records.py results/runs table.csv --where model.name=resnet18
"""

import argparse
import sys
from pathlib import Path

from experiments.records import load_records
from experiments.tidy import flatten, select, tidy


def main() -> None:
    """Read records, keep those asked for, sort, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of runs, usually results/runs")
    parser.add_argument("output", type=Path, help="CSV to write")
    parser.add_argument(
        "--where",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this configuration",
    )
    arguments = parser.parse_args()
    records = load_records(arguments.runs)
    if not records:
        sys.exit(f"error: no record below {arguments.runs}: run something first")
    table = tidy(records).assign(config=[flatten(record["config"]) for record in records])
    try:
        table = select(table, arguments.where).drop(columns="config")
    except ValueError as error:
        sys.exit(f"error: {error}")
    table = table.sort_values(["model", "method", "encoding", "alpha_goal", "init", "seed"])
    table.to_csv(arguments.output, index=False, float_format="%.6g")
    print(f"{len(table)} runs -> {arguments.output}")


if __name__ == "__main__":
    main()

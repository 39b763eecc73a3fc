"""Write the records of finished runs as one CSV, a line per run.

python scripts/export_records.py results table.csv --where model.name=resnet18
"""

import argparse
import sys
from pathlib import Path

from experiments.runs import COLUMNS, read_runs, select


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
    runs = read_runs(arguments.results)
    if runs.empty:
        sys.exit(f"error: no record below {arguments.results}: run something first")
    try:
        table = select(runs, arguments.where)[list(COLUMNS)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    table = table.sort_values(["model", "method", "encoding", "alpha_goal", "init", "seed"])
    table.to_csv(arguments.output, index=False, float_format="%.6g")
    print(f"{len(table)} runs -> {arguments.output}")


if __name__ == "__main__":
    main()

"""Write tables and the report from the records of finished runs.

python scripts/make_tables.py
python scripts/make_tables.py table3_digits table5_digits
"""

import argparse
import sys
from pathlib import Path

from hydra.errors import HydraException

from experiments.overrides import one_line
from experiments.tables.make import make_tables
from experiments.tables.specs import TABLES


def main() -> None:
    """Make the tables that are asked for, or all that have records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME | KEY=VALUE",
        help=f"tables ({', '.join(TABLES)}; default: all that have records), "
        "and overrides that their runs were made with",
    )
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    names = [text for text in arguments.names if "=" not in text]
    overrides = [text for text in arguments.names if "=" in text]
    try:
        files = make_tables(arguments.results_dir, names or None, overrides)
    except (ValueError, HydraException) as error:
        sys.exit(one_line(error))
    print(*files, sep="\n")


if __name__ == "__main__":
    main()

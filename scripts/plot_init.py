"""Plot the distance to the original against bytes, for each clustering method.

python scripts/plot_init.py results/table3_digits.csv docs/images/init.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure


def plot_init(table: pd.DataFrame) -> Figure:
    """Draw one panel per encoding: KL divergence (log) against the size of the packed file."""
    encodings = sorted(table["encoding"].unique(), reverse=True)
    figure, panels = plt.subplots(
        1, len(encodings), figsize=(9, 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, encoding in zip(panels[0], encodings, strict=True):
        for init, runs in table[table["encoding"] == encoding].groupby("init"):
            runs = runs.sort_values("file_bytes")
            panel.plot(runs["file_bytes"] / 1e6, runs["kl"], marker="o", ms=4, label=init)
        panel.set_yscale("log")
        panel.set_xlabel("packed file, MB")
        panel.set_title(encoding.replace("_", "-"))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("KL(original || packed), nats")
    panels[0][-1].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Read the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="CSV of scripts/export_records.py")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    plot_init(pd.read_csv(arguments.table)).savefig(arguments.picture, dpi=130)


if __name__ == "__main__":
    main()

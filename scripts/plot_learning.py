"""Plot the training loss of each layer in the course of its learning.

python scripts/plot_learning.py results/runs/<run_id>/record.json curves.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def plot_learning(record: dict[str, Any]) -> Figure:
    """Draw one line per learned layer, coloured by its place in the network.

    Raises:
        ValueError: no layer of the record was learned.
    """
    layers = [result for result in record["learning"] if result.get("curve")]
    if not layers:
        raise ValueError("no layer of this run was learned: choose another learn=")
    figure, panel = plt.subplots(figsize=(7, 3.6), layout="constrained")
    colours = plt.get_cmap("viridis")
    for place, layer in enumerate(layers):
        steps = range(1, len(layer["curve"]) + 1)
        colour = colours(place / max(len(layers) - 1, 1))
        panel.plot(steps, layer["curve"], marker="." if len(steps) < 20 else None, color=colour)
    panel.set_yscale("log")
    panel.set_xlabel("round or iteration")
    panel.set_ylabel("squared error / energy of the target")
    scale = plt.cm.ScalarMappable(cmap=colours, norm=plt.Normalize(1, len(layers)))
    figure.colorbar(scale, ax=panel, label="layer, in forward order")
    return figure


def main() -> None:
    """Read the record, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="record.json of a run with learning")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    try:
        figure = plot_learning(json.loads(arguments.record.read_text()))
    except ValueError as error:
        parser.exit(1, f"{arguments.record}: {error}\n")
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=130)


if __name__ == "__main__":
    main()

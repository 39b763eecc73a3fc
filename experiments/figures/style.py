"""What all figures share: rcParams, sizes, and one colour and marker for each method."""

from pathlib import Path
from typing import NamedTuple

import matplotlib.style
from matplotlib.figure import Figure

from experiments.labels import LABELS
from jlcm.files import replacing

#: Widths of a column and of a page of a two-column paper, in inches.
COLUMN, PAGE = 3.4, 6.9
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "figure.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 4.5,
    "lines.markeredgewidth": 0.6,
    "errorbar.capsize": 2.0,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "savefig.dpi": 250,
    "pdf.fonttype": 42,  # TrueType
}
#: Decorator: draw in this style, whatever matplotlibrc says.
styled = matplotlib.style.context(["default", RC])


class Look(NamedTuple):
    """Name in a legend, colour and marker."""

    label: str
    colour: str
    marker: str


def _looks(styles: dict[str, tuple[str, str]]) -> dict[str, Look]:
    return {name: Look(LABELS.get(name, name), *style) for name, style in styles.items()}


# Colours of Okabe and Ito and of Tol's "muted" scheme, both made for colour blindness.
METHODS = _looks(
    {
        "jlcm": ("#D55E00", "*"),
        "jlcm_init": ("#E69F00", "o"),
        "jlcm_rex": ("#56B4E9", "P"),
        "rtn": ("#777777", "x"),
        "dfq": ("#44AA99", "s"),
        "squant": ("#117733", "^"),
        "powerquant": ("#999933", "v"),
        "redpp": ("#DDCC77", "D"),
        "rex": ("#AA4499", "P"),
        "adaround": ("#0072B2", "s"),
        "brecq": ("#332288", "D"),
        "nupes": ("#88CCEE", "v"),
        "lnq": ("#CC6677", "^"),
        "dkm": ("#882255", "X"),
        "optq": ("#661100", "P"),
        "awq": ("#6699CC", "X"),
        "squeezellm": ("#009E73", "*"),
        "llm_int8": ("#000000", "x"),
    }
)
INITS = _looks(
    {
        "random": ("#777777", "x"),
        "kmeans": ("#0072B2", "s"),
        "bisecting": ("#009E73", "^"),
        "spectral": ("#CC79A7", "D"),
        "hierarchical": ("#E69F00", "o"),
    }
)


def look(method: str) -> Look:
    """The look of a method; one that has none yet is grey with its initial."""
    return METHODS.get(method) or Look(method, "#777777", f"${method[:1]}$")


def title(panel: str) -> str:
    """Title of a panel: the network's usual name, and the data below it."""
    network, _, rest = panel.partition(", ")
    return f"{LABELS.get(network, network)}\n{rest}" if rest else LABELS.get(network, network)


@styled
def save(figure: Figure, path: Path, formats: tuple[str, ...] = ("pdf", "png")) -> list[Path]:
    """Write a figure as `path` with each suffix, atomically; the same figure gives the same bytes.

    Raises:
        OSError: if a file cannot be written.
    """
    dates = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    written = []
    for suffix in formats:
        written.append(path.with_name(f"{path.name}.{suffix}"))
        with replacing(written[-1]) as temporary:
            metadata = dates.get(suffix, {"Software": None})
            figure.savefig(temporary, format=suffix, metadata=metadata)
    return written

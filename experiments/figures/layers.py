"""Figures of the layers of one run, and of the mapping gradient (Figure 1 of the paper)."""

from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from experiments.figures.style import COLUMN, METHODS, PAGE, styled
from jlcm.clustering.scalar import cluster
from jlcm.expanded import ExpandedWeight
from jlcm.learning.proximal import AssignCodewords, codebook_gap
from jlcm.packed import PackedWeight, StoredWeight, group_sizes

#: Rules of Figure 1: title, kind of learning, sign, distance.
_RULES = (
    ("chain rule (Eq. 7)", "joint", "corrected", "relative"),
    ("proximal (Eq. 8), as printed", "proximal", "printed", "relative"),
    ("proximal, corrected sign", "proximal", "corrected", "relative"),
)
_CODEWORDS = 8
_BINS = 121
_BEFORE, _AFTER = METHODS["jlcm_init"], METHODS["jlcm"]


@styled
def plot_layers(record: dict[str, Any], title: str = "") -> Figure:
    """Draw the error and the bytes of each layer of a run, in the order of the network.

    Errors are those of the weights where the record has them, and those of the outputs on held-out
    inputs before and after learning where layers were learned.

    Args:
        record: of the run.
        title: above the figure.

    Raises:
        ValueError: no layer has an error.
    """
    layers = record["layers"]
    place = {layer["name"]: index for index, layer in enumerate(layers)}
    weights = [(place[x["name"]], x["relative_error"]) for x in layers if x["relative_error"]]
    outputs = [x for x in record["learning"] if x.get("kept") and x["name"] in place]
    outputs = [x for x in outputs if x["before"] is not None]
    if not weights and not outputs:
        raise ValueError("no layer of the run has an error")
    rows = bool(weights) + bool(outputs) + 1
    named = len(layers) <= 25
    figure = Figure((PAGE, 0.5 + 1.35 * rows + 0.8 * named), layout="constrained")
    *errors, sizes = figure.subplots(rows, 1, sharex=True)
    errors[0].set_title(title)
    if weights:
        panel = errors[0]
        panel.plot(*zip(*weights, strict=True), "o-", color="#0072B2", markersize=3)
        panel.set_ylim(0, 1.1 * max(error for _, error in weights))
        panel.set_ylabel("error of the weight\n$\\|\\hat{W}-W\\|\\,/\\,\\|W\\|$")
    if outputs:
        panel, at = errors[-1], [place[layer["name"]] for layer in outputs]
        for key, style in (("before", _BEFORE), ("after", _AFTER)):
            panel.plot(
                at, [x[key] for x in outputs], color=style.colour, marker="o", markersize=3,
                label=f"{key} learning",
            )  # fmt: skip
        panel.set_yscale("log")
        panel.set_ylabel("error of the output\nMSE / variance")
        panel.legend(ncols=2)
    for label, values, colour, marker in (
        ("original, fp16", [2 * torch.Size(x["shape"]).numel() for x in layers], "0.5", "s"),
        ("packed", [layer["nbytes"] for layer in layers], "#0072B2", "o"),
    ):
        sizes.plot(values, color=colour, marker=marker, markersize=3, label=label)
    sizes.set_yscale("log")
    sizes.set_ylabel("bytes")
    sizes.legend(ncols=2)
    sizes.margins(x=0.01)
    if named:
        names = [layer["name"].removesuffix(".weight") for layer in layers]
        sizes.set_xticks(range(len(layers)), names, rotation=90)
    else:
        sizes.xaxis.set_major_locator(MaxNLocator(integer=True))
        sizes.set_xlabel("layer, in the order of the network")
    return figure


@styled
def plot_learning(record: dict[str, Any], title: str = "") -> Figure:
    """Draw the training loss of each layer in the course of its learning.

    Args:
        record: of the run.
        title: above the figure.

    Raises:
        ValueError: no layer of the record was learned.
    """
    layers = [result for result in record["learning"] if result.get("curve")]
    if not layers:
        raise ValueError("no layer of this run was learned: choose another learn=")
    figure = Figure((COLUMN, 2.7), layout="constrained")
    panel = figure.subplots()
    colours = matplotlib.colormaps["viridis"]
    for place, layer in enumerate(layers):
        steps = range(1, len(layer["curve"]) + 1)
        panel.plot(
            steps,
            layer["curve"],
            marker="o" if len(steps) < 20 else None,
            markersize=2.5,
            linewidth=0.8,
            color=colours(place / max(len(layers) - 1, 1)),
        )
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panel.set_xlabel("round or iteration")
    panel.set_ylabel("squared error / energy of the target")
    panel.set_title(title)
    scale = ScalarMappable(cmap=colours, norm=Normalize(1, max(len(layers), 2)))
    bar = figure.colorbar(scale, ax=panel, label="layer, in forward order")
    bar.locator = MaxNLocator(integer=True)
    bar.outline.set_visible(False)
    return figure


@styled
def plot_histogram(before: StoredWeight, after: StoredWeight, name: str, title: str = "") -> Figure:
    """Draw the histogram of a layer's weights with its codewords, before and after learning.

    Args:
        before: the layer in a run without learning.
        after: the same layer in a run with learning.
        name: of the layer.
        title: above the figure.

    Raises:
        ValueError: one of them has no codebook.
    """
    figure = Figure((COLUMN, 3.2), layout="constrained")
    for panel, weight, style, when in zip(
        figure.subplots(2, 1), (before, after), (_BEFORE, _AFTER), ("before", "after"), strict=True
    ):
        packed = with_codebooks(weight)
        if packed is None:
            raise ValueError(f"{name} has no codebook")
        values, codewords = in_scale_units(packed), packed.codebooks.float().flatten().numpy()
        low, high = min(values.min(), codewords.min()), max(values.max(), codewords.max())
        half = (high - low) / (2 * (_BINS - 1)) or 0.5  # the ends are centres of bins
        bins = np.linspace(low - half, high + half, _BINS + 1)
        share = np.full(len(values), 1 / len(values))
        panel.hist(values, bins=bins, weights=share, color=style.colour)
        few = len(codewords) <= 64  # more are a rug at the top
        lines = LineCollection(
            [[(codeword, 0 if few else 0.92), (codeword, 1)] for codeword in codewords],
            transform=panel.get_xaxis_transform(),
            colors="black",
            linewidths=0.5 if few else 0.2,
        )
        panel.add_collection(lines, autolim=False)
        panel.margins(y=0.2)
        panel.grid(False)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        panel.set_ylabel("weights")
        panel.set_title(f"{when} learning: {_layout(packed)}", loc="left")
        unit = "" if packed.scales is None else ", in units of the median scale"
        panel.set_xlabel(f"weight{unit}")
    figure.suptitle(f"{title}\n{name}".strip())
    return figure


@styled
def plot_reorder(weight: StoredWeight, name: str, title: str = "") -> Figure:
    """Draw the magnitudes of a layer's weights in the original and the stored order of its rows.

    Args:
        weight: the layer, with a stored order.
        name: of the layer.
        title: above the figure.

    Raises:
        ValueError: no order is stored.
    """
    packed = with_codebooks(weight)
    order = None if packed is None else packed.row_order()
    if order is None:
        raise ValueError(f"no order of rows is stored with {name}")
    original = packed().detach().float().reshape(packed.rows, -1).abs().numpy()
    figure = Figure((PAGE, 2.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    limit = float(np.quantile(original, 0.995))
    for panel, rows, heading in (
        (panels[0], original, "original order"),
        (panels[1], original[order.numpy()], "re-ordered"),
    ):
        image = panel.imshow(
            rows,
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=limit,
            extent=(0, rows.shape[1], rows.shape[0], 0),
        )
        panel.grid(False)
        panel.set_title(heading)
        panel.set_xlabel("weight of the neuron")
    boundaries = group_boundaries(packed)
    width = min(0.7, 20 / max(len(boundaries), 1))  # many groups would hide the weights
    lines = LineCollection(boundaries, colors="white", linewidths=width)
    panels[1].add_collection(lines, autolim=False)
    panels[0].set_ylabel("neuron")
    bar = figure.colorbar(image, ax=panels, label="magnitude", extend="max")
    bar.outline.set_visible(False)
    figure.suptitle(f"{title}\n{name}, {_layout(packed)}".strip())
    return figure


@styled
def plot_mapping_gradient() -> Figure:
    """Draw what a logit's gradient is multiplied by, against the distance of its codeword.

    Figure 1 of the paper, measured on the implementation.
    """
    figure = Figure((PAGE, 2.2), layout="constrained")
    panels = figure.subplots(1, len(_RULES), sharey=True)
    for panel, (rule, kind, sign, distance) in zip(panels, _RULES, strict=True):
        gaps, pull = mapping_weights(kind, sign, distance)
        panel.axhline(0, color="0.6", linewidth=0.6, zorder=0.9)
        panel.axvline(0, color="0.6", linewidth=0.6, zorder=0.9)
        panel.scatter(gaps.flatten(), pull.flatten(), s=8, color="#0072B2", linewidths=0)
        panel.set_title(rule)
    panels[1].set_xlabel("distance of the codeword from the present one (mean gaps)")
    panels[0].set_ylabel("change of its logit\n(share of the largest)")
    return figure


def with_codebooks(weight: StoredWeight | None) -> PackedWeight | None:
    """The part of a stored weight that has codebooks, None if there is none."""
    held = weight.base if isinstance(weight, ExpandedWeight) else weight
    return held if isinstance(held, PackedWeight) else None


def in_scale_units(packed: PackedWeight) -> np.ndarray:
    """(N,) decoded weights over their median scale, so that a codeword stands for itself."""
    values, scales = packed.codeword_per_weight(), packed.scale_per_weight()
    return (values if scales is None else values * scales / scales.abs().median()).numpy()


def group_boundaries(packed: PackedWeight) -> list[list[tuple[float, float]]]:
    """Where flat groups meet in the matrix of the re-ordered rows: a stepped line each.

    Points are (column, row). Groups are those of the codebooks, or of the scales where there is one
    codebook; tiles have none.
    """
    columns = packed.count // packed.rows
    groups = max(packed.groups()) if packed.tile is None else 1
    lines = []
    for start in group_sizes(packed.count, groups).cumsum(0)[:-1].tolist():
        row, column = divmod(start, columns)
        step = [(column, row + 1), (column, row)] if column else [(0, row)]
        lines.append([*([(0, row + 1)] if column else []), *step, (columns, row)])
    return lines


def mapping_weights(kind: str, sign: str, distance: str) -> tuple[Tensor, Tensor]:
    """Pull towards each codeword for weights whose loss asks for a larger value.

    Every weight is a normal value in a k-means codebook, at the logits of an even softmax but for
    its own codeword.

    Returns:
        (weights, codewords) signed distance to the weight's codeword in mean gaps, and the change
        that descent makes to each logit for a unit gradient, as share of the row's largest.
    """
    values = torch.linspace(-2.2, 2.2, 45)
    sample = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    codebooks, _ = cluster(sample, k=_CODEWORDS, method="kmeans")
    chosen = (values[:, None] - codebooks).abs().argmin(1)
    logits = torch.nn.functional.one_hot(chosen, _CODEWORDS).float().requires_grad_()
    result, _ = AssignCodewords.apply(logits, codebooks, None, kind, "hard", sign, distance)
    result.backward(-torch.ones_like(result))
    gaps = (codebooks - codebooks[0, chosen, None]) / codebook_gap(codebooks)
    pull = -logits.grad
    return gaps, pull / pull.abs().amax(1, keepdim=True).clamp(min=1e-30)


def _layout(packed: PackedWeight) -> str:
    codebooks, scales = packed.groups()
    parts = [f"{packed.bits} bits", f"{codebooks} codebook" + "s" * (codebooks != 1)]
    if scales:
        parts.append(f"{scales} scale" + "s" * (scales != 1))
    return ", ".join(parts)

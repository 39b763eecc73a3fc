"""Plot what a logit's gradient is multiplied by, against the distance of its codeword (Figure 1).

python scripts/plot_mapping_gradient.py docs/images/mapping_gradient.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from jlcm.clustering.scalar import cluster
from jlcm.learning.proximal import AssignCodewords, codebook_gap

CODEWORDS = 8
#: Panels: title, kind of learning, sign, distance.
RULES = (
    ("chain rule (Eq. 7)", "joint", "corrected", "relative"),
    ("proximal (Eq. 8), as printed", "proximal", "printed", "relative"),
    ("proximal, corrected sign", "proximal", "corrected", "relative"),
)


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
    codebooks, _ = cluster(sample, k=CODEWORDS, method="kmeans")
    chosen = (values[:, None] - codebooks).abs().argmin(1)
    logits = torch.nn.functional.one_hot(chosen, CODEWORDS).float().requires_grad_()
    result, _ = AssignCodewords.apply(logits, codebooks, None, kind, "hard", sign, distance)
    result.backward(-torch.ones_like(result))
    gaps = (codebooks - codebooks[0, chosen, None]) / codebook_gap(codebooks)
    pull = -logits.grad
    return gaps, pull / pull.abs().amax(1, keepdim=True).clamp(min=1e-30)


def plot() -> Figure:
    """Draw one panel per rule."""
    figure, panels = plt.subplots(1, len(RULES), figsize=(10, 3.2), sharey=True)
    for panel, (title, kind, sign, distance) in zip(panels, RULES, strict=True):
        gaps, pull = mapping_weights(kind, sign, distance)
        panel.axhline(0, color="0.7", lw=0.8)
        panel.axvline(0, color="0.7", lw=0.8)
        panel.scatter(gaps.flatten(), pull.flatten(), s=9, alpha=0.5)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("codeword, mean gaps from the present one")
    panels[0].set_ylabel("change of its logit (share of the largest)")
    figure.suptitle("The loss asks for a larger weight", fontsize=10)
    figure.tight_layout()
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    plot().savefig(arguments.picture, dpi=130)


if __name__ == "__main__":
    main()

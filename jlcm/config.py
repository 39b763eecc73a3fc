"""Options of the library, checked when they are made."""

from dataclasses import dataclass

from jlcm.clustering.scalar import METHODS

ENCODINGS = ("multi_scale", "multi_codebook", "per_row", "tiles", "trellis", "auto")
BUDGETS = ("pooled", "per_layer")
REORDERINGS = ("auto", "propagated", "stored", "none")
FEATURES = ("weights", "quantiles")
FIRST_LAST = ("same", "int8")
ALLOCATIONS = ("uniform", "auto")
ROTATIONS = ("hadamard",)


class Invalid(ValueError):
    """An option has a value that it cannot have."""


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `Invalid`, listing the choices, unless `value` is one of them."""
    if value not in choices:
        raise Invalid(f"{option}={value!r} is not one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class Init:
    """How weights and neurons are clustered.

    Attributes:
        method: "random", "kmeans", "bisecting", "spectral" or "hierarchical" (Table 3).
        features: what neurons are compared by: "weights", or "quantiles" of their weights.
    """

    method: str = "hierarchical"
    features: str = "weights"

    def __post_init__(self) -> None:
        """Check the choices."""
        check_choice("init", self.method, METHODS)
        check_choice("features", self.features, FEATURES)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Which codebooks and scales a tensor gets.

    Attributes:
        kind: "multi_scale" (one codebook and many scales, Eq. 1), "multi_codebook" (many codebooks,
            Eq. 2), "per_row" (a codebook per output neuron), "tiles" (a codebook per tile),
            "trellis" (as multi_scale, and a weight's codeword depends on the codes before it too,
            `jlcm.trellis`; small tensors and rows of fewer than 16 values go without), or "auto"
            (per tensor, multi_scale or multi_codebook, whichever has the smaller weighted error at
            equal bytes).
        tile: (rows, columns) of a tile, with "tiles" alone.
        budget: "pooled" (Eq. 3's bytes are shared over the model) or "per_layer" (Eq. 3 as
            printed).
        fold_bn: fold batch norms into the layers before them, first.
        first_last: "same" (compressed like all others) or "int8" (the first and the last weight on
            a uniform grid of 8 bits, one scale per row).
        refit_scales: least-squares scales in place of the largest magnitude of the group.
    """

    kind: str = "multi_scale"
    tile: tuple[int, int] = (8, 64)
    budget: str = "pooled"
    fold_bn: bool = False
    first_last: str = "same"
    refit_scales: bool = False

    def __post_init__(self) -> None:
        """Check the choices."""
        check_choice("encoding", self.kind, ENCODINGS)
        check_choice("budget", self.budget, BUDGETS)
        check_choice("first_last", self.first_last, FIRST_LAST)
        if len(self.tile) != 2 or not all(isinstance(s, int) and s >= 1 for s in self.tile):
            raise Invalid(f"tile={self.tile} is not two positive sizes")


def check_alpha(alpha: float) -> float:
    """Check a compression goal: 1 < alpha <= 16 (a code has at least one of 16 bits)."""
    if not 1 < alpha <= 16:
        raise Invalid(
            f"alpha={alpha} must be above 1 and at most 16 (fp16 bytes over packed bytes)"
        )
    return float(alpha)

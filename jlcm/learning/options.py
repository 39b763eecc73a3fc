"""Options of layer-wise learning, checked when they are made."""

from dataclasses import dataclass

from jlcm.config import Invalid, check_choice
from jlcm.learning.forward import PRECISIONS

KINDS = ("none", "codebook", "joint", "proximal", "lnq")
SIGNS = ("corrected", "printed")
DISTANCES = ("relative", "raw", "rank")
FORWARDS = ("hard", "soft")
SECOND_MOMENTS = ("shared", "per_element")
STATISTICS = ("none", "mean", "moments", "regression")
STARTS = ("packed", "least_squares")
WEIGHTINGS = ("auto", "even", "fisher")


@dataclass(frozen=True, kw_only=True)
class Learn:
    """How the packed weights of a network are learned from calibration inputs.

    Attributes:
        kind: "none" (statistics only), "codebook" (Eq. 7, first row), "joint" (Eq. 7), "proximal"
            (Eq. 8 and 9), or "lnq" (no gradients: least-squares codebooks and coordinate descent
            over the codes, after LNQ of GuidedQuant, Kim et al. 2025).
        start: what the learning starts from: the "packed" codes, or those that lnq finds
            ("least_squares").
        weighting: what the error at a position (token, pixel) counts: all alike ("even"), or by the
            squared gradient of the network's log-likelihood there ("fisher", after GuidedQuant, Kim
            et al. 2025). "auto" is fisher for decoder networks: on SmolLM2-135M with 3 bits it
            lowered the divergence by 14 %, on EfficientNet-Lite0 with 2 bits it raised it. The
            sampled objective of `activation` counts all alike.
        row_scale: fit a scale for each row that a following batch norm absorbs (its scale is stored
            anyway, so it costs no bytes). Codes are then clustered anew; lnq or start=least_squares
            only.
        statistics: what is re-estimated in the norm or bias that follows a layer: "none"; the
            "mean"; mean and variance ("moments"); or the least-squares scale and shift
            ("regression").
        activation: include the activation that directly follows in the objective (Eq. 5). The
            objective is then sampled; otherwise it is a quadratic form of Gram matrices and exact.
            Gradient kinds only.
        damping: ridges of the solver towards the original weight, relative to the mean diagonal of
            the Gram matrix (GPTQ's is 0.01). They are tried in rising order as long as the held-out
            inputs are served better.
        correction: part of the earlier layers' error that a layer's target makes up for: 1 aims at
            the reference's output (Eq. 5), 0 at what the reference's weight makes of the inputs
            given; None lets the held-out inputs choose, up to a half. lnq or start=least_squares
            only.
        rounds: outer rounds of lnq, each codes then codebooks, scales and row scales. None is two,
            and one with trellises, which leave next to nothing to a second.
        sweeps: coordinate-descent sweeps over all codes in a round.
        polish: sweeps after the gradient kinds.
        sign: "corrected" (towards the wanted codeword) or "printed" (Eq. 8 as printed, which
            ascends).
        distance: unit of |C_a - C_j| in Eq. 8: the mean gap of the codebook ("relative"), "raw", or
            the number of codewords between them ("rank").
        forward: "hard" (the codeword of the largest logit) or "soft" (the mixture, Eq. 5 as
            printed).
        second_moment: Adam's second moment "per_element", or "shared" by the logits of a weight.
        keep_best: return the state with the least hard loss, not the last one.
        final_least_squares: least-squares codebooks and scales after the gradient kinds.
        iterations: gradient steps per layer.
        batch_size: sampled positions (pixels, tokens) per step when activation is on.
        lr: step size of the logits (their unit: see `kappa` in `proximal`).
        lr_codebook: step size of codebooks, in mean gaps.
        lambda_: weight of L2 (Eq. 6).
        fidelity: weight of L1 (Eq. 6), both terms normalised.
        warmup: part of the iterations without L2.
        beta: exponent of L2 at the end of the warm-up and at the last iteration (AdaRound's).
        patience: stop early after this many iterations without a better held-out loss.
        flip: learn from mirror images too, if the inputs are images.
        held_out: part of the calibration inputs that decides whether a layer is accepted.
        positions: pixels or tokens sampled for each input of a neuron, over all calibration inputs
            and the same in both networks; at least 32,768 together.
        forward_batch: calibration inputs that run at once.
        memory: bytes of activations kept in memory; the rest is computed again or lies on disk.
        precision: in which decoder networks in float32 run on the calibration inputs: "bf16"
            (autocast), "fp32", or "auto" (bf16 where the processor has it).
    """

    kind: str = "lnq"
    start: str = "packed"
    weighting: str = "auto"
    row_scale: bool = True
    statistics: str = "moments"
    activation: bool = False
    damping: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    correction: float | None = None
    rounds: int | None = None
    sweeps: int = 2
    polish: int = 3
    sign: str = "corrected"
    distance: str = "relative"
    forward: str = "hard"
    second_moment: str = "shared"
    keep_best: bool = True
    final_least_squares: bool = True
    iterations: int = 300
    batch_size: int = 1024
    lr: float = 0.02
    lr_codebook: float = 0.002
    lambda_: float = 0.01
    fidelity: float = 0.01
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    patience: int = 100
    flip: bool = False
    held_out: float = 0.1
    positions: int = 32
    forward_batch: int = 32
    memory: int = 3 * 2**29
    precision: str = "auto"

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("learn", self.kind, KINDS)
        check_choice("start", self.start, STARTS)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("statistics", self.statistics, STATISTICS)
        check_choice("sign", self.sign, SIGNS)
        check_choice("distance", self.distance, DISTANCES)
        check_choice("forward", self.forward, FORWARDS)
        check_choice("second_moment", self.second_moment, SECOND_MOMENTS)
        for name in ("sweeps", "polish", "lr", "lr_codebook", "lambda_", "fidelity", "memory"):
            if not getattr(self, name) >= 0:
                raise Invalid(f"{name}={getattr(self, name)} must not be negative")
        for name in ("iterations", "batch_size", "patience", "positions", "forward_batch"):
            if not getattr(self, name) >= 1:
                raise Invalid(f"{name}={getattr(self, name)} must be at least 1")
        if self.flip and self.weighting == "fisher":
            raise Invalid("weighting=fisher knows no mirror images: leave out flip")
        if not self.damping or min(self.damping) < 0:
            raise Invalid(f"damping={self.damping} must be one or more ridges, none negative")
        if self.rounds is not None and not self.rounds >= 0:
            raise Invalid(f"rounds={self.rounds} must not be negative")
        if self.correction is not None and not 0 <= self.correction <= 1:
            raise Invalid(f"correction={self.correction} must lie between 0 and 1, or be None")
        if not 0 < self.held_out <= 0.5:
            raise Invalid(f"held_out={self.held_out} must lie between 0 and 0.5")
        if not 0 <= self.warmup < 1:
            raise Invalid(f"warmup={self.warmup} must be at least 0 and below 1")
        if len(self.beta) != 2 or min(self.beta) <= 0:
            raise Invalid(f"beta={self.beta} must be two positive exponents")

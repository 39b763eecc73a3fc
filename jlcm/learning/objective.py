"""The layer-wise objective ||W~ X~ - Y||^2 as a quadratic form of Gram matrices.

X~ are inputs of the compressed network, Y = W X outputs of the reference. With X~X~^T and Y X~^T
accumulated once, evaluating the objective or its gradient costs no image or token dimension.
Tensors carry a leading dimension for the groups of a convolution (1 for a linear layer, the
channels for a depthwise convolution): inputs (groups, n, positions), outputs (groups, rows,
positions), weights (groups, rows, n).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jlcm.learning.forward import computes_bf16
from jlcm.rotation import rotate

#: Elements of the inputs that wait to be summed up together: 64 MiB.
MOST_WAITING = 2**24


@dataclass
class Moments:
    """Sums over sampled positions, float64, each times what the position counts.

    Attributes:
        gram: (groups, n, n) of X~X~^T.
        cross: (groups, rows, n) of Y X~^T.
        energy: (groups, rows) of Y^2.
        inputs: (groups, n) of X~.
        outputs: (groups, rows) of Y.
        count: number of positions, each likewise.
        waiting: inputs, outputs and weights that are not in the sums yet.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    inputs: Tensor
    outputs: Tensor
    count: float = 0.0
    waiting: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    @classmethod
    def zeros(cls, groups: int, rows: int, n: int, device: torch.device) -> "Moments":
        """Empty sums."""
        shapes = (groups, n, n), (groups, rows, n), (groups, rows), (groups, n), (groups, rows)
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs (groups, n, positions) and outputs (groups, rows, positions).

        Weights (positions,) are given with all that is added, or with nothing.
        """
        self.waiting.append((x, y, weights))
        if sum(x.numel() for x, *_ in self.waiting) >= MOST_WAITING:
            self.settle()

    def settle(self) -> None:
        """Sum up what waits; one product of many positions is faster than many of few."""
        if not self.waiting:
            return
        inputs, outputs, weights = zip(*self.waiting, strict=True)
        self.waiting.clear()
        x, y = torch.cat(inputs, -1), torch.cat(outputs, -1)
        if weights[0] is None:
            own_x, own_y, count = x, y, x.shape[-1]
        else:
            each = torch.cat(weights)
            own_x, own_y, count = x * each, y * each, each.double().sum().item()
        self.gram += own_x @ x.mT
        self.cross += own_y @ x.mT
        self.energy += (own_y * y).sum(-1)
        self.inputs += own_x.sum(-1)
        self.outputs += own_y.sum(-1)
        self.count += count

    def rotated(self) -> "Moments":
        """The sums of rotated inputs."""
        self.settle()
        gram = rotate(rotate(self.gram).mT)
        return replace(self, gram=gram, cross=rotate(self.cross), inputs=rotate(self.inputs))

    def check(self) -> None:
        """Settle, and refuse sums that no weight can be fitted to.

        Raises:
            ValueError: if no positions were added, or activations are NaN or infinite.
        """
        self.settle()
        if self.count == 0:
            raise ValueError(
                "no calibration inputs on one side of the held-out split: give more of them"
            )
        # One such value makes the energy of its input, or of its output, not finite.
        energies = self.gram.diagonal(dim1=-2, dim2=-1), self.energy
        if not all(bool(energy.isfinite().all()) for energy in energies):
            raise ValueError("activations are NaN or infinite on the calibration inputs")


@dataclass(frozen=True)
class Quadratic:
    """loss(W~) = sum over rows r of weights_r (w gram w^T - 2 w cross_r^T + energy_r), float32.

    Attributes:
        gram: (groups, n, n) mean of X~X~^T, centred if a bias or shift takes up the mean.
        cross: (groups, rows, n) mean of Y X~^T, centred likewise.
        energy: (groups, rows) mean of Y^2, centred likewise.
        inputs: (groups, n) mean input.
        outputs: (groups, rows) mean target.
        weights: (groups, rows) importance of each row, non-negative.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    inputs: Tensor
    outputs: Tensor
    weights: Tensor

    def row_losses(self, weight: Tensor) -> Tensor:
        """(groups, rows) mean squared error of each row of a weight (groups, rows, n)."""
        product = weight @ self.gram
        return ((product - 2 * self.cross) * weight).sum(-1) + self.energy

    def loss(self, weight: Tensor) -> Tensor:
        """Scalar: weighted squared error over the weighted energy of the target."""
        total = (self.weights * self.row_losses(weight)).sum()
        return total / self.total_energy()

    def total_energy(self) -> Tensor:
        """Scalar: weighted energy of the target, never 0."""
        return (self.weights * self.energy).sum().clamp(min=1e-30)

    def gradient(self, weight: Tensor) -> Tensor:
        """(groups, rows, n) gradient of `loss`."""
        scale = 2 * self.weights / self.total_energy()
        return scale[..., None] * (weight @ self.gram - self.cross)

    def corrected(self, original: Tensor, part: float) -> "Quadratic":
        """Aim at part * Y + (1 - part) * W X~ in place of Y.

        The difference of Y = W X from W X~ is what earlier layers have done wrong. A layer can make
        up for it (GPTAQ, Li et al., 2025), but all of it only on the inputs that it is fitted to.
        """
        own = original @ self.gram
        cross = part * self.cross + (1 - part) * own
        # Of p Y + q W X~ with q = 1 - p: p^2 Y^2 + q W X~ (p Y + (p Y + q W X~)).
        energy = part**2 * self.energy
        energy = energy + (1 - part) * (original * (part * self.cross + cross)).sum(-1)
        return replace(self, cross=cross, energy=energy)

    def damped(self, original: Tensor, damping: float) -> "Quadratic":
        """Add a ridge towards the original weight: damping * mean diagonal * ||W~ - W||^2.

        This is L1 of Eq. 6 inside the quadratic form; it also makes the Gram matrix invertible.
        """
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1)
        # A group whose inputs are all zero (a dead channel) keeps to its original weight.
        ridge = (damping * diagonal.mean(-1)).clamp(min=1e-6 * float(diagonal.mean()) + 1e-12)
        gram = self.gram + torch.diag_embed(ridge[:, None].expand_as(diagonal))
        cross = self.cross + ridge[:, None, None] * original
        energy = self.energy + ridge[:, None] * original.square().sum(-1)
        return replace(self, gram=gram, cross=cross, energy=energy)

    def line_minimum(self, start: Tensor, end: Tensor) -> float:
        """Part of the way from one weight to another, from 0 to 1, where the loss is least."""
        way = end - start
        slope = (self.weights * ((start @ self.gram - self.cross) * way).sum(-1)).sum()
        bend = (self.weights * ((way @ self.gram) * way).sum(-1)).sum()
        return min(max(float(-slope / bend), 0.0), 1.0) if bend > 0 else 1.0

    def minimiser(self) -> Tensor:
        """(groups, rows, n) least-squares weight; the Gram matrix must be invertible."""
        factor, failed = torch.linalg.cholesky_ex(self.gram)
        if bool(failed.any()):  # too ill-conditioned for float32
            factor, failed = torch.linalg.cholesky_ex(self.gram.double())
        if bool(failed.any()):
            raise torch.linalg.LinAlgError("the Gram matrix is singular: raise learn.damping")
        cross, gram = self.cross.to(factor.dtype), self.gram.to(factor.dtype)
        weight = torch.cholesky_solve(cross.mT, factor).mT
        # Once more for what rounding left over.
        weight = weight + torch.cholesky_solve((cross - weight @ gram).mT, factor).mT
        return weight.float()


class Deviation:
    """Loss and gradient of a `Quadratic` by a weight's difference from another weight.

    One product with the Gram matrix serves both. As the difference is small beside the weight, the
    product may be rounded to bf16 where the device computes faster in it.
    """

    def __init__(self, problem: Quadratic, origin: Tensor) -> None:
        """Take the objective, and the (groups, rows, n) weight that others are compared with."""
        self.origin = origin
        self.dtype = torch.bfloat16 if computes_bf16(origin.device) else torch.float32
        self.gram = problem.gram.to(self.dtype)
        self.slope = origin @ problem.gram - problem.cross
        self.constant = problem.loss(origin)
        self.scale = (problem.weights / problem.total_energy())[..., None]

    def loss_and_gradient(self, weight: Tensor) -> tuple[float, Tensor]:
        """`Quadratic.loss` and `Quadratic.gradient` of a weight (groups, rows, n)."""
        difference = weight - self.origin
        product = (difference.to(self.dtype) @ self.gram).float()
        loss = self.constant + (self.scale * difference * (product + 2 * self.slope)).sum()
        return float(loss), 2 * self.scale * (product + self.slope)


def quadratic(
    moments: Moments,
    *,
    centred: bool,
    offset: Tensor | None = None,
    weights: Tensor | None = None,
) -> Quadratic:
    """Make the objective from sums.

    Args:
        moments: of at least one position.
        centred: take the means out, because a bias or shift that is set afterwards takes them up.
        offset: (groups, rows) part of Y that a bias makes, which stays as it is; None for none.
        weights: (groups, rows) importance of the rows; None for equal.

    Raises:
        ValueError: as `Moments.check`.
    """
    moments.check()
    gram, cross = moments.gram / moments.count, moments.cross / moments.count
    energy = moments.energy / moments.count
    inputs, outputs = moments.inputs / moments.count, moments.outputs / moments.count
    if offset is not None:
        cross = cross - offset[:, :, None] * inputs[:, None]
        energy = (energy - 2 * offset * outputs + offset.square()).clamp(min=0)
        outputs = outputs - offset
    if centred:
        gram = gram - inputs[:, :, None] * inputs[:, None]
        cross = cross - outputs[:, :, None] * inputs[:, None]
        energy = (energy - outputs.square()).clamp(min=0)
    weights = torch.ones_like(energy) if weights is None else weights
    return Quadratic(
        *(t.float() for t in (gram, cross, energy, inputs, outputs, weights.to(energy)))
    )


def inverse_factor(gram: Tensor) -> Tensor:
    """(groups, n, n) upper triangular U with U^T U the inverse of the Gram matrix, float32.

    It is the inverse of the Cholesky factor of the matrix with both axes reversed: cheaper than to
    invert the matrix and to factor the inverse.
    """
    reverse = gram.flip(1, 2)
    factor, failed = torch.linalg.cholesky_ex(reverse)
    if bool(failed.any()):  # too ill-conditioned for float32
        factor = torch.linalg.cholesky(reverse.double())
    unit = torch.eye(gram.shape[-1], dtype=factor.dtype, device=gram.device).expand_as(factor)
    return torch.linalg.solve_triangular(factor, unit, upper=False).flip(1, 2).float()

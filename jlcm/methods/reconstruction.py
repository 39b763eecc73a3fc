"""What AdaRound, BRECQ and NUPES share: gradient steps on how weights are rounded.

A rounding stands in for a stored weight while it is trained: its forward decodes with gradients,
`penalty` pushes it towards one level each, and `write` stores what it has come to.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jlcm.config import Invalid
from jlcm.learning.calibration import Calibration, split_inputs
from jlcm.learning.decoder import calibrate
from jlcm.learning.forward import to_device
from jlcm.learning.sequential import LayerResult
from jlcm.methods.grid import Grid
from jlcm.methods.network import Network
from jlcm.uniform import UniformWeight

#: AdaRound's stretch of the sigmoid beyond 0 and 1, which it thereby reaches.
LOW, HIGH = -0.1, 1.1
#: Part of the calibration inputs that `Calibration` tells apart; nothing here uses it.
HELD_OUT = 0.1
#: Inputs that run at once.
FORWARD_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Options of the reconstruction.

    Attributes:
        iterations: gradient steps for each layer or block.
        lr: step size of Adam for the roundings.
        lambda_: weight of the penalty on roundings between levels.
        warmup: part of the iterations without that penalty.
        beta: its exponent at the end of the warm-up and at the last iteration.
        memory: bytes of activations kept in memory.
    """

    iterations: int = 2000
    lr: float = 0.01
    lambda_: float = 0.01
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    memory: int = 2 * 2**30

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.iterations < 1:
            raise Invalid(f"iterations={self.iterations} must be at least 1")
        for name in ("lr", "lambda_", "memory"):
            if not getattr(self, name) >= 0:
                raise Invalid(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.warmup < 1:
            raise Invalid(f"warmup={self.warmup} must be at least 0 and below 1")
        if len(self.beta) != 2 or min(self.beta) < 1:
            raise Invalid(f"beta={self.beta} must be two exponents of at least 1")


class Rounding(nn.Module):
    """AdaRound's rounding up or down: code = floor(W / step) + h(V) (Nagel et al., 2020, Eq. 22).

    Attributes:
        choice: V, (rows, columns) float32 parameter; h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1).
    """

    def __init__(self, stored: UniformWeight, weight: Tensor) -> None:
        """Start where the decoded weight is the original one, as far as the grid reaches.

        Args:
            stored: gives the grid.
            weight: full-precision weight of the same shape.
        """
        super().__init__()
        self.shape, self.dtype = stored.shape, stored.dtype
        grid = grid_of(stored)
        position = grid.position(weight.detach().float().reshape(stored.rows, -1))
        self.levels = 2**stored.bits - 1
        floor = position.floor()
        # Beyond the grid's ends there is one level only, and nothing to choose.
        inside = (floor >= 0) & (floor < self.levels)
        self.register_buffer("floor", floor)
        self.register_buffer("lower", grid.values(floor.clamp(0, self.levels)))
        self.register_buffer("reach", torch.where(inside, grid.step, 0.0))
        part = (position - floor - LOW) / (HIGH - LOW)
        self.choice = nn.Parameter(torch.logit(part))

    def forward(self) -> Tensor:
        """The weight with its present rounding: `shape` tensor of `dtype`."""
        return _Rounded.apply(self.choice, self.lower, self.reach).view(self.shape).to(self.dtype)

    def penalty(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^beta: zero where every weight is rounded up or down (Eq. 24)."""
        return _Undecided.apply(self.choice, beta)

    def parameter_groups(self, options: Steps) -> list[dict]:
        """What Adam trains."""
        return [{"params": [self.choice], "lr": options.lr}]

    @torch.no_grad()
    def write(self, stored: UniformWeight) -> None:
        """Store the nearer of the two levels for each weight; shapes and bytes stay."""
        codes = (self.floor + (self.choice >= 0)).clamp(0, self.levels)
        stored.codes.copy_(grid_of(stored).stored(codes, stored.shape, stored.dtype).codes)


def _rounded_up(choice: Tensor) -> tuple[Tensor, Tensor]:
    """(h, dh / dV) of the rounding, in few passes over memory."""
    sigmoid = choice.sigmoid()
    slope = (1 - sigmoid).mul_(sigmoid).mul_(HIGH - LOW)
    up = sigmoid.mul_(HIGH - LOW).add_(LOW)
    slope.mul_((up > 0) & (up < 1))
    return up.clamp_(0, 1), slope


class _Rounded(torch.autograd.Function):
    """lower + h(V) * reach."""

    @staticmethod
    def forward(ctx, choice: Tensor, lower: Tensor, reach: Tensor) -> Tensor:
        up, slope = _rounded_up(choice)
        ctx.save_for_backward(slope.mul_(reach))
        return torch.addcmul(lower, up, reach)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


class _Undecided(torch.autograd.Function):
    """Sum of 1 - |2 h(V) - 1|^beta."""

    @staticmethod
    def forward(ctx, choice: Tensor, beta: float) -> Tensor:
        up, slope = _rounded_up(choice)
        centred = up.mul_(2).sub_(1)
        size = centred.abs()
        power = size.pow(beta - 1)
        ctx.save_for_backward(slope.mul_(power).mul_(centred.sign_()).mul_(-2 * beta))
        return choice.numel() - power.mul_(size).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def grid_of(stored: UniformWeight) -> Grid:
    """The grid of a stored weight, on its device."""
    zeros = None if stored.zeros is None else stored.zero_points()[:, None]
    return Grid(stored.scales.float()[:, None], zeros, stored.bits)


def train(
    roundings: Iterable[nn.Module],
    loss: Callable[[int], Tensor],
    options: Steps,
    name: str,
) -> list[float]:
    """Minimise a loss plus the penalty, which sets in after a warm-up and hardens (Eq. 25).

    Args:
        roundings: what is trained.
        loss: reconstruction error at a step.
        options: of the steps.
        name: of the layer or block, for the error.

    Returns:
        A hundred reconstruction errors in the course of the training, or one for each step.

    Raises:
        ValueError: the loss is NaN or infinite.
    """
    roundings = list(roundings)
    groups = [group for rounding in roundings for group in rounding.parameter_groups(options)]
    optimizer = torch.optim.Adam(groups, fused=True)
    free, curve = options.warmup * options.iterations, []
    first, last = options.beta
    for step in range(options.iterations):
        error = loss(step)
        total = error
        if step >= free:
            done = (step - free) / max(options.iterations - free, 1)
            beta = last + (first - last) * (1 - done)
            total = error + options.lambda_ * sum(r.penalty(beta) for r in roundings)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step % max(options.iterations // 100, 1) == 0:
            if not error.isfinite():
                raise ValueError(f"the loss of {name} is NaN or infinite: lower the lr")
            curve.append(error.item())
    return curve


def calibration_of(
    packed: nn.Module, reference: nn.Module, network: Network, *, positions: int, memory: int
) -> Calibration:
    """Both networks on the calibration inputs, prepared for reconstruction.

    Raises:
        ValueError: calibration set empty or too small, or not finite.
    """
    batches = split_inputs(network.calibration, FORWARD_BATCH)
    return calibrate(
        packed,
        reference,
        [to_device(batch, torch.device("cpu")) for batch in batches],
        forward_batch=FORWARD_BATCH,
        memory=memory,
        positions=positions,
        held_out=HELD_OUT,
        seed=network.seed,
        device=network.device,
        precision="auto",
    )


def reconstruct(
    name: str,
    roundings: list[tuple[nn.Module, UniformWeight]],
    *,
    loss: Callable[[int], Tensor],
    error: Callable[[], float],
    options: Steps,
) -> LayerResult:
    """Learn the rounding of a layer or a block, and keep it if the calibration error fell.

    Args:
        name: of the layer or block.
        roundings: each with the stored weight that it is written to.
        loss: reconstruction error at a step, of the roundings.
        error: of the stored weights as they are, on all calibration inputs.
        options: of the steps.

    Raises:
        ValueError: the loss is NaN or infinite.
    """
    parts = [part for _, stored in roundings for part in stored.buffers()]
    initial, before = [part.clone() for part in parts], error()
    curve = train([rounding for rounding, _ in roundings], loss, options, name)
    for rounding, stored in roundings:
        rounding.write(stored)
    after = error()
    if after < before:
        return LayerResult(name=name, before=before, after=after, kept="learned", curve=curve)
    for part, tensor in zip(parts, initial, strict=True):
        part.copy_(tensor)
    note = "no better on the calibration inputs: rounded to nearest"
    return LayerResult(name=name, before=before, after=before, note=note, curve=curve)


def unreached(calibration: Calibration) -> list[LayerResult]:
    """Results of the weights that do not run on the calibration inputs."""
    return [
        LayerResult(name=name, note=f"rounded to nearest: {note}")
        for name, note in calibration.skipped.items()
    ]

"""NUPES: PowerQuant's grid with an exponent for each layer, learned together with the rounding.

Yvinec et al., "NUPES: Non-uniform post-training quantization via power exponent search", 2023, as
we understand it. A weight is sign(q) * |q|^(1 / a) on the scale of its row. Its place on the grid,
sign(W) |W|^a / s plus a learned offset, may end at any level, not only at its two neighbours:
AdaRound's penalty on places between levels lets it move at first and draws it to a level in the
end. The exponent a is learned through both mappings. Layer by layer, as AdaRound.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jlcm.clustering.scalar import FP16_MAX
from jlcm.config import Invalid
from jlcm.learning.sequential import LayerResult
from jlcm.methods.adaround import AdaRound, learn_layers
from jlcm.methods.network import Network
from jlcm.methods.powerquant import PowerQuant, powerquant
from jlcm.packed import StoredWeight
from jlcm.packing import pack
from jlcm.uniform import UniformWeight

#: Smallest magnitude whose logarithm is taken, relative to the largest of the row.
_LEAST = 1e-6


@dataclass(frozen=True, kw_only=True)
class Nupes(AdaRound):
    """Options of NUPES.

    Attributes:
        lr: step size of Adam for the offsets, in steps of the grid.
        lr_power: of the exponents.
    """

    lr_power: float = 1e-3

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not self.lr_power >= 0:
            raise Invalid(f"lr_power={self.lr_power} must not be negative")


class PowerRounding(nn.Module):
    """Stands in for a weight on a power grid: decodes with gradients.

    Attributes:
        offset: (rows, columns) float32 parameter, in steps of the grid.
        raw: (1,) float32 parameter; the exponent is its softplus.
    """

    def __init__(self, stored: UniformWeight, weight: Tensor) -> None:
        """Start at the original weight and the stored exponent.

        Args:
            stored: symmetric grid with a power.
            weight: full-precision weight of the same shape.
        """
        super().__init__()
        self.shape, self.dtype = stored.shape, stored.dtype
        self.half, self.most = 2 ** (stored.bits - 1), 2 ** (stored.bits - 1) - 1
        matrix = weight.detach().float().reshape(stored.rows, -1)
        largest = matrix.abs().amax(1, keepdim=True)
        relative = torch.where(largest > 0, matrix / largest.clamp(min=1e-30), 0.0)
        self.register_buffer("largest", largest)
        self.register_buffer("sign", relative.sign())
        self.register_buffer("logarithm", relative.abs().clamp(min=_LEAST).log())
        self.offset = nn.Parameter(torch.zeros_like(relative))
        power = stored.power.float()
        self.raw = nn.Parameter(power + torch.log(-torch.expm1(-power)))  # inverse of softplus

    def forward(self) -> Tensor:
        """The weight with its places as they are, not rounded: `shape` tensor of `dtype`."""
        power = F.softplus(self.raw)
        relative = self._place(power).clamp(-self.most, self.most) / max(self.most, 1)
        values = relative.sign() * relative.abs().clamp(min=_LEAST).pow(1 / power)
        return (values * self.largest).view(self.shape).to(self.dtype)

    def penalty(self, beta: float) -> Tensor:
        """Sum of 1 - |2 f - 1|^beta over the places' distances f from the level below."""
        place = self._place(F.softplus(self.raw)).clamp(-self.most, self.most)
        return (1 - (2 * (place - place.detach().floor()) - 1).abs().pow(beta)).sum()

    def parameter_groups(self, options: Nupes) -> list[dict]:
        """What Adam trains."""
        return [
            {"params": [self.offset], "lr": options.lr},
            {"params": [self.raw], "lr": options.lr_power},
        ]

    @torch.no_grad()
    def write(self, stored: UniformWeight) -> None:
        """Store codes, exponent and the scales that belong to it; shapes and bytes stay."""
        power = F.softplus(self.raw).to(torch.float16)
        places = self._place(power.float()).round().clamp(-self.most, self.most)
        codes = places + self.half
        stored.codes.copy_(pack(codes.to(torch.uint8).view(-1), stored.bits))
        stored.power.copy_(power)
        # The level of the largest code is `most` / `half` of the stored scale's unit.
        scale = self.largest.view(-1) * (self.half / max(self.most, 1)) ** (1 / power.float())
        stored.scales.copy_(scale.clamp(max=FP16_MAX).to(torch.float16))

    def _place(self, power: Tensor) -> Tensor:
        mapped = self.sign * (power * self.logarithm).exp()
        return mapped * max(self.most, 1) + self.offset


def power_grid(network: Network, options: Nupes) -> dict[str, StoredWeight]:
    """PowerQuant's codes and exponent, the start."""
    return powerquant(network, PowerQuant())


def nupes(
    packed: nn.Module, reference: nn.Module, network: Network, options: Nupes
) -> list[LayerResult]:
    """Learn exponents and roundings of every layer in forward order, in place.

    Args:
        packed: network on PowerQuant's grid.
        reference: its full-precision original.
        network: calibration inputs, seed and device.
        options: of the method.

    Returns:
        One result for each weight; its errors are those on the calibration inputs.

    Raises:
        ValueError: calibration set empty or too small, or a loss that is not finite.
    """
    return learn_layers(packed, reference, network, options, PowerRounding)

"""PowerQuant: a uniform grid for a power of the weights, one exponent for the network.

Yvinec et al., "PowerQuant: Automorphism search for non-uniform quantization", ICLR 2023, as we
understand it. phi(w) = sign(w) |w|^a is rounded to nearest on a symmetric grid for each row, whose
largest level is the largest magnitude, and decoded by the power 1 / a. The exponent a minimises
the sum of ||W - W'||_2 over the layers. Without data.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jlcm.clustering.scalar import FP16_MAX
from jlcm.config import Invalid
from jlcm.methods.grid import as_rows
from jlcm.methods.network import Network, per_weight
from jlcm.packed import StoredWeight
from jlcm.uniform import UniformWeight

#: Ends of the search for the exponent, the second a uniform grid.
LOWEST, HIGHEST = 0.1, 1.0
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class PowerQuant:
    """Options of PowerQuant.

    Attributes:
        per_layer: an exponent for each layer in place of one for the network.
        tolerance: width of the interval at which the search for the exponent ends.
        sample: weights of a layer that the search looks at, at most (but one row); all are encoded.
    """

    per_layer: bool = False
    tolerance: float = 0.01
    sample: int = 2**16

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not isinstance(self.per_layer, bool):
            raise Invalid(f"per_layer={self.per_layer!r} must be true or false")
        if not 0 < self.tolerance < HIGHEST - LOWEST:
            raise Invalid(f"tolerance={self.tolerance} must be above 0 and below 0.9")
        if self.sample < 1:
            raise Invalid(f"sample={self.sample} must be at least 1")


class Sample(NamedTuple):
    """Some rows of a layer.

    Attributes:
        rows: (sampled, columns) float32.
        bits: width of a code.
        share: of the layer's rows.
    """

    rows: Tensor
    bits: int
    share: float


def powerquant(network: Network, options: PowerQuant) -> dict[str, StoredWeight]:
    """Find the exponent and round every weight on its power grid.

    Raises:
        Invalid: for codes of one bit, whose symmetric grid is zero alone.
    """
    for name, bits in network.bits.items():
        if bits < 2:
            raise Invalid(f"powerquant needs codes of at least 2 bits, {name} has {bits}")
    samples = {
        name: _sample(as_rows(weight), network.bits[name], options.sample)
        for name, weight in network.weights.items()
    }
    network.notes.append("the exponent is found by golden section in place of Nelder-Mead")
    if any(sample.share < 1 for sample in samples.values()):
        network.notes.append(
            f"the exponent is searched on at most {options.sample} weights of a layer"
        )
    if options.per_layer:
        network.notes.append("each layer has an exponent of its own")
        exponents = {n: find_exponent([s], options.tolerance) for n, s in samples.items()}
    else:
        exponents = dict.fromkeys(samples, find_exponent(samples.values(), options.tolerance))
    found = iter(exponents.values())
    return per_weight(network, lambda weight, bits: encode(weight, bits, next(found)), "power")


def encode(weight: Tensor, bits: int, exponent: float) -> UniformWeight:
    """Round a weight on a power grid.

    Args:
        weight: any shape, rows first, finite.
        bits: width of a code, 2 to 8.
        exponent: a, above 0; rounded to float16.
    """
    exponent = _as_stored(exponent)
    matrix = as_rows(weight)
    scale = _scales(matrix, bits, exponent)
    return UniformWeight.encode(
        (_codes(matrix.abs(), scale, bits, exponent) * matrix.sign() + 2 ** (bits - 1)).byte(),
        scale,
        shape=tuple(weight.shape),
        bits=bits,
        power=exponent,
        dtype=weight.dtype,
    )


def find_exponent(samples: Iterable[Sample], tolerance: float) -> float:
    """The exponent that minimises the sum of ||W - W'||_2 over layers, a float16 value."""
    samples = list(samples)

    def harm(exponent: float) -> float:
        return sum(distortion(sample, _as_stored(exponent)) for sample in samples)

    return _as_stored(golden_section(harm, LOWEST, HIGHEST, tolerance))


def distortion(sample: Sample, exponent: float) -> float:
    """||W - W'||_2 of a layer, estimated from some of its rows."""
    scale = _scales(sample.rows, sample.bits, exponent)
    magnitudes = sample.rows.abs()
    codes = _codes(magnitudes, scale, sample.bits, exponent)
    half = 2 ** (sample.bits - 1)
    levels = (torch.arange(half) / half) ** (1 / exponent)  # few, so their power is taken once
    errors = levels[codes.int()] * scale - magnitudes
    return math.sqrt(float(errors.square().sum(dtype=torch.float64)) / sample.share)


def golden_section(
    function: Callable[[float], float], low: float, high: float, tolerance: float
) -> float:
    """A minimum of a function, the only one in the interval, to within a tolerance."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return left if at_left <= at_right else right


def _sample(matrix: Tensor, bits: int, most: int) -> Sample:
    """Rows at equal distances, as many as `most` weights allow but at least one."""
    rows = len(matrix)
    count = min(max(most // max(matrix.shape[1], 1), 1), rows)
    chosen = torch.arange(count) * rows // count
    return Sample(matrix[chosen], bits, count / rows)


def _as_stored(exponent: float) -> float:
    return float(torch.tensor(exponent, dtype=torch.float16))


def _scales(matrix: Tensor, bits: int, exponent: float) -> Tensor:
    """(rows, 1) float32, float16 values: the magnitude of code 2^(b - 1), one past the largest."""
    largest = matrix.abs().amax(1, keepdim=True)
    beyond = (2 ** (bits - 1) / (2 ** (bits - 1) - 1)) ** (1 / exponent)
    return (largest * beyond).clamp(max=FP16_MAX).half().float()


def _codes(magnitudes: Tensor, scale: Tensor, bits: int, exponent: float) -> Tensor:
    """Codes of magnitudes, float32 integers from 0 to 2^(b - 1) - 1."""
    relative = torch.where(scale > 0, magnitudes / torch.where(scale > 0, scale, 1.0), 0.0)
    places = relative.pow_(exponent).mul_(2 ** (bits - 1))
    return places.round_().clamp_(max=2 ** (bits - 1) - 1)

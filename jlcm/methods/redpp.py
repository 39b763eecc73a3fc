"""RED++ hashing: codewords where the density of a layer's weights has its maxima.

Yvinec et al., "RED++: Data-free pruning of deep neural networks via input splitting and output
merging", TPAMI 2022, as we understand it; of its steps the hashing of weights alone. The density is
estimated with a Gaussian kernel. Its local minima bound cells; the weights of a cell become the
local maximum inside. Without data.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jlcm.config import Invalid
from jlcm.methods.network import Network, per_weight
from jlcm.packed import PackedWeight, StoredWeight

#: Relative width of the interval at which the search for the bandwidth ends.
_TOLERANCE = 1e-3
#: Densities are compared to this part of the largest, above the rounding errors of the FFT.
_RESOLUTION = 1e-12
#: Smallest bandwidth in bins: the kernel is then 0 in the next bin.
_NARROWEST = 0.1


@dataclass(frozen=True, kw_only=True)
class RedPP:
    """Options of RED++ hashing.

    Attributes:
        bins: of the histogram that the density is computed from.
    """

    bins: int = 2**14

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.bins < 2:
            raise Invalid(f"bins={self.bins} must be at least 2")


class Modes(NamedTuple):
    """Extrema of a density.

    Attributes:
        maxima: (modes,) float64, ascending.
        minima: (modes - 1,) float64, one between two maxima.
        bandwidth: standard deviation of the kernel; 0 for equal values.
    """

    maxima: Tensor
    minima: Tensor
    bandwidth: float


def redpp(network: Network, options: RedPP) -> dict[str, StoredWeight]:
    """Replace every weight by the density's maximum in its cell."""
    network.notes += [
        "of RED++ only the hashing of weights is done, without pruning, splitting and merging",
        "the bandwidth is the smallest that leaves at most 2^bits maxima of the density",
    ]

    def encode(weight: Tensor, bits: int) -> PackedWeight:
        values = weight.detach().cpu().double().reshape(-1)
        modes = find_modes(values, 2**bits, options.bins)
        return PackedWeight.encode(
            torch.bucketize(values, modes.minima).to(torch.uint8),
            modes.maxima[None],
            shape=tuple(weight.shape),
            bits=bits,
            dtype=weight.dtype,
        )

    return per_weight(network, encode, "hash")


def find_modes(values: Tensor, most: int, bins: int = 2**14) -> Modes:
    """Extrema of the density with the smallest bandwidth that gives at most so many maxima.

    Args:
        values: (n,) float64, finite, n at least 1.
        most: maxima at most.
        bins: of the histogram; extrema are centres of bins, or lie half-way where several bins are
            equal.
    """
    low, high = values.aminmax()
    width = (high - low) / bins
    if not width > 0:
        return Modes(low[None], values.new_empty(0), 0.0)
    index = ((values - low) / width).long().clamp(max=bins - 1)
    histogram = index.bincount(minlength=bins).double()
    # A wider kernel never makes more maxima, and half the range leaves one.
    narrow, wide = _NARROWEST, bins / 2
    found = _extrema(_density(histogram, narrow))
    if len(found[0]) <= most:
        wide = narrow
    else:
        found = _extrema(_density(histogram, wide))
    while wide > narrow * (1 + _TOLERANCE):
        middle = (narrow * wide) ** 0.5
        candidate = _extrema(_density(histogram, middle))
        if len(candidate[0]) <= most:
            wide, found = middle, candidate
        else:
            narrow = middle
    maxima, minima = (low + (places + 0.5) * width for places in found)
    return Modes(maxima, minima, float(wide * width))


def _density(histogram: Tensor, bandwidth: float) -> Tensor:
    """Histogram convolved with a Gaussian of a width in bins, in whole multiples of a resolution.

    Zeros as long as the histogram keep its ends from running into each other.
    """
    size = 2 * len(histogram)
    distance = torch.arange(size, dtype=torch.float64)
    distance = torch.minimum(distance, size - distance)
    kernel = torch.exp(-0.5 * (distance / bandwidth).square())
    spectrum = torch.fft.rfft(histogram, n=size) * torch.fft.rfft(kernel)
    density = torch.fft.irfft(spectrum, n=size)[: len(histogram)]
    return (density / (density.max() * _RESOLUTION)).round()


def _extrema(density: Tensor) -> tuple[Tensor, Tensor]:
    """Places of local maxima and of the minima between them, middles of equal values."""
    values, counts = torch.unique_consecutive(density, return_counts=True)
    middles = counts.cumsum(0).double() - (counts + 1) / 2
    # Runs differ from their neighbours: each is higher or lower than the one before.
    outside = values.new_full((1,), -1)
    rises = torch.cat([outside, values, outside]).diff() > 0
    maxima, minima = rises[:-1] & ~rises[1:], ~rises[:-1] & rises[1:]
    return middles[maxima], middles[minima]

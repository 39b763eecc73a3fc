"""SQuant: rounding errors that sum to nearly nothing, without data.

Guo et al., "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation", ICLR
2022. Rounding to nearest makes each error small, but errors of one sign add up where the inputs of
a neuron have a common mean. A few weights are therefore rounded to the other side: those whose
error is largest, so that the squared error grows least.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jlcm.config import Invalid
from jlcm.methods.grid import as_rows, min_max
from jlcm.methods.network import Network, per_weight
from jlcm.packed import StoredWeight


@dataclass(frozen=True, kw_only=True)
class SQuant:
    """Options of SQuant.

    Attributes:
        kernels: balance every kernel of a convolution before its output channel; else the output
            channel alone.
    """

    kernels: bool = True

    def __post_init__(self) -> None:
        """Check the choice."""
        if not isinstance(self.kernels, bool):
            raise Invalid(f"kernels={self.kernels!r} must be true or false")


def squant(network: Network, options: SQuant) -> dict[str, StoredWeight]:
    """Round every weight so that the errors of a kernel and of an output channel cancel.

    Each output channel has a grid from its smallest to its largest weight. Linear layers and
    convolutions of kernel size 1 have no kernels to balance: for them the channel stage runs alone,
    over all weights of the channel.

    Args:
        network: its weights and bits.
        options: whether kernels are balanced.

    Returns:
        The stored weights by name.
    """
    if options.kernels and not any(_kernel_size(w) > 1 for w in network.weights.values()):
        network.notes.append("no layer has kernels larger than 1, so that the kernel stage is idle")

    def encode(weight, bits):
        matrix = as_rows(weight)
        grid = min_max(matrix, bits)
        size = _kernel_size(weight) if options.kernels else 1
        codes = round_balanced(grid.position(matrix), 2**bits - 1, size)
        return grid.stored(codes, tuple(weight.shape), weight.dtype)

    return per_weight(network, encode, "round")


def round_balanced(position: Tensor, top: int, kernel_size: int) -> Tensor:
    """Round to integers so that the errors of each kernel and each row nearly cancel.

    After the kernel stage the errors of a kernel sum to at most 1/2. The channel stage then brings
    the sum of a row to at most 1/2 too, for which some kernels give up one flip: they end between
    1/2 and 1. Weights at the ends of the range can leave more, where a flip would leave the range.

    Args:
        position: (rows, columns) float32, where the weights lie on the scale of the codes.
        top: largest code; the smallest is 0.
        kernel_size: consecutive columns that are one kernel; 1 for rows without kernels.

    Returns:
        Codes, float32 integers of `position`'s shape, each at most 1 from the nearest.
    """
    rows = len(position)
    size = kernel_size if kernel_size > 1 else position.shape[1]
    codes = position.round().clamp(0, top).view(rows, -1, size)
    error = codes - position.view_as(codes)
    sign = error.sum(-1, keepdim=True).sign()
    inside = (codes - sign >= 0) & (codes - sign <= top)
    flipped, spare, rest = _balance(error, inside)
    codes = codes - sign * flipped
    # A kernel whose errors sum to `rest` offers the row one flip, which takes 1 off |rest|.
    has_spare = spare >= 0
    chosen, _, _ = _balance(rest, has_spare)
    direction = rest.sum(-1, keepdim=True).sign()
    places = spare.clamp(min=0).unsqueeze(-1)
    offered = torch.zeros_like(codes).scatter_(-1, places, (direction * chosen).unsqueeze(-1))
    return (codes - offered).view_as(position)


def _kernel_size(weight: Tensor) -> int:
    return weight.shape[2:].numel()


def _balance(error: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the flips, along the last dimension, that bring a sum of errors to at most 1/2.

    A flip changes an error by 1 against the sign of the sum, so n = round(|sum|) are needed: those
    of the largest errors of the same sign.

    Args:
        error: (..., elements) float32.
        allowed: same shape, bool: which may be flipped.

    Returns:
        Flips, float32 0 or 1 of `error`'s shape; the element (..., ) int64 whose flip would change
        the remaining sum's sign, -1 without one; and the remaining sum, (..., ) float32.
    """
    total = error.sum(-1, keepdim=True)
    eligible = allowed & (error * total > 0)
    size = torch.where(eligible, error.abs(), -1.0)
    order = size.argsort(dim=-1, descending=True, stable=True)
    available = eligible.sum(-1, keepdim=True)
    count = total.abs().round().minimum(available).long()
    first = torch.arange(error.shape[-1], device=error.device) < count
    flips = torch.zeros_like(error).scatter_(-1, order, first.to(error.dtype))
    # One flip too many: the last can be taken back. One too few: the next can follow.
    place = torch.where(count >= total.abs(), count - 1, count)
    exists = (place >= 0) & (place < available)
    spare = order.gather(-1, place.clamp(0, error.shape[-1] - 1))
    spare = torch.where(exists, spare, -1)
    return flips, spare.squeeze(-1), (total - total.sign() * count).squeeze(-1)

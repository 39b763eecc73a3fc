"""k-means of scalars with soft assignments, and its gradient: the layer of DKM.

With scalars the attention needs no matrix of weights by codewords: exp(-|w - c| / tau) is a product
of a factor of w and one of c on either side of w. A weight therefore sees the codewords below it in
proportions that only depend on the interval between two codewords in which it lies, those above it
likewise, and what is its own is one number: the share of those above.
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: Soft k-means ends when no codeword moves by more than this part of their mean gap.
TOLERANCE = 1e-3
#: A codeword with less attention in all, in weights, stays: so little is rounding noise.
LEAST_MASS = 1e-6


class Attention(NamedTuple):
    """A = softmax(-|w - c| / tau), (N, K), in a form that takes one number for each weight.

    Row i is (1 - share_i) below[interval_i] + share_i above[interval_i].

    Attributes:
        interval: (N,) int32, number of codewords below the weight, 0 to K.
        share: (N,) attention that goes to the codewords above.
        below: (K + 1, K) float64, proportions of the codewords below an interval; zeros in row 0.
        above: (K + 1, K) float64, of those above; zeros in row K.
        tau: temperature.
    """

    interval: Tensor
    share: Tensor
    below: Tensor
    above: Tensor
    tau: float

    def mix(self, codewords: Tensor) -> Tensor:
        """A c: from a value for each codeword, (K,) float64, to one for each weight, (N,)."""
        return torch.lerp(
            self._of_interval(self.below @ codewords),
            self._of_interval(self.above @ codewords),
            self.share,
        )

    def slope(self, codewords: Tensor) -> Tensor:
        """(N,) derivative of `mix` by the weight."""
        rise = self._of_interval((self.above - self.below) @ codewords)
        return rise * (self.share * (1 - self.share)) * (2 / self.tau)

    def pool(self, weights: Tensor) -> Tensor:
        """A^T w: from a value for each weight, (N,), to one for each codeword, (K,) float64."""
        upper = self.share * weights
        return self._sums(weights - upper) @ self.below + self._sums(upper) @ self.above

    def _of_interval(self, table: Tensor) -> Tensor:
        return table.to(self.share.dtype).index_select(0, self.interval)

    def _sums(self, values: Tensor) -> Tensor:
        return self.interval.bincount(weights=values.double(), minlength=len(self.below))


def attend(weights: Tensor, codebook: Tensor, tau: float) -> Attention:
    """Attention of scalar weights to codewords.

    Args:
        weights: (N,) float32 or float64.
        codebook: (K,) float64, ascending.
        tau: temperature, positive.
    """
    kernel = torch.exp(-(codebook[:, None] - codebook).abs() / tau)
    below, above = kernel.tril(), kernel.triu()
    mass_below, mass_above = below.sum(1), above.sum(1)
    none, end = kernel.new_zeros(1, len(codebook)), kernel.new_full((1,), torch.inf)
    # Where both sides have the same attention, in each interval between two codewords.
    even = (codebook[1:] + codebook[:-1]) / 2 + tau / 2 * (mass_below[:-1] / mass_above[1:]).log()
    even = torch.cat([-end, even, end]).to(weights.dtype)
    interval = torch.bucketize(weights, codebook.to(weights.dtype), out_int32=True)
    return Attention(
        interval,
        ((weights - even.index_select(0, interval)) * (2 / tau)).sigmoid(),
        torch.cat([none, below / mass_below[:, None]]),
        torch.cat([above / mass_above[:, None], none]),
        tau,
    )


def soft_means(weights: Tensor, codebook: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """One step of soft k-means.

    Args:
        weights: (N,).
        codebook: (K,) float64, kept where a codeword has next to no attention.
        attention: of the weights to the codebook.

    Returns:
        The means of the weights by attention, and one over the attention that each codeword has in
        all, 0 where it stays; (K,) float64 each.
    """
    mass = attention.pool(torch.ones_like(weights))
    inverse = torch.where(mass > LEAST_MASS, 1 / mass, 0.0)
    return torch.where(inverse > 0, attention.pool(weights) * inverse, codebook), inverse


@torch.no_grad()
def soft_kmeans(weights: Tensor, codebook: Tensor, tau: float, iterations: int) -> Tensor:
    """Soft k-means without gradients, until no codeword moves much or the iterations are over.

    Args:
        weights: (N,).
        codebook: (K,) float64 to start from, ascending.
        tau: temperature.
        iterations: at most.

    Returns:
        (K,) float64, ascending.
    """
    least = TOLERANCE * float(codebook[-1] - codebook[0]) / max(len(codebook) - 1, 1)
    for _ in range(iterations):
        moved, _ = soft_means(weights, codebook, attend(weights, codebook, tau))
        change = float((moved - codebook).abs().max())
        codebook = moved.sort().values
        if change <= least:
            break
    return codebook


class SoftCluster(torch.autograd.Function):
    """Weights replaced by what one step of soft k-means makes of them.

    forward(weights (N,), codebook (K,) float64 ascending, tau) returns A c and c = A^T w / A^T 1,
    where A is the attention of the weights to the given codebook. The gradient of A c by the
    weights is exact: through the attention and through the means. The given codebook is a constant,
    and the means returned have no gradient.
    """

    @staticmethod
    def forward(ctx, weights, codebook, tau):  # noqa: D102
        attention = attend(weights, codebook, tau)
        means, inverse = soft_means(weights, codebook, attention)
        ctx.save_for_backward(weights, means, inverse, *attention[:4])
        ctx.tau = tau
        ctx.mark_non_differentiable(means)
        return attention.mix(means), means

    @staticmethod
    def backward(ctx, gradient, _):  # noqa: D102
        weights, means, inverse, *parts = ctx.saved_tensors
        attention = Attention(*parts, ctx.tau)
        # Of each mean's gradient, the part that a weight with all of its attention there receives.
        pull = attention.pool(gradient) * inverse
        of_weights = attention.mix(pull) + gradient * attention.slope(means)
        of_weights += weights * attention.slope(pull) - attention.slope(pull * means)
        return of_weights, None, None

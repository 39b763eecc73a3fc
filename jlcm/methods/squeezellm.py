"""SqueezeLLM: a codebook for each row, fitted where errors matter, and a few weights kept apart.

Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization", ICML 2024. The k-means of a row weights
every squared error by the diagonal of the Fisher information. Weights far outside the others'
range, and the few of highest Fisher information, are taken out of the clustering and kept in 16
bits in a sparse matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from jlcm.budget import Allocation, goal_bytes
from jlcm.config import Encoding, Init, Invalid
from jlcm.encode import encode
from jlcm.expanded import expand
from jlcm.methods.network import Network
from jlcm.packed import StoredWeight
from jlcm.select import as_matrix
from jlcm.sensitivity import MOST_INPUTS, MOST_TOKENS, fisher_information


@dataclass(frozen=True, kw_only=True)
class SqueezeLLM:
    """Options of SqueezeLLM.

    Attributes:
        sparse: keep outliers and sensitive weights apart, in 16 bits.
        outlier_range: weights further than so many interquartile ranges below the first or above
            the third quartile of their tensor are outliers.
        sensitive: part of a tensor's weights that is kept apart for its Fisher information.
    """

    sparse: bool = True
    outlier_range: float = 1.8
    sensitive: float = 0.0005

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not isinstance(self.sparse, bool):
            raise Invalid(f"sparse={self.sparse!r} must be true or false")
        if not self.outlier_range >= 0:
            raise Invalid(f"outlier_range={self.outlier_range} must not be negative")
        if not 0 <= self.sensitive < 1:
            raise Invalid(f"sensitive={self.sensitive} must be at least 0 and below 1")


def squeezellm(network: Network, options: SqueezeLLM) -> dict[str, StoredWeight]:
    """Cluster every row by sensitivity, and keep outliers apart.

    Args:
        network: its weights and bits, and calibration inputs; it must return logits.
        options: of the method.

    Returns:
        The stored weights by name.

    Raises:
        ValueError: as `jlcm.sensitivity.fisher_information`.
    """
    home = next(network.model.parameters()).device
    fisher = fisher_information(
        network.model,
        network.weights,
        network.calibration,
        seed=network.seed,
        device=network.device,
        progress=network.progress,
    )
    network.model.to(home)
    bar = tqdm(
        network.weights.items(),
        desc="cluster",
        unit="layer",
        disable=not network.progress,
        leave=False,
    )
    found = {
        name: dense_and_sparse(weight, fisher.pop(name), network.bits[name], options)
        for name, weight in bar
    }
    _describe(network, options, found)
    return found


def dense_and_sparse(
    weight: Tensor, fisher: Tensor, bits: int, options: SqueezeLLM
) -> StoredWeight:
    """Encode one weight.

    Args:
        weight: any shape, rows first.
        fisher: diagonal Fisher information, same shape, not negative.
        bits: width of a code.
        options: of the method.
    """
    matrix = as_matrix(weight.detach().float().cpu())
    # In proportion to the row's largest, because squared gradients may be too small for float32.
    cost = as_matrix(fisher).double()
    cost = (cost / cost.amax(1, keepdim=True).clamp(min=1e-300)).float()
    apart = None
    if options.sparse:
        apart = kept_apart(matrix, as_matrix(fisher), options)
        matrix, cost = matrix.masked_fill(apart, 0), cost.masked_fill(apart, 0)
    rows, columns = matrix.shape
    base = encode(
        matrix.view(weight.shape).to(weight.dtype),
        Allocation(rows=rows, columns=columns, bits=bits),
        Encoding(kind="per_row"),
        Init(method="kmeans"),
        importance=cost,
        try_stored_order=False,
    )
    if apart is None or not apart.any():
        return base
    positions = apart.view(-1).nonzero().view(-1)
    base.dtype = torch.float32
    original = weight.detach().float().cpu().view(-1)
    differences = original[positions] - base().view(-1)[positions]
    base.dtype = weight.dtype
    return expand(base, positions=positions, differences=differences)


def kept_apart(matrix: Tensor, fisher: Tensor, options: SqueezeLLM) -> Tensor:
    """(rows, columns) bool: outliers of the tensor and its most sensitive weights."""
    ascending = matrix.flatten().sort().values
    count = len(ascending)
    first, third = (ascending[round(part * (count - 1))] for part in (0.25, 0.75))
    reach = options.outlier_range * (third - first)
    apart = (matrix < first - reach) | (matrix > third + reach)
    most = int(options.sensitive * count)
    if most:
        apart.view(-1)[fisher.flatten().topk(most).indices] = True
    return apart


def _describe(network: Network, options: SqueezeLLM, found: dict[str, StoredWeight]) -> None:
    """Note what the paper has otherwise, and what the goal does not allow."""
    network.notes += [
        "the Fisher information is that of the network's own output distribution, on at most "
        f"{MOST_INPUTS} inputs or {MOST_TOKENS:,} tokens",
        "k-means is optimal, in place of 50 iterations from k-means++",
    ]
    if options.sparse:
        network.notes.append(
            "sparse values are differences from the codeword in 16 bits, at gaps that are counted"
        )
    spent = sum(sum(held.sizes().values()) for held in found.values())
    if spent > goal_bytes(sum(held.count for held in found.values()), network.alpha):
        network.notes.append(
            f"codes, a codebook for each row and outliers take more bytes than "
            f"alpha={network.alpha:g} leaves"
        )

"""REx: rounding errors are rounded again, for the output neurons that need it most.

Yvinec et al., "REx: Data-free residual quantization error expansion", NeurIPS 2023, as we
understand it. The first term of a weight rounds it on a uniform grid; each further term rounds what
the terms before it miss, on a grid of its own, and keeps only the output neurons (rows) that gain
most. What is still missing may get sparse outliers. Without data.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jlcm.budget import HALF, MAX_BITS, code_bits, goal_bytes
from jlcm.clustering.scalar import FP16_MAX
from jlcm.config import Invalid, check_choice
from jlcm.expanded import expand, largest_outliers
from jlcm.methods.grid import SHRINKS, Grid, as_rows
from jlcm.methods.network import Network, per_weight
from jlcm.methods.rtn import RANGES
from jlcm.packed import StoredWeight
from jlcm.packing import packed_bytes
from jlcm.uniform import UniformWeight

#: Weights that the search for a range works on at a time.
_BLOCK = 2**16


@dataclass(frozen=True, kw_only=True)
class REx:
    """Options of REx.

    Attributes:
        bits: of a code of every term, 2 to 8; None for floor(16 / alpha) - 1, at least 2, so that
            the goal leaves bytes for further terms. Where the network was given other bits than
            those that follow from alpha, None takes them.
        orders: terms at most, the first included.
        outliers: part of the bytes that goes to sparse outliers.
        range: of a grid: "search" (least squared error) or "min_max".
    """

    bits: int | None = None
    orders: int = 2
    outliers: float = 0.0
    range: str = "search"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.bits is not None and not 2 <= self.bits <= MAX_BITS:
            raise Invalid(f"bits={self.bits} of a term must be between 2 and {MAX_BITS}")
        if self.orders < 1:
            raise Invalid(f"orders={self.orders} must be at least 1")
        if not 0 <= self.outliers < 1:
            raise Invalid(f"outliers={self.outliers} must be at least 0 and below 1")
        check_choice("range", self.range, RANGES)


@dataclass
class Expansion:
    """A weight while terms are added.

    Attributes:
        base: first term, decoding to float32.
        residual: (rows, columns) float32, what the terms so far miss.
        terms: further terms, each with the (rows,) mask of its rows.
    """

    base: UniformWeight
    residual: Tensor
    terms: list[tuple[Tensor, UniformWeight]] = field(default_factory=list)

    def term_bytes(self, rows: int) -> int:
        """Bytes of a further term of so many rows: codes, scales and the mask."""
        count, columns = self.residual.shape
        codes = packed_bytes(rows * columns, self.base.bits)
        return codes + HALF * rows + packed_bytes(count, 1) if rows else 0

    def add_term(self, mask: Tensor, *, searched: bool) -> None:
        """Round the residual of some rows."""
        rows = self.residual[mask]
        shape = (len(rows), *self.base.shape[1:])
        term = round_rows(rows, self.base.bits, shape, searched=searched)
        self.residual[mask] = rows - term().view(rows.shape)
        self.terms.append((mask, term))


def rex(network: Network, options: REx) -> dict[str, StoredWeight]:
    """Expand the weights as far as the bytes of the network's goal reach."""
    searched = options.range == "search"
    network = replace(network, bits=term_bits(network, options))
    bases = per_weight(
        network,
        lambda weight, bits: round_rows(as_rows(weight), bits, weight.shape, searched=searched),
        "expand",
    )
    parts = [
        Expansion(base, as_rows(network.weights[name]) - base().view(base.rows, -1))
        for name, base in bases.items()
    ]
    network.notes.append(
        "rows of further terms are chosen over all layers at once, by squared error per byte"
    )
    if searched:
        network.notes.append("ranges of the grids are those of least squared error")
    goal = goal_bytes(sum(base.count for base in bases.values()), network.alpha)
    left = goal - sum(sum(base.sizes().values()) for base in bases.values())
    if left < 0:
        network.notes.append("the first terms alone take more bytes than the goal")
    for_outliers = min(math.floor(options.outliers * goal), max(left, 0))
    left -= for_outliers
    for _ in range(options.orders - 1):
        spent = _add_terms(parts, left, searched=searched)
        if not spent:
            break
        left -= spent
    # Entries that float16 rounds to zero gain nothing.
    gains = [part.residual.half().abs() for part in parts]
    places = largest_outliers(gains, for_outliers) if for_outliers else [None] * len(parts)
    return {
        name: _sum(part, where, network.weights[name].dtype)
        for name, part, where in zip(bases, parts, places, strict=True)
    }


def term_bits(network: Network, options: REx) -> dict[str, int]:
    """Bits of the terms of each weight, by name."""
    from_alpha = min(max(math.floor(16 / network.alpha) - 1, 2), MAX_BITS)
    usual = code_bits(network.alpha)
    return {
        name: options.bits or (from_alpha if bits == usual else max(bits, 2))
        for name, bits in network.bits.items()
    }


def round_rows(
    matrix: Tensor, bits: int, shape: tuple[int, ...], *, searched: bool
) -> UniformWeight:
    """Round to nearest on a symmetric grid for each row.

    Args:
        matrix: (rows, columns) float32.
        bits: width of a code, 2 to 8.
        shape: of the weight.
        searched: shrink the range in steps of one percent, down to a fifth of it, to where the
            squared error is least; otherwise the largest level is the largest magnitude.

    Returns:
        The weight, decoding to float32.
    """
    shrink = torch.ones(len(matrix), 1)
    if searched:  # a few rows at a time, which the processor's cache holds
        few = max(_BLOCK // max(matrix.shape[1], 1), 1)
        shrink = torch.cat([_best_shrink(rows, bits) for rows in matrix.split(few)])
    grid = _grid(matrix, bits, shrink)
    return grid.stored(_codes(grid, matrix), tuple(shape), torch.float32)


def _best_shrink(matrix: Tensor, bits: int) -> Tensor:
    """(rows, 1) factors of the range."""
    best = torch.ones(len(matrix), 1)
    least = torch.full_like(best, torch.inf)
    for i in range(SHRINKS):
        grid = _grid(matrix, bits, 1 - i / 100)
        errors = (grid.values(_codes(grid, matrix)) - matrix).square().sum(1, keepdim=True)
        best = torch.where(errors < least, 1 - i / 100, best)
        least = torch.minimum(errors, least)
    return best


def _grid(matrix: Tensor, bits: int, shrink: Tensor | float) -> Grid:
    half = 2 ** (bits - 1)
    scale = matrix.abs().amax(1, keepdim=True) * shrink * (half / (half - 1))
    return Grid(scale.clamp(max=FP16_MAX).half().float(), None, bits)


def _codes(grid: Grid, matrix: Tensor) -> Tensor:
    return grid.codes(matrix).clamp(min=1)  # code 0 has no positive counterpart


def choose_rows(parts: list[Expansion], budget: int, *, searched: bool) -> list[Tensor]:
    """Masks of the rows, (rows,) bool for each weight, that a further term has.

    Rows come in the order of the squared error that a byte removes, as far as the budget allows.
    """
    gains = [_gains(part, searched=searched) for part in parts]
    # A row's codes and scale, and its share of the mask, which the first row of a weight pays.
    costs = [part.residual.shape[1] * part.base.bits / 8 + HALF + 1 / 8 for part in parts]
    worth = torch.cat([gain / cost for gain, cost in zip(gains, costs, strict=True)])
    owner = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(g) for g in gains]))
    row = torch.cat([torch.arange(len(gain)) for gain in gains])
    masks = [torch.zeros(len(gain), dtype=torch.bool) for gain in gains]
    taken, left = [0] * len(parts), budget
    order = worth.argsort(descending=True, stable=True)[: int((worth > 0).sum())]
    for i, r in zip(owner[order].tolist(), row[order].tolist(), strict=True):
        cost = parts[i].term_bytes(taken[i] + 1) - parts[i].term_bytes(taken[i])
        if cost <= left:
            masks[i][r] = True
            taken[i] += 1
            left -= cost
    return masks


def _gains(part: Expansion, *, searched: bool) -> Tensor:
    """(rows,) float64: squared error that a further term of the row removes."""
    term = round_rows(part.residual, part.base.bits, part.base.shape, searched=searched)
    after = part.residual - term().view(part.residual.shape)
    return part.residual.double().square().sum(1) - after.double().square().sum(1)


def _add_terms(parts: list[Expansion], budget: int, *, searched: bool) -> int:
    """Add a further term to each weight where the budget allows; bytes taken."""
    if budget < min((part.term_bytes(1) for part in parts), default=math.inf):
        return 0
    spent = 0
    for part, mask in zip(parts, choose_rows(parts, budget, searched=searched), strict=True):
        if mask.any():
            part.add_term(mask, searched=searched)
            spent += part.term_bytes(int(mask.sum()))
    return spent


def _sum(part: Expansion, where: Tensor | None, dtype: torch.dtype) -> StoredWeight:
    """The stored weight; the first term alone if nothing was added."""
    part.base.dtype = dtype
    if not part.terms and (where is None or not where.numel()):
        return part.base
    differences = None if where is None else part.residual.view(-1)[where]
    return expand(part.base, terms=part.terms, positions=where, differences=differences)

"""OPTQ (GPTQ): rounding column by column, each error made up for by the columns left.

Frantar et al., "OPTQ: Accurate Quantization for Generative Pre-trained Transformers", ICLR 2023.
With H = 2 X X^T / n of a layer's inputs, the squared error of its outputs is a quadratic form of
the error of its weights. The rounding error of a column is therefore spread over the columns that
are not rounded yet, by the rows of the Cholesky factor of H^-1.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jlcm.config import Invalid, check_choice
from jlcm.layers import stored_tensors
from jlcm.learning.calibration import Calibration
from jlcm.learning.report import collector, in_brief
from jlcm.learning.sequential import LayerResult, joined
from jlcm.methods.grid import Grid, group_size, split_groups
from jlcm.methods.network import Network
from jlcm.methods.reconstruction import calibration_of, unreached
from jlcm.methods.rtn import RANGES, RTN, check_group, rtn
from jlcm.packed import StoredWeight
from jlcm.uniform import UniformWeight

#: Columns rounded before their errors are spread over all later ones in one product.
BLOCK = 128
#: Damping that is not exceeded, relative to the mean diagonal.
MOST_DAMPING = 10.0


@dataclass(frozen=True, kw_only=True)
class OPTQ:
    """Options of OPTQ.

    Attributes:
        damping: added to the diagonal of H, relative to its mean; ten times as much where H then is
            not positive definite, again and again up to 10.
        act_order: round columns of large inputs first. Grids of groups are then found in advance.
        group: columns of a row that share a scale and a zero point; None for the whole row.
        symmetric: grids around zero, without zero points.
        range: of a grid: "search" (least 2.4-norm of the error, BRECQ's) or "min_max".
        positions: pixels or tokens sampled for each input of a neuron, at least 32,768 together.
        memory: bytes of activations kept in memory.
    """

    damping: float = 0.01
    act_order: bool = True
    group: int | None = None
    symmetric: bool = False
    range: str = "search"
    positions: int = 32
    memory: int = 2 * 2**30

    def __post_init__(self) -> None:
        """Check the choices and the ranges."""
        check_choice("range", self.range, RANGES)
        check_group(self.group)
        for name in ("act_order", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise Invalid(f"{name}={getattr(self, name)!r} must be true or false")
        if not 0 < self.damping <= MOST_DAMPING:
            raise Invalid(f"damping={self.damping} must be above 0 and at most {MOST_DAMPING:g}")
        if self.positions < 1 or self.memory < 0:
            raise Invalid("positions must be at least 1 and memory not negative")

    def rounding(self) -> RTN:
        """Rounding to nearest on grids of the same kind."""
        return RTN(range=self.range, group=self.group, symmetric=self.symmetric)


def nearest(network: Network, options: OPTQ) -> dict[str, StoredWeight]:
    """Round every weight to nearest, on the grids that OPTQ starts from."""
    network.notes += [
        "inputs of a layer come from the network as quantised so far, its own block included",
        "a layer that is no better on the calibration inputs stays rounded to nearest",
    ]
    if options.range == "search":
        network.notes.append(
            "ranges of the grids are those of least 2.4-norm of the rounding error, where the "
            "paper has them from the smallest to the largest weight"
        )
    return rtn(network, options.rounding())


def optq(
    packed: nn.Module, reference: nn.Module, network: Network, options: OPTQ
) -> list[LayerResult]:
    """Round every layer with error feedback, in forward order and in place.

    Args:
        packed: network with uniform weights, rounded to nearest.
        reference: its full-precision original.
        network: calibration inputs, seed and device.
        options: of the method.

    Returns:
        One result for each weight; its errors are those of the layer's outputs on the calibration
        inputs, as the quantised network hands them on, over the variance of what the original
        weight makes of these.

    Raises:
        ValueError: calibration set empty or too small, or activations that are NaN or infinite.
    """
    calibration = calibration_of(
        packed, reference, network, positions=options.positions, memory=options.memory
    )
    weights = dict(reference.named_parameters(remove_duplicate=False))
    store = dict(stored_tensors(packed))
    results, finish = collector(network.on_result)
    bar = tqdm(
        calibration.layers, desc="round", unit="layer", disable=not network.progress, leave=False
    )
    for index, layer in enumerate(bar):
        stored = store[layer.name]
        if not isinstance(stored, UniformWeight):  # an end in 8 bits
            continue
        began = time.perf_counter()
        result = LayerResult(name=layer.name)
        try:
            moments = input_moments(calibration, index, stored)
            damping = _round_layer(stored, weights[layer.name], moments, options, result)
            if damping > options.damping * 1.001:
                note = f"damping raised to {damping:g}, where H was not positive definite"
                network.notes.append(f"{layer.name}: {note}")
                result.note = "; ".join(filter(None, (note, result.note)))
        except (NotImplementedError, torch.linalg.LinAlgError) as error:
            result.note = f"rounded to nearest: {error}"
            network.notes.append(f"{layer.name}: {result.note}")
        result.seconds = time.perf_counter() - began
        finish(result)
        bar.set_postfix_str(in_brief(result))
    for result in unreached(calibration):
        network.notes.append(f"{result.name}: {result.note}")
        finish(result)
    return results


@torch.no_grad()
def input_moments(
    calibration: Calibration, index: int, stored: StoredWeight
) -> tuple[Tensor, Tensor]:
    """Mean of X X^T, (groups, n, n), and of X, (groups, n), over the inputs of a layer; float32.

    Args:
        calibration: of the network.
        index: of the layer in `calibration.layers`.
        stored: its weight.

    Raises:
        NotImplementedError: the layer is not a plain matrix product or convolution.
        ValueError: activations are NaN or infinite.
    """
    gram, total, count = None, None, 0
    for x, *_ in calibration.pairs(index):
        columns = joined(x).float()
        groups, n, positions = columns.shape
        if n * stored.rows != stored.count or stored.rows % groups:
            raise NotImplementedError("its product does not have the shape of its weight")
        if gram is None:
            gram = torch.zeros(groups, n, n, dtype=torch.float64, device=columns.device)
            total = torch.zeros(groups, n, dtype=torch.float64, device=columns.device)
        gram += columns @ columns.mT
        total += columns.sum(-1)
        count += positions
    if not gram.diagonal(dim1=-2, dim2=-1).isfinite().all():
        name = calibration.layers[index].name
        raise ValueError(f"inputs of {name} are NaN or infinite on the calibration inputs")
    return (gram / count).float(), (total / count).float()


@torch.no_grad()
def round_with_feedback(
    weight: Tensor, gram: Tensor, bits: int, options: OPTQ
) -> tuple[Tensor, Grid, float]:
    """Round the columns of a weight one after another, spreading each error over those left.

    Args:
        weight: (groups, rows, n) float32, groups of a convolution first.
        gram: (groups, n, n) float32, mean of X X^T. The factor 2 of the paper's H changes nothing.
        bits: width of a code.
        options: of the method.

    Returns:
        Codes (groups * rows, n) float32; their grids, one for each row or, with groups of columns,
        for each row of `split_groups`; and the damping that it took.

    Raises:
        torch.linalg.LinAlgError: the Gram matrix is not positive definite at any damping allowed.
    """
    groups, rows, n = weight.shape
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    unused = diagonal == 0  # inputs that are always zero
    weight = torch.where(unused[:, None], 0.0, weight)
    gram = gram + torch.diag_embed(unused.to(gram.dtype))
    if options.act_order:
        order = diagonal.argsort(dim=1, descending=True, stable=True)
        weight, gram = _by_column(weight, order), _by_column(gram, order)
        gram = _by_column(gram.mT, order)
    else:
        order = torch.arange(n, device=weight.device).expand(groups, n)
    factor, damping = feedback_factor(gram, options.damping)
    left = weight.permute(2, 0, 1).contiguous()  # columns first: the loop goes over them
    grids = _Grids(left, order, bits, options)
    found = torch.empty_like(left)
    for start, stop in grids.blocks():
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            grid = grids.at(i, left)
            column = left[i].reshape(-1, 1)
            codes = grid.codes(column)
            found[i] = codes.view_as(left[i])
            error = (column - grid.values(codes)).view_as(left[i]) / factor[:, i, i, None]
            errors[i - start] = error
            left[i + 1 : stop] -= factor[:, i, i + 1 : stop].T[..., None] * error
        rest = errors.permute(1, 2, 0) @ factor[:, start:stop, stop:]
        left[stop:] -= rest.permute(2, 0, 1)
    codes = _by_column(found.permute(1, 2, 0), order.argsort(1))
    return codes.reshape(-1, n), grids.all(), damping


def feedback_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Cholesky factor of the inverse of a damped Gram matrix.

    Args:
        gram: (groups, n, n) float32, symmetric.
        damping: relative to the mean diagonal; raised tenfold, for groups that need it, until they
            are positive definite.

    Returns:
        Upper triangular U (groups, n, n) with U^T U = (gram + ridge)^-1, and the largest damping.

    Raises:
        torch.linalg.LinAlgError: more than `MOST_DAMPING` would be needed.
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.full_like(mean, damping)
    while True:
        damped = gram + torch.diag_embed((ridge * mean)[:, None].expand(gram.shape[:2]))
        # The factor of the matrix with both axes reversed is that of the inverse, inverted.
        factor, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        failed = (failed > 0) | ~factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        if not failed.any():
            break
        ridge = torch.where(failed, 10 * ridge, ridge)
        if float(ridge.max()) > MOST_DAMPING * 1.001:  # ten times so many is not exact
            raise torch.linalg.LinAlgError(
                f"the Gram matrix of its inputs is not positive definite at damping "
                f"{float(ridge.max()) / 10:g}"
            )
    unit = torch.eye(gram.shape[-1], device=gram.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, unit, upper=False).flip(1, 2)
    return inverse, float(ridge.max())


class _Grids:
    """The grids of a weight, found in advance or when their first column is reached."""

    def __init__(self, left: Tensor, order: Tensor, bits: int, options: OPTQ) -> None:
        """Find those that do not depend on the order.

        Args:
            left: (n, groups, rows), columns in the order in which they are rounded.
            order: (groups, n) int64, place of each of them in the weight.
            bits: width of a code.
            options: kind of grid.
        """
        self.n, self.bits, self.order = len(left), bits, order
        self.rows = left.shape[2]
        self.size = group_size(self.n, options.group) or self.n
        self.rounding = options.rounding()
        self.static = options.act_order or self.size == self.n
        self.found: list[Grid] = []
        if self.static:
            weight = _by_column(left.permute(1, 2, 0), order.argsort(1)).reshape(-1, self.n)
            grid = self.rounding.grid(split_groups(weight, group_size(self.n, self.size)), bits)
            self.scale = grid.scale.view(len(weight), -1)
            self.zero = None if grid.zero is None else grid.zero.view(len(weight), -1)
            self.found = [grid]

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of columns that are rounded together; grids found late begin with a block."""
        size = self.n if self.static else self.size
        return [
            (start, min(start + BLOCK, first + size, self.n))
            for first in range(0, self.n, size)
            for start in range(first, min(first + size, self.n), BLOCK)
        ]

    def at(self, i: int, left: Tensor) -> Grid:
        """Grid of the i-th column in the order of rounding, (groups * rows, 1) scales."""
        if not self.static:
            if i % self.size == 0:
                columns = left[i : i + self.size].permute(1, 2, 0)
                columns = columns.reshape(-1, columns.shape[-1])
                self.found.append(self.rounding.grid(columns, self.bits))
            return self.found[-1]
        if self.size == self.n:
            return self.found[0]
        place = (self.order[:, i] // self.size).repeat_interleave(self.rows)[:, None]
        zero = None if self.zero is None else self.zero.gather(1, place)
        return Grid(self.scale.gather(1, place), zero, self.bits)

    def all(self) -> Grid:
        """Grids of all rows or, with groups of columns, of all rows of `split_groups`."""
        if self.static:
            return self.found[0]
        scale = torch.cat([grid.scale for grid in self.found], 1).view(-1, 1)
        if self.rounding.symmetric:
            return Grid(scale, None, self.bits)
        zero = torch.cat([grid.zero for grid in self.found], 1).view(-1, 1)
        return Grid(scale, zero, self.bits)


def _round_layer(
    stored: UniformWeight,
    weight: Tensor,
    moments: tuple[Tensor, Tensor],
    options: OPTQ,
    result: LayerResult,
) -> float:
    """Write the better of both roundings, and into `result` what came of it; the damping taken."""
    gram, mean = moments
    matrix = weight.detach().float().view(len(gram), -1, gram.shape[-1]).to(gram.device)
    outputs = ((matrix @ gram) * matrix).sum(-1) - (matrix @ mean[..., None])[..., 0].square()
    variance = max(float(outputs.double().sum()), 1e-30)

    def error(held: UniformWeight) -> float:
        wrong = held().to(gram.device).float().view_as(matrix) - matrix
        return float(((wrong @ gram) * wrong).double().sum()) / variance

    result.before = result.after = error(stored)
    codes, grid, damping = round_with_feedback(matrix, gram, stored.bits, options)
    found = grid.stored(codes, stored.shape, stored.dtype, group=stored.group)
    after = error(found)
    if not after < result.before:
        result.note = "no better on the calibration inputs: rounded to nearest"
        return damping
    result.after, result.kept = after, "learned"
    parts = dict(found.named_buffers())
    for name, part in stored.named_buffers():
        part.copy_(parts[name])
    norm = matrix.norm().clamp(min=1e-30)
    stored.relative_error = float((stored().float().view_as(matrix) - matrix).norm() / norm)
    return damping


def _by_column(values: Tensor, order: Tensor) -> Tensor:
    """Take the last dimension of (groups, rows, n) in an order (groups, n)."""
    return values.gather(2, order[:, None].expand(values.shape))

"""Uniform quantiser with a grid for each row, group of columns or tensor, shared by the methods.

A grid is kept as it will be stored: its scale is rounded to float16 and its zero point to an
integer before any weight is rounded to it, so that what is optimised is what is decoded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jlcm.clustering.scalar import FP16_MAX
from jlcm.uniform import UniformWeight

#: Range search: shrinking steps of one percent, and the exponent of the error (BRECQ's).
SHRINKS, NORM = 80, 2.4
#: Weights that the search works on at a time on a processor.
_BLOCK = 2**17


@dataclass(frozen=True)
class Grid:
    """Levels of a weight: (code - zero) * step, rows broadcast.

    Attributes:
        scale: (rows, 1) or (1, 1) float32, float16 values; the step times 2^(bits - 1).
        zero: of the same shape, integers below 2^bits; None where all are 2^(bits - 1).
        bits: width of a code.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int

    @property
    def step(self) -> Tensor:
        """Distance of neighbouring levels, as `scale`."""
        return self.scale / 2 ** (self.bits - 1)

    def position(self, weight: Tensor) -> Tensor:
        """Where weights lie on the scale of the codes, not rounded; zero where the step is zero."""
        step = self.step
        inside = torch.where(step > 0, weight / torch.where(step > 0, step, 1.0), 0.0)
        return inside + self.offset

    @property
    def offset(self) -> Tensor:
        """Zero points, as `scale`."""
        return torch.full_like(self.scale, 2 ** (self.bits - 1)) if self.zero is None else self.zero

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes, float32 integers of the weight's shape."""
        return self.position(weight).round().clamp(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """Levels of codes."""
        return (codes - self.offset) * self.step

    def stored(
        self,
        codes: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        group: int | None = None,
    ) -> UniformWeight:
        """Pack codes (rows, columns) on this grid; with `group`, on one for each of its rows."""
        return UniformWeight.encode(
            codes.to(torch.uint8),
            self.scale,
            shape=shape,
            bits=self.bits,
            zeros=None if self.zero is None else self.zero.to(torch.uint8),
            group=group,
            dtype=dtype,
        )


def as_rows(weight: Tensor) -> Tensor:
    """(rows, columns) float32 on the CPU."""
    return weight.detach().float().cpu().reshape(weight.shape[0], -1)


def group_size(columns: int, group: int | None) -> int | None:
    """Columns of a group in rows of so many; None where a group would be the whole row."""
    return None if group is None or group >= columns else group


def split_groups(matrix: Tensor, group: int | None) -> Tensor:
    """Groups of columns as rows of their own.

    Zeros fill up the last group of a row: every grid has a level there, so they change nothing.

    Args:
        matrix: (rows, columns).
        group: columns of a group, None for whole rows.

    Returns:
        (rows * groups, group), row after row.
    """
    if group is None:
        return matrix
    missing = -matrix.shape[1] % group
    return torch.nn.functional.pad(matrix, (0, missing)).reshape(-1, group)


def join_groups(values: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) of what `split_groups` made, without the zeros that were added."""
    return values.reshape(rows, -1)[:, :columns]


def min_max(
    matrix: Tensor,
    bits: int,
    *,
    per_row: bool = True,
    symmetric: bool = False,
    shrink: Tensor | float = 1,
) -> Grid:
    """Grid from the smallest to the largest value, zero included.

    Args:
        matrix: (rows, columns) float32.
        bits: width of a code.
        per_row: one grid for each row, or one for the tensor.
        symmetric: from minus to plus the largest magnitude, without zero points. Zero is a level,
            so the levels are half a step off the ends of that range.
        shrink: factor of both ends, a number or as many as there are grids.
    """
    values = matrix if per_row else matrix.reshape(1, -1)
    shrink = torch.as_tensor(shrink, device=matrix.device).reshape(-1, 1)
    low = values.amin(1, keepdim=True).clamp(max=0) * shrink
    high = values.amax(1, keepdim=True).clamp(min=0) * shrink
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = (high - low) / (2**bits - 1) * 2 ** (bits - 1)
    scale = scale.clamp(max=FP16_MAX).half().float()
    if symmetric:
        return Grid(scale, None, bits)
    step = scale / 2 ** (bits - 1)
    zero = torch.where(step > 0, (-low / torch.where(step > 0, step, 1.0)).round(), 0.0)
    return Grid(scale, zero.clamp(0, 2**bits - 1), bits)


def search(matrix: Tensor, bits: int, *, per_row: bool = True, symmetric: bool = False) -> Grid:
    """Grid whose range is shrunk until the error is least, grid by grid.

    The error is the sum of |W - Q(W)|^2.4 over 80 ranges from the whole down to a fifth of it, as
    in the public code of BRECQ (Li et al., 2021).

    Args:
        matrix: (rows, columns) float32.
        bits: width of a code.
        per_row: one grid for each row, or one for the tensor.
        symmetric: as in `min_max`.
    """
    kind = {"per_row": per_row, "symmetric": symmetric}
    few = max(len(matrix), 1)
    if per_row and matrix.device.type == "cpu":  # a few rows at a time, which its cache holds
        few = max(_BLOCK // max(matrix.shape[1], 1), 1)
    shrink = torch.cat([_best_shrink(rows, bits, **kind) for rows in matrix.split(few)])
    return min_max(matrix, bits, shrink=shrink, **kind)


def _best_shrink(matrix: Tensor, bits: int, *, per_row: bool, symmetric: bool) -> Tensor:
    """Factor of the range of each grid."""
    best = torch.ones(matrix.shape[0] if per_row else 1, device=matrix.device)
    least = torch.full_like(best, torch.inf)
    for i in range(SHRINKS):
        shrink = torch.full_like(best, 1 - i / 100)
        grid = min_max(matrix, bits, per_row=per_row, symmetric=symmetric, shrink=shrink)
        errors = (grid.values(grid.codes(matrix)) - matrix).abs().pow(NORM)
        errors = errors.sum(1) if per_row else errors.sum().view(1)
        better = errors < least
        best, least = torch.where(better, shrink, best), torch.where(better, errors, least)
    return best

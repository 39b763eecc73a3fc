"""Round to nearest: the simplest uniform quantisation, without data."""

from dataclasses import dataclass

from torch import Tensor

from jlcm.config import Invalid, check_choice
from jlcm.methods.grid import Grid, as_rows, group_size, join_groups, min_max, search, split_groups
from jlcm.methods.network import Network, per_weight
from jlcm.packed import StoredWeight
from jlcm.uniform import UniformWeight

RANGES = ("search", "min_max")


@dataclass(frozen=True, kw_only=True)
class RTN:
    """Options of round to nearest.

    Attributes:
        range: of a grid: "search" (least 2.4-norm of the error, BRECQ's) or "min_max".
        per_row: one grid for each output neuron, or one for the tensor.
        group: columns of a row that share a grid; None for the whole row.
        symmetric: grids around zero, without zero points.
    """

    range: str = "search"
    per_row: bool = True
    group: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        """Check the choices."""
        check_choice("range", self.range, RANGES)
        check_group(self.group)
        for name in ("per_row", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise Invalid(f"{name}={getattr(self, name)!r} must be true or false")
        if self.group is not None and not self.per_row:
            raise Invalid(f"group={self.group} divides rows: it needs per_row=true")

    def grid(self, matrix: Tensor, bits: int) -> Grid:
        """The grids of a matrix, one for each of its rows unless there is one for the tensor."""
        find = search if self.range == "search" else min_max
        return find(matrix, bits, per_row=self.per_row, symmetric=self.symmetric)


def check_group(group: int | None) -> None:
    """Refuse groups that are no number of columns."""
    if group is not None and (type(group) is not int or group < 1):
        raise Invalid(f"group={group!r} must be a number of columns, at least 1, or null")


def rtn(network: Network, options: RTN) -> dict[str, StoredWeight]:
    """Round every weight to the nearest level of its grid."""
    return per_weight(network, lambda weight, bits: rounded(weight, bits, options), "round")


def rounded(weight: Tensor, bits: int, options: RTN) -> UniformWeight:
    """A weight of any shape, rows first, rounded to nearest."""
    matrix = as_rows(weight)
    group = group_size(matrix.shape[1], options.group)
    parts = split_groups(matrix, group)
    grid = options.grid(parts, bits)
    codes = join_groups(grid.codes(parts), *matrix.shape)
    return grid.stored(codes, tuple(weight.shape), weight.dtype, group=group)

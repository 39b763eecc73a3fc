"""Round to nearest: the simplest uniform quantisation, without data."""

from dataclasses import dataclass

from jlcm.config import Invalid, check_choice
from jlcm.methods.grid import as_rows, min_max, search
from jlcm.methods.network import Network, per_weight
from jlcm.packed import StoredWeight

RANGES = ("search", "min_max")


@dataclass(frozen=True, kw_only=True)
class RTN:
    """Options of round to nearest.

    Attributes:
        range: of a grid: "search" (least 2.4-norm of the error, BRECQ's) or "min_max".
        per_row: one grid for each output neuron, or one for the tensor.
    """

    range: str = "search"
    per_row: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        check_choice("range", self.range, RANGES)
        if not isinstance(self.per_row, bool):
            raise Invalid(f"per_row={self.per_row!r} must be true or false")


def rtn(network: Network, options: RTN) -> dict[str, StoredWeight]:
    """Round every weight to the nearest level of its grid."""
    find = search if options.range == "search" else min_max

    def encode(weight, bits):
        matrix = as_rows(weight)
        grid = find(matrix, bits, per_row=options.per_row)
        return grid.stored(grid.codes(matrix), tuple(weight.shape), weight.dtype)

    return per_weight(network, encode, "round")

"""A weight as a sum: a stored weight, further terms for some rows, and sparse outliers.

The terms are REx's expansion (Yvinec et al., 2023), the outliers SqueezeLLM's and REx's sparse
correction. Outliers are stored as 16-bit differences and the gaps between their positions; where a
gap does not fit its bits, differences of zero are put in between, and all of it is counted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jlcm.packed import StoredWeight, nbytes
from jlcm.packing import pack, pack_integers, packed_bytes, unpack, unpack_integers
from jlcm.uniform import UniformWeight

VALUE_BITS = 16


class ExpandedWeight(StoredWeight):
    """A weight held as a sum; calling it decodes.

    Attributes:
        base: stored weight of the same shape.
        terms: uniform weights, each of the rows in its mask.
        masks: (terms, ceil(rows / 8)) uint8, one bit a row; None without terms.
        gaps: distances between outliers less one, packed; None without outliers.
        values: (outliers,) float16, added to the base at the outliers.
        gap_bits: width of a gap.
    """

    def __init__(
        self,
        base: StoredWeight,
        *,
        terms: Sequence[UniformWeight] = (),
        masks: Tensor | None = None,
        gaps: Tensor | None = None,
        values: Tensor | None = None,
        gap_bits: int = 0,
        relative_error: float = float("nan"),
    ) -> None:
        """Take the parts as they are stored; `expand` makes them from plain tensors.

        Raises:
            ValueError: if the parts do not fit together.
        """
        super().__init__(base.shape, base.bits, base.dtype, relative_error)
        self.base, self.terms, self.gap_bits = base, nn.ModuleList(terms), gap_bits
        self.register_buffer("masks", masks)
        self.register_buffer("gaps", gaps)
        self.register_buffer("values", values)
        self._check()

    def forward(self) -> Tensor:
        """Decode: `shape` tensor of `dtype`."""
        weight = self.base().float().reshape(self.rows, -1)
        for term, mask in zip(self.terms, self.row_masks(), strict=True):
            weight[mask] += term().float().reshape(term.rows, -1)
        if self.values is not None:
            weight.view(-1).index_add_(0, self.positions(), self.values.float())
        return weight.view(self.shape).to(self.dtype)

    def row_masks(self) -> list[Tensor]:
        """(rows,) bool of each term: which rows it has."""
        masks = [] if self.masks is None else self.masks
        return [unpack(mask, 1, self.rows).bool() for mask in masks]

    def positions(self) -> Tensor:
        """(outliers,) int64 flat positions, ascending."""
        gaps = unpack_integers(self.gaps, self.gap_bits, self.values.numel())
        return (gaps + 1).cumsum(0) - 1

    def describe(self) -> dict[str, Any]:
        """What the file says about it beside its buffers."""
        described = {"kind": "expanded"} | super().describe()
        described["base"] = self.base.describe()
        described["terms"] = [term.describe() for term in self.terms]
        return described | {"gap_bits": self.gap_bits}

    def sizes(self) -> dict[str, int]:
        """Bytes of all parts; masks of rows count as orders."""
        total: dict[str, int] = {
            "orders": nbytes(self.masks),
            "outliers": nbytes(self.gaps) + nbytes(self.values),
        }
        for part in (self.base, *self.terms):
            for name, size in part.sizes().items():
                total[name] = total.get(name, 0) + size
        return total

    def groups(self) -> tuple[int, int]:
        """Codebooks and scales of all parts."""
        counts = [part.groups() for part in (self.base, *self.terms)]
        return sum(books for books, _ in counts), sum(scales for _, scales in counts)

    def _check(self) -> None:
        masks = self.row_masks()
        if len(masks) != len(self.terms):
            raise ValueError(f"{len(masks)} masks of rows for {len(self.terms)} terms")
        for term, mask in zip(self.terms, masks, strict=True):
            if (int(mask.sum()), *self.shape[1:]) != term.shape:
                raise ValueError(f"a term of shape {term.shape} for {int(mask.sum())} rows")
        if (self.gaps is None) != (self.values is None):
            raise ValueError("outliers need gaps and values")
        if self.values is not None:
            expected = packed_bytes(self.values.numel(), self.gap_bits)
            if self.gaps.numel() != expected:
                raise ValueError(f"gaps have {self.gaps.numel()} bytes, {expected} expected")
            if self.values.numel() and int(self.positions()[-1]) >= self.count:
                raise ValueError("an outlier lies outside the weight")


def expand(
    base: StoredWeight,
    *,
    terms: Sequence[tuple[Tensor, UniformWeight]] = (),
    positions: Tensor | None = None,
    differences: Tensor | None = None,
) -> ExpandedWeight:
    """Add terms and outliers to a stored weight.

    Args:
        base: stored weight.
        terms: each (rows,) bool and a uniform weight of these rows.
        positions: (outliers,) int64 flat positions, ascending and distinct; None for no outliers.
        differences: (outliers,) what is added there, rounded to float16.

    Raises:
        ValueError: if a size does not fit.
    """
    masks = [pack(mask.int(), 1) for mask, _ in terms]
    sparse: dict[str, Any] = {}
    if positions is not None and positions.numel():
        width = gap_width(positions)
        spread, values = _fill_gaps(positions, differences.to(torch.float16), width)
        gaps = spread.diff(prepend=spread.new_full((1,), -1)) - 1
        sparse = {"gaps": pack_integers(gaps, width), "values": values, "gap_bits": width}
    return ExpandedWeight(
        base,
        terms=[term for _, term in terms],
        masks=torch.stack(masks) if masks else None,
        **sparse,
    )


def gap_width(positions: Tensor) -> int:
    """Bits of a gap that make these outliers smallest."""
    gaps = positions.diff(prepend=positions.new_full((1,), -1)) - 1
    most = max(int(gaps.max()).bit_length(), 1)
    return min(range(1, most + 1), key=lambda width: _outlier_bits(gaps, width))


def outlier_bytes(positions: Tensor) -> int:
    """Bytes that outliers at these flat positions take."""
    gaps = positions.diff(prepend=positions.new_full((1,), -1)) - 1
    bits = _outlier_bits(gaps, gap_width(positions))
    count = bits // (VALUE_BITS + gap_width(positions))
    return 2 * count + packed_bytes(count, gap_width(positions))


def _outlier_bits(gaps: Tensor, width: int) -> int:
    entries = gaps.numel() + int((gaps >> width).sum())
    return entries * (VALUE_BITS + width)


def _fill_gaps(positions: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Put zeros where a gap is too wide, each 2^width after the one before."""
    before = torch.cat([positions.new_full((1,), -1), positions[:-1]])
    fillers = (positions - before - 1) >> width
    owner = torch.arange(len(positions)).repeat_interleave(fillers)
    first = fillers.cumsum(0) - fillers
    step = torch.arange(int(fillers.sum())) - first[owner] + 1
    filled = torch.cat([positions, before[owner] + (step << width)])
    order = filled.argsort()
    return filled[order], torch.cat([values, values.new_zeros(len(owner))])[order]

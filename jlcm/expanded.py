"""A weight as a sum: a stored weight, further terms for some rows, and sparse outliers.

The terms are REx's expansion (Yvinec et al., 2023), the outliers SqueezeLLM's and REx's sparse
correction. Outliers are stored as 16-bit differences and the gaps between their positions; where a
gap does not fit its bits, differences of zero are put in between, and all of it is counted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jlcm.clustering.scalar import FP16_MAX
from jlcm.packed import StoredWeight, nbytes
from jlcm.packing import pack, pack_integers, packed_bytes, unpack, unpack_integers
from jlcm.uniform import UniformWeight

VALUE_BITS = 16


class ExpandedWeight(StoredWeight):
    """A weight held as a sum; calling it decodes.

    Its parts decode to float32 and the sum is rounded to `dtype` once: a narrower type would lose
    the later terms.

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

        The sum has the dtype of `base`, which decodes to float32 from then on.

        Raises:
            ValueError: if the parts do not fit together.
        """
        super().__init__(base.shape, base.bits, base.dtype, relative_error)
        self.base, self.terms, self.gap_bits = base, nn.ModuleList(terms), gap_bits
        self._decode_parts_to_float32()
        self.register_buffer("masks", masks)
        self.register_buffer("gaps", gaps)
        self.register_buffer("values", values)
        self.check()

    def forward(self) -> Tensor:
        """Decode: `shape` tensor of `dtype`."""
        weight = self.base().view(self.rows, -1)
        for term, mask in zip(self.terms, self.row_masks(), strict=True):
            weight[mask] += term().view(term.rows, -1)
        if self.values is not None:
            weight.view(-1).index_add_(0, self.positions(), self.values.float())
        return weight.view(self.shape).to(self.dtype)

    @property
    def order(self) -> Tensor | None:
        """Packed row order of the base, None without."""
        return getattr(self.base, "order", None)

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

    def _apply(self, fn, recurse=True):
        super()._apply(fn)
        self._decode_parts_to_float32()
        return self

    def _decode_parts_to_float32(self) -> None:
        for part in (self.base, *self.terms):
            part.dtype = torch.float32

    def check(self) -> None:
        """Raise ValueError if its parts do not fit together."""
        if self.masks is not None and (self.masks.dim() != 2 or self.masks.dtype != torch.uint8):
            raise ValueError("masks of rows must be (terms, bytes) uint8")
        if (self.gaps is None) != (self.values is None):
            raise ValueError("outliers need gaps and values")
        if any(held.is_meta for held in self.buffers(recurse=False)):
            return  # sizes depend on values
        masks = self.row_masks()
        if len(masks) != len(self.terms):
            raise ValueError(f"{len(masks)} masks of rows for {len(self.terms)} terms")
        for term, mask in zip(self.terms, masks, strict=True):
            if not mask.any() or (int(mask.sum()), *self.shape[1:]) != term.shape:
                raise ValueError(f"a term of shape {term.shape} for {int(mask.sum())} rows")
        if self.values is not None:
            self._check_outliers()

    def _check_outliers(self) -> None:
        if self.gaps.dtype != torch.uint8 or self.values.dtype != torch.float16:
            raise ValueError("gaps must be uint8 and values float16")
        # A gap needs no more bits than a position, so that their sums do not overflow either.
        if not 1 <= self.gap_bits <= max(self.count.bit_length(), 1):
            raise ValueError(f"gaps of {self.gap_bits} bits in a weight of {self.count} values")
        expected = packed_bytes(self.values.numel(), self.gap_bits)
        if self.values.dim() != 1 or self.gaps.numel() != expected:
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
        base: stored weight; it becomes a part of the sum.
        terms: each (rows,) bool and a uniform weight of these rows, at least one.
        positions: (outliers,) int64 flat positions, ascending and distinct; None for no outliers.
        differences: (outliers,) what is added there, rounded to float16.

    Raises:
        ValueError: if a size does not fit, or positions do not ascend.
    """
    masks = [pack(mask.int(), 1) for mask, _ in terms]
    sparse: dict[str, Any] = {}
    if positions is not None and positions.numel():
        if differences is None or differences.shape != positions.shape or positions.dim() != 1:
            raise ValueError("each outlier needs one position and one difference")
        if int(_gaps(positions).min()) < 0:
            raise ValueError("positions of outliers must ascend from 0 or more")
        width = gap_width(positions)
        values = differences.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
        spread, values = _fill_gaps(positions, values, width)
        sparse = {"gaps": pack_integers(_gaps(spread), width), "values": values, "gap_bits": width}
    return ExpandedWeight(
        base,
        terms=[term for _, term in terms],
        masks=torch.stack(masks) if masks else None,
        **sparse,
    )


def gap_width(positions: Tensor) -> int:
    """Bits of a gap, at least 1, that make outliers at these (n,) ascending positions smallest."""
    return _best_width(_gaps(positions))[0] if positions.numel() else 1


def outlier_bytes(positions: Tensor) -> int:
    """Bytes that outliers at these (n,) ascending flat positions take, zeros in gaps included."""
    if not positions.numel():
        return 0
    width, entries = _best_width(_gaps(positions))
    return packed_bytes(entries, VALUE_BITS) + packed_bytes(entries, width)


def largest_outliers(gains: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Where sparse corrections of several tensors help most, within bytes that they share.

    Args:
        gains: what correcting a weight gains, not negative, any shape; zeros are left out.
        budget: bytes for values and gaps, together.

    Returns:
        For each tensor (n,) int64 flat positions on the CPU, ascending: as many of the largest
        gains as fit.
    """
    flat = [gain.detach().float().cpu().reshape(-1) for gain in gains]
    together = torch.cat(flat)
    sizes = torch.tensor([part.numel() for part in flat])
    starts = sizes.cumsum(0) - sizes
    # Even with gaps of one bit no more would fit.
    most = min(8 * max(budget, 0) // (VALUE_BITS + 1), int((together > 0).sum()))
    descending = together.topk(most).indices

    def positions(count: int) -> list[Tensor]:
        chosen = descending[:count].sort().values
        parts = chosen.tensor_split(torch.searchsorted(chosen, starts[1:]))
        return [part - start for part, start in zip(parts, starts, strict=True)]

    # One more outlier never takes fewer bytes: at best it replaces a zero put in a gap.
    fits, fails = 0, most + 1
    while fails - fits > 1:
        count = (fits + fails) // 2
        if sum(map(outlier_bytes, positions(count))) <= budget:
            fits = count
        else:
            fails = count
    return positions(fits)


def _gaps(positions: Tensor) -> Tensor:
    """Distances to the position before less one; the first from the start."""
    return positions.diff(prepend=positions.new_full((1,), -1)) - 1


def _best_width(gaps: Tensor) -> tuple[int, int]:
    """Width of a gap and number of entries, zeros in between included, that take fewest bits."""
    most = max(int(gaps.max()).bit_length(), 1)
    entries = {w: gaps.numel() + int((gaps >> w).sum()) for w in range(1, most + 1)}
    return min(entries.items(), key=lambda item: item[1] * (VALUE_BITS + item[0]))


def _fill_gaps(positions: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Put zeros where a gap is too wide, each 2^width after the one before."""
    before = torch.cat([positions.new_full((1,), -1), positions[:-1]])
    fillers = (positions - before - 1) >> width
    owner = torch.arange(len(positions), device=positions.device).repeat_interleave(fillers)
    first = fillers.cumsum(0) - fillers
    step = torch.arange(len(owner), device=positions.device) - first[owner] + 1
    filled = torch.cat([positions, before[owner] + (step << width)])
    order = filled.argsort()
    return filled[order], torch.cat([values, values.new_zeros(len(owner))])[order]

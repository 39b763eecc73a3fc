"""A packed weight taken apart: codes, codebooks and scales as plain tensors.

Tensors are laid out as in `objective`: (groups, rows, n), rows in the order of the weight, not of
the packed one.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jlcm.packed import PackedWeight
from jlcm.packing import pack
from jlcm.trellis import index_of


@dataclass(frozen=True)
class Factors:
    """A packed weight taken apart.

    Attributes:
        codes: (groups, rows, n) int64 index of the codeword in its codebook: the code, or with
            memory the code and those before it.
        codebooks: (books, k) float32, each row ascending unless there is memory.
        book: (groups, rows, n) int64 index of the codebook, None if there is one.
        scales: (scales,) float32, or None.
        scale: (groups, rows, n) int64 index of the scale, None without scales or with one.
        row_scale: (groups, rows) float32, absorbed by the norm that follows, or None.
        memory: bits of the codes before a weight's that choose its codeword too (`jlcm.trellis`).
    """

    codes: Tensor
    codebooks: Tensor
    book: Tensor | None
    scales: Tensor | None
    scale: Tensor | None
    row_scale: Tensor | None
    memory: int = 0

    def entries(self) -> Tensor:
        """(groups, rows, n) index of each weight's codeword in all codebooks written in a row."""
        k = self.codebooks.shape[1]
        return self.codes if self.book is None else self.book * k + self.codes

    def codewords(self) -> Tensor:
        """(groups, rows, n) codewords before scaling."""
        return self.codebooks.view(-1)[self.entries()]

    def multiplier(self) -> Tensor:
        """What codewords are multiplied by, broadcasting against (groups, rows, n)."""
        factor = self.codebooks.new_ones(1, 1, 1)
        if self.scales is not None:
            factor = self.scales.view(1, 1, 1) if self.scale is None else self.scales[self.scale]
        return factor if self.row_scale is None else factor * self.row_scale[..., None]

    def weight(self) -> Tensor:
        """(groups, rows, n) the decoded weight, row scales included."""
        return self.codewords() * self.multiplier()

    def rounded(self) -> "Factors":
        """Codebooks ascending and, like scales, rounded to float16 as they are stored."""
        scales = None if self.scales is None else _to_half(self.scales)
        if self.memory:
            return replace(self, codebooks=_to_half(self.codebooks), scales=scales)
        books, order = self.codebooks.sort(dim=1, stable=True)
        rank = order.argsort(1).view(-1)
        return replace(self, codes=rank[self.entries()], codebooks=_to_half(books), scales=scales)


def _to_half(values: Tensor) -> Tensor:
    return values.clamp(-65504, 65504).half().float()


def unpack_factors(packed: PackedWeight, groups: int) -> Factors:
    """Take a packed weight apart, rows back in the order of the weight."""
    rows, order = packed.rows, packed.row_order()

    def natural(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        values = values.view(rows, -1)
        if order is not None:
            values = torch.empty_like(values).index_copy_(0, order, values)
        return values.view(groups, rows // groups, -1)

    scale = None
    if packed.scales is not None and packed.scales.numel() > 1:
        count = packed.scales.numel()
        position = torch.arange(packed.count, device=packed.codes.device)
        scale = position * count // packed.count
    codes = index_of(packed.unpack_codes().view(rows, -1), packed.bits, packed.memory)
    return Factors(
        codes=natural(codes.long()),
        codebooks=packed.codebooks.float(),
        book=natural(packed.codebook_index()),
        scales=None if packed.scales is None else packed.scales.float(),
        scale=natural(scale),
        row_scale=None,
        memory=packed.memory,
    )


def pack_factors(packed: PackedWeight, factors: Factors) -> dict[str, Tensor]:
    """Codes, codebooks and scales as `packed` stores them, without the row scales."""
    factors = factors.rounded()
    codes, order = factors.codes.reshape(packed.rows, -1), packed.row_order()
    codes = (codes if order is None else codes[order]) & (2**packed.bits - 1)
    parts = {"codes": pack(codes.reshape(-1), packed.bits), "codebooks": factors.codebooks.half()}
    if factors.scales is not None:
        parts["scales"] = factors.scales.half()
    return parts


def by_column(values: Tensor) -> Tensor:
    """(groups, rows, n) to a contiguous (n, groups, rows)."""
    return values.permute(2, 0, 1).contiguous()

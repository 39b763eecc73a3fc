"""Weights on a uniform grid, or on a power of one: what the compared methods store.

With b bits, code q and zero point z, a weight is scale * sign(g) * |g|^(1 / power), where
g = (q - z) / 2^(b - 1). The scale is thus as large as the weights, where float16 is precise. There
is one scale for the tensor, for each row, or for each group of consecutive columns of a row.
"""

from typing import Any

import torch
from torch import Tensor

from jlcm.packed import StoredWeight, nbytes
from jlcm.packing import pack, packed_bytes, unpack


class UniformWeight(StoredWeight):
    """A weight held as codes, scales and zero points; calling it decodes.

    Attributes:
        codes: (ceil(N * bits / 8),) uint8.
        scales: (1,), (rows,) or, with groups, (rows * groups,) float16, row after row.
        zeros: zero points, as many as scales, packed like codes; None where all are 2^(bits - 1).
        power: (1,) float16, or None for a uniform grid.
        group: columns of a group, of which the last may have fewer; None without groups.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        bits: int,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        power: Tensor | None = None,
        group: int | None = None,
        dtype: torch.dtype = torch.float32,
        relative_error: float = float("nan"),
    ) -> None:
        """Take the parts as they are stored; `encode` makes them from plain tensors.

        Raises:
            ValueError: if the parts do not fit together.
        """
        super().__init__(shape, bits, dtype, relative_error)
        self.group = group
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("power", power)
        self.check()

    @classmethod
    def encode(
        cls,
        codes: Tensor,
        scales: Tensor,
        *,
        shape: tuple[int, ...],
        bits: int,
        zeros: Tensor | None = None,
        power: float | None = None,
        group: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "UniformWeight":
        """Pack plain codes.

        Args:
            codes: N integers below 2**bits, rows one after another.
            scales: one for each group, one for each row, or one, rounded to float16.
            shape: of the weight.
            bits: width of a code and of a zero point.
            zeros: integers below 2**bits, as many as scales; None for 2^(bits - 1).
            power: exponent; None for a uniform grid.
            group: columns of a group; None without groups.
            dtype: of the decoded weight.

        Raises:
            ValueError: if a code or a zero point does not fit, or the sizes do not.
        """
        return cls(
            shape=shape,
            bits=bits,
            codes=pack(codes.reshape(-1), bits),
            scales=scales.reshape(-1).to(torch.float16),
            zeros=None if zeros is None else pack(zeros.reshape(-1), bits),
            power=None if power is None else torch.tensor([power], dtype=torch.float16),
            group=group,
            dtype=dtype,
        )

    def unpack_codes(self) -> Tensor:
        """(N,) uint8 codes."""
        return unpack(self.codes, self.bits, self.count)

    def zero_points(self) -> Tensor:
        """(scales,) float32 zero points."""
        if self.zeros is None:
            return torch.full_like(self.scales, 2 ** (self.bits - 1), dtype=torch.float32)
        return unpack(self.zeros, self.bits, self.scales.numel()).float()

    def forward(self) -> Tensor:
        """Decode: `shape` tensor of `dtype`."""
        scales, zeros = self._spread(self.scales.float()), self._spread(self.zero_points())
        codes = self.unpack_codes().view(len(scales), -1)
        values = (codes.float() - zeros) / 2 ** (self.bits - 1)
        if self.power is not None:
            values = values.sign() * values.abs() ** (1 / self.power.float())
        values *= scales
        return values.view(self.shape).to(self.dtype)

    def describe(self) -> dict[str, Any]:
        """What the file says about it beside its buffers."""
        described = {"kind": "uniform"} | super().describe()
        return described if self.group is None else described | {"group": self.group}

    def sizes(self) -> dict[str, int]:
        """Bytes of the codes; zero points and the power count as scales."""
        return {
            "codes": nbytes(self.codes),
            "scales": nbytes(self.scales) + nbytes(self.zeros) + nbytes(self.power),
        }

    def groups(self) -> tuple[int, int]:
        """Codebooks (none) and scales."""
        return 0, self.scales.numel()

    def _spread(self, values: Tensor) -> Tensor:
        """One value for each scale, in a shape that broadcasts against the codes."""
        columns = self.count // max(self.rows, 1)
        if self.group is None or columns % self.group == 0:
            return values[:, None]
        # The last group of a row is shorter than the others.
        return values.view(self.rows, -1).repeat_interleave(self.group, 1)[:, :columns]

    def check(self) -> None:
        """Raise ValueError if its parts do not fit together."""
        if self.codes is None or self.scales is None or self.scales.dim() != 1:
            raise ValueError("a uniform weight needs codes and scales")
        expected = packed_bytes(self.count, self.bits)
        if self.codes.numel() != expected:
            raise ValueError(f"codes have {self.codes.numel()} bytes, {expected} expected")
        if self.group is None and self.scales.numel() not in (1, self.rows):
            raise ValueError(f"{self.scales.numel()} scales for {self.rows} rows")
        if self.group is not None:
            self._check_groups()
        zeros = packed_bytes(self.scales.numel(), self.bits)
        if self.zeros is not None and self.zeros.numel() != zeros:
            raise ValueError(f"zero points have {self.zeros.numel()} bytes, {zeros} expected")
        if self.power is not None and self.power.numel() != 1:
            raise ValueError(f"{self.power.numel()} powers for one grid")
        has_value = self.power is not None and not self.power.is_meta
        if has_value and not 0 < self.power.item() < float("inf"):
            raise ValueError(f"a power of {self.power.item()}")

    def _check_groups(self) -> None:
        columns = self.count // max(self.rows, 1)
        if type(self.group) is not int or not 1 <= self.group < columns:
            raise ValueError(f"groups of {self.group} columns in rows of {columns}")
        groups = -(-columns // self.group)
        if self.scales.numel() != self.rows * groups:
            raise ValueError(
                f"{self.scales.numel()} scales for {self.rows} rows of {groups} groups"
            )

"""One packed tensor type for every encoding with codebooks.

A weight W of n_o rows (output neurons) is stored as fixed-width codes, one or several codebooks
and, optionally, scales and an order of its rows. Which codebook and which scale serve a weight
follows from its position, so no index of them is stored (Eq. 2 and 4). The encodings of the paper
are presets:

| encoding       | codebooks        | scales           |
|----------------|------------------|------------------|
| multi-scale    | one              | s flat groups    |
| multi-codebook | k flat groups    | none             |
| one per row    | n_o flat groups  | none             |
| tiles (LUT-B)  | rows x cols each | none             |
| trellis        | one, with memory | s flat groups    |

Flat groups: group(p) = floor(p * k / N) for position p of the re-ordered rows written one after
another. With k < n_o a group spans rows, with k > n_o a row holds several groups. Any of them may
encode the rows of W R in place of W's, R a rotation that follows from the number of columns. With
memory the codes before a weight's choose its codeword too (`jlcm.trellis`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from jlcm.packing import order_bytes, pack, pack_order, packed_bytes, unpack, unpack_order
from jlcm.rotation import unrotate
from jlcm.trellis import index_of

#: More threads of torch decode codes with memory faster than the one of `jlcm.trellis_kernel`.
_MOST_THREADS = 4


def group_sizes(count: int, groups: int) -> Tensor:
    """Lengths of flat groups: (groups,) int64, summing to `count`; none is empty."""
    starts = -(-torch.arange(groups + 1, dtype=torch.int64) * count // groups)  # ceil(g * N / k)
    return starts.diff()


def tile_grid(n_o: int, n_i: int, tile: tuple[int, int]) -> tuple[int, int]:
    """How many tiles of (rows, cols) cover an (n_o, n_i) matrix, down and across."""
    return -(-n_o // tile[0]), -(-n_i // tile[1])


def tile_index(
    n_o: int, n_i: int, tile: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """(n_o, n_i) int64: which tile each weight lies in, numbered row by row."""
    _, across = tile_grid(n_o, n_i, tile)
    down = torch.arange(n_o, device=device) // tile[0]
    return down[:, None] * across + torch.arange(n_i, device=device) // tile[1]


def nbytes(tensor: Tensor | None) -> int:
    """Bytes of a tensor's elements."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def apply_to_bytes(module: nn.Module, fn) -> nn.Module:
    """`Module._apply` for stored buffers: moves them, never changes their dtype."""
    for name, stored in module.named_buffers(recurse=False):
        content = stored.reshape(-1).view(torch.uint8)  # flat, because a scalar has no byte view
        moved = fn(content)
        if moved.dtype != torch.uint8:  # Module.type() converts every dtype
            moved = content.to(moved.device)
        setattr(module, name, moved.view(stored.dtype).view(stored.shape))
    return module


class StoredWeight(nn.Module):
    """A weight held in few bits; calling it decodes. What is stored are its buffers.

    Attributes:
        shape: shape of the weight; the first dimension counts the rows.
        bits: width of a code, 1 to 8.
        dtype: floating dtype of the decoded weight.
        relative_error: ||decoded - W|| / ||W|| (Frobenius) when it was encoded, nan if unknown.
    """

    def __init__(
        self, shape: tuple[int, ...], bits: int, dtype: torch.dtype, relative_error: float
    ) -> None:
        """Keep what every kind has."""
        super().__init__()
        self.shape, self.bits = tuple(shape), bits
        self.dtype, self.relative_error = dtype, relative_error

    @property
    def count(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    @property
    def rows(self) -> int:
        """Number of output neurons."""
        return self.shape[0]

    def check(self) -> None:
        """Raise ValueError if its parts do not fit together; on the meta device by sizes alone."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What the file says about it beside its buffers."""
        described: dict[str, Any] = {"shape": self.shape, "bits": self.bits}
        if self.relative_error == self.relative_error:  # JSON has no nan
            described["relative_error"] = float(f"{self.relative_error:.6g}")
        return described

    def sizes(self) -> dict[str, int]:
        """Bytes by what they hold: codes, codebooks, scales, orders, outliers."""
        raise NotImplementedError

    def groups(self) -> tuple[int, int]:
        """How many codebooks and scales it has."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        # model.half() or model.float() chooses the dtype that weights are decoded to. What is
        # stored keeps its own: seen as bytes it only moves between devices.
        anchor = next(self.buffers())
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=anchor.device)).dtype
        for child in self.children():
            child._apply(fn)
        return apply_to_bytes(self, fn)


class PackedWeight(StoredWeight):
    """A weight held as codes and codebooks; calling it decodes.

    Attributes:
        bits: width of a code; a codebook has at most 2**(bits + memory) codewords.
        tile: (rows, cols) where codebooks belong to tiles, None for flat groups.
        rotated: whether rows are encoded in the basis of `jlcm.rotation`.
        memory: bits of the codes before a weight's that choose its codeword too (`jlcm.trellis`).
        codes: (ceil(N * bits / 8),) uint8.
        codebooks: (groups, codewords) float16, each row ascending unless there is memory.
        scales: (groups,) float16, or None.
        order: packed row order, uint8, or None; packed row r is row order[r] of the weight.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        bits: int,
        codes: Tensor,
        codebooks: Tensor,
        scales: Tensor | None = None,
        order: Tensor | None = None,
        tile: tuple[int, int] | None = None,
        rotated: bool = False,
        memory: int = 0,
        dtype: torch.dtype = torch.float32,
        relative_error: float = float("nan"),
    ) -> None:
        """Take the parts as they are stored; `encode` makes them from plain tensors.

        Raises:
            ValueError: if the parts do not fit together.
        """
        super().__init__(shape, bits, dtype, relative_error)
        self.tile, self.rotated = None if tile is None else tuple(tile), rotated
        self.memory = memory
        self.register_buffer("codes", codes)
        self.register_buffer("codebooks", codebooks)
        self.register_buffer("scales", scales)
        self.register_buffer("order", order)
        self.check()

    @classmethod
    def encode(
        cls,
        codes: Tensor,
        codebooks: Tensor,
        *,
        shape: tuple[int, ...],
        bits: int,
        scales: Tensor | None = None,
        order: Tensor | None = None,
        **options,
    ) -> "PackedWeight":
        """Pack plain codes.

        Args:
            codes: (N,) integers below 2**bits, of the re-ordered rows one after another.
            codebooks: (groups, codewords), rounded to float16.
            shape: of the weight.
            bits: width of a code.
            scales: (groups,), rounded to float16.
            order: (n_o,) int64.
            options: tile, rotated, memory, dtype, relative_error.

        Raises:
            ValueError: if a code has no codeword, or the parts do not fit together.
        """
        if codes.numel() and int(codes.max()) >= codebooks.shape[-1]:
            raise ValueError(
                f"code {int(codes.max())} has no codeword in codebooks of {codebooks.shape[-1]}"
            )
        return cls(
            shape=shape,
            bits=bits,
            codes=pack(codes, bits),
            codebooks=codebooks.to(torch.float16),
            scales=None if scales is None else scales.to(torch.float16),
            order=None if order is None else pack_order(order),
            **options,
        )

    def describe(self) -> dict[str, Any]:
        """What the file says about it beside its buffers."""
        kind = {"kind": "rotated"} if self.rotated else {}
        layout = {"tile": self.tile, "memory": self.memory or None}
        return super().describe() | kind | {k: v for k, v in layout.items() if v is not None}

    def sizes(self) -> dict[str, int]:
        """Bytes of codes, codebooks, scales and the order of the rows."""
        return {
            "codes": nbytes(self.codes),
            "codebooks": nbytes(self.codebooks),
            "scales": nbytes(self.scales),
            "orders": nbytes(self.order),
        }

    def groups(self) -> tuple[int, int]:
        """How many codebooks and scales it has."""
        return self.codebooks.shape[0], 0 if self.scales is None else self.scales.numel()

    def unpack_codes(self) -> Tensor:
        """(N,) uint8 codes of the re-ordered rows."""
        return unpack(self.codes, self.bits, self.count)

    def row_order(self) -> Tensor | None:
        """(n_o,) int64 order of the rows, None where they keep their place."""
        return None if self.order is None else unpack_order(self.order, self.rows)

    def codebook_index(self) -> Tensor | None:
        """(N,) int64 index of each weight's codebook, None if there is one."""
        groups = self.codebooks.shape[0]
        if groups == 1:
            return None
        if self.tile is not None:
            matrix = self.rows, self.count // self.rows
            return tile_index(*matrix, self.tile, device=self.codebooks.device).view(-1)
        index = torch.arange(groups, device=self.codebooks.device)
        return index.repeat_interleave(group_sizes(self.count, groups).to(index.device))

    def scale_per_weight(self) -> Tensor | None:
        """Float32 scales that broadcast against (N,), None without scales."""
        if self.scales is None:
            return None
        sizes = group_sizes(self.count, self.scales.numel()).to(self.scales.device)
        return self.scales.float().repeat_interleave(sizes)

    def codeword_index(self) -> Tensor:
        """(N,) int32 index of each weight's codeword in all codebooks written in a row."""
        codes = self.unpack_codes().view(self.rows, -1)
        index = index_of(codes, self.bits, self.memory).view(-1)
        codebook = self.codebook_index()
        if codebook is not None:
            index += (codebook * self.codebooks.shape[1]).int()
        return index

    def codeword_per_weight(self) -> Tensor:
        """(N,) float32 codewords of the re-ordered rows, before scaling."""
        return self.codebooks.float().view(-1).index_select(0, self.codeword_index())

    def encoded_rows(self) -> Tensor:
        """(rows, columns) float32, decoded (Eq. 1, 2 and 4) but rotated if they were encoded so."""
        if self.memory and self.codes.is_cpu and torch.get_num_threads() <= _MOST_THREADS:
            values = self._decode_on_cpu()
        else:
            values = self.codeword_per_weight()
            scales = self.scale_per_weight()
            if scales is not None:
                values *= scales
        values = values.view(self.rows, -1)
        order = self.row_order()
        if order is not None:
            values = torch.empty_like(values).index_copy_(0, order, values)
        return values

    def forward(self) -> Tensor:
        """Decode: `shape` tensor of `dtype`."""
        values = self.encoded_rows()
        if self.rotated:
            values = unrotate(values)
        return values.view(self.shape).to(self.dtype)

    def _decode_on_cpu(self) -> Tensor:
        """(N,) float32, scaled codewords of the re-ordered rows of a weight with memory."""
        from jlcm.trellis_kernel import decode_on_cpu  # numba takes half a second to import

        codebook = self.codebooks.float().view(-1)
        return decode_on_cpu(
            self.codes,
            codebook,
            codebook.new_ones(1) if self.scales is None else self.scales.float(),
            rows=self.rows,
            count=self.count,
            bits=self.bits,
        )

    def extra_repr(self) -> str:
        """Shape, bits and group counts, for printing."""
        scales = 0 if self.scales is None else self.scales.numel()
        return (
            f"shape={self.shape}, bits={self.bits}, codebooks={self.codebooks.shape[0]}, "
            f"scales={scales}, stored_order={self.order is not None}, rotated={self.rotated}, "
            f"memory={self.memory}"
        )

    def check(self) -> None:
        """Raise ValueError if its parts do not fit together."""
        if self.codes is None or self.codebooks is None or self.codebooks.dim() != 2:
            raise ValueError("a packed weight needs codes and (groups, codewords) codebooks")
        groups, codewords = self.codebooks.shape
        expected = packed_bytes(self.count, self.bits)
        if self.codes.numel() != expected:
            raise ValueError(f"codes have {self.codes.numel()} bytes, {expected} expected")
        full = 1, 2 ** (self.bits + self.memory)
        if self.memory < 0 or (self.memory and (groups, codewords) != full):
            raise ValueError(f"{groups} codebooks of {codewords} for {self.memory} bits of memory")
        if not 1 <= codewords <= 2 ** (self.bits + self.memory):
            raise ValueError(f"a codebook of {codewords} codewords does not fit {self.bits} bits")
        if self.tile is not None:
            down, across = tile_grid(self.rows, self.count // self.rows, self.tile)
            if groups != down * across:
                raise ValueError(f"{groups} codebooks for {down * across} tiles")
        elif not 1 <= groups <= max(self.count, 1):
            raise ValueError(f"{groups} codebooks for {self.count} weights")
        if self.scales is not None and not 1 <= self.scales.numel() <= max(self.count, 1):
            raise ValueError(f"{self.scales.numel()} scales for {self.count} weights")
        if self.order is not None and self.order.numel() != order_bytes(self.rows):
            raise ValueError(f"row order has {self.order.numel()} bytes")

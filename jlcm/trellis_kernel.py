"""Codes with memory on CPUs: Viterbi's algorithm and decoding, compiled on first use (numba).

In the search a few sequences run side by side, so that their costs fill vector registers and stay
in the nearest cache; decoding makes each weight in one pass over its codes. Both are several times
as fast as a thread of torch with whole tensors, which GPUs prefer.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

#: Sequences side by side. Loops over as few as 16 are unrolled before they could be vectorised.
_SIDE_BY_SIDE = 128
#: Sequences that are worth a thread of their own.
_LEAST_IN_THREAD = 4 * _SIDE_BY_SIDE
#: Cost of what cannot be, far above that of what can.
_NEVER = np.float32(1e30)


def best_path_on_cpu(
    values: Tensor,
    codebook: Tensor,
    memory: int,
    weights: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
) -> Tensor:
    """As `jlcm.trellis.best_path`, in as many threads as torch computes in."""
    n, count = values.shape
    weights = torch.ones_like(values) if weights is None else weights
    before = torch.zeros(count, dtype=torch.int64) if before is None else before
    after = torch.empty(0, count, dtype=torch.int64) if after is None else after
    found = torch.empty(n, count, dtype=torch.int64)
    tensors = (weights, weights * values, codebook.square(), 2 * codebook, before, after, found)
    arrays = [tensor.contiguous().numpy() for tensor in tensors]
    bits = (len(codebook) >> memory).bit_length() - 1
    share = max(-(-count // torch.get_num_threads()), _LEAST_IN_THREAD)
    each = -(-share // _SIDE_BY_SIDE)
    starts = range(0, count, each * _SIDE_BY_SIDE)

    def search(start: int) -> None:
        _search(*arrays, bits, memory, start, min(start + starts.step, count))

    if len(starts) == 1:
        search(0)
    else:
        with ThreadPoolExecutor(len(starts)) as pool:
            list(pool.map(search, starts))
    return found


def decode_on_cpu(
    stream: Tensor, codebook: Tensor, scales: Tensor, *, rows: int, count: int, bits: int
) -> Tensor:
    """Codewords of packed codes, times the scales.

    One thread does it: torch's, which wait for work in loops, would hinder any others.

    Args:
        stream: (packed_bytes(count, bits),) uint8, of rows of equal length one after another.
        codebook: (2**(bits + memory),) float32.
        scales: (groups,) float32, of flat groups as `jlcm.packed.group_sizes` says.
        rows: of the weight.
        count: of its values.
        bits: of a code.

    Returns:
        (count,) float32.
    """
    values = torch.empty(count, dtype=torch.float32, device="cpu")
    arrays = [tensor.contiguous().numpy() for tensor in (stream, codebook, scales, values)]
    _decode(*arrays, bits, count // rows)
    return values


@njit(nogil=True)
def _decode(stream, codebook, scales, values, bits, columns):  # pragma: no cover - compiled
    count, groups, width = len(values), len(scales), np.uint64(bits)
    code_mask, index_mask = np.uint64((1 << bits) - 1), np.uint64(len(codebook) - 1)
    # Bits that are read and not yet used, and how many; bytes that are read.
    waiting, held, read = np.uint64(0), 0, 0
    start, row_end, index = 0, 0, np.uint64(0)
    while start < count:
        if start == row_end:
            row_end, index = row_end + columns, np.uint64(0)
        group = start * groups // count
        end = min(row_end, -(-(group + 1) * count // groups))
        scale = scales[group]
        for position in range(start, end):
            if held < bits:
                waiting |= np.uint64(stream[read]) << np.uint64(held)
                read += 1
                held += 8
            index = (index << width | waiting & code_mask) & index_mask
            waiting >>= width
            held -= bits
            values[position] = codebook[index] * scale
        start = end


@njit(nogil=True, fastmath={"contract"})
def _search(
    weights, products, squares, doubles, before, after, found, bits, memory, first, last
):  # pragma: no cover - compiled
    n, codes, kept = len(weights), 1 << bits, 1 << memory
    size, free = codes * kept, n - len(after)
    cost = np.empty((size, _SIDE_BY_SIDE), np.float32)
    fresh = np.empty_like(cost)
    origins = np.empty((n, kept, _SIDE_BY_SIDE), np.int32)
    least = np.empty(_SIDE_BY_SIDE, np.float32)
    origin = np.empty(_SIDE_BY_SIDE, np.int32)
    weight, product = np.zeros_like(least), np.zeros_like(least)
    for start in range(first, last, _SIDE_BY_SIDE):
        width = min(_SIDE_BY_SIDE, last - start)
        cost[:] = _NEVER
        for j in range(width):
            cost[before[start + j], j] = 0
        for t in range(n):
            weight[:width] = weights[t, start : start + width]
            product[:width] = products[t, start : start + width]
            for remembered in range(kept):
                # The best of the indices that leave the same memory ...
                for j in range(_SIDE_BY_SIDE):
                    least[j] = cost[remembered, j]
                    origin[j] = 0
                for code in range(1, codes):
                    row = cost[code * kept + remembered]
                    for j in range(_SIDE_BY_SIDE):
                        better = row[j] < least[j]
                        least[j] = row[j] if better else least[j]
                        origin[j] = code if better else origin[j]
                origins[t, remembered] = origin
                # ... goes on to all indices with that memory.
                for code in range(codes):
                    index = remembered * codes + code
                    row, square, double = fresh[index], squares[index], doubles[index]
                    for j in range(_SIDE_BY_SIDE):
                        row[j] = least[j] + (weight[j] * square - product[j] * double)
            if t >= free:
                for j in range(width):
                    for index in range(size):
                        if index & (codes - 1) != after[t - free, start + j]:
                            fresh[index, j] = _NEVER
            cost, fresh = fresh, cost
        for j in range(width):
            index = cost[:, j].argmin()
            for t in range(n - 1, -1, -1):
                found[t, start + j] = index
                remembered = index >> bits
                index = origins[t, remembered, j] * kept + remembered

"""Viterbi's algorithm for CPUs, compiled when it is first used (numba).

A few sequences run side by side, so that their costs fill vector registers and stay in the nearest
cache: several times as fast as `jlcm.trellis` with whole tensors, which GPUs prefer.
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

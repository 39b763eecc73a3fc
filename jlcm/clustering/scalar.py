"""Scalar clustering of weights: one codebook for each group of consecutive values."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from jlcm.clustering.kmeans import bisecting_starts, kmeans_starts
from jlcm.clustering.points import SORT_LIMIT, Points, codebooks_from_starts, distinct
from jlcm.clustering.spectral import spectral_codebooks
from jlcm.clustering.ward import ward_starts

METHODS = ("random", "kmeans", "bisecting", "spectral", "hierarchical")
"""Scalar clustering methods accepted by `cluster`."""

FP16_MAX = 65504.0

_CHUNK = 1 << 15  # values clustered together: large enough for numpy, small enough for the cache
_ASSIGN_CHUNK = 1 << 18
_LONG_GROUP = 1 << 14  # mean group length above which assignment loops over groups


def cluster(
    values: Tensor,
    *,
    k: int,
    method: str = "hierarchical",
    sizes: Tensor | None = None,
    importance: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cluster each group of scalars into a codebook of k codewords.

    All methods but "random" work on the weighted distinct values of a group:

    * "kmeans": least weighted squared error of all codebooks (dynamic programme);
    * "bisecting": repeated optimal two-way split of the interval with the largest squared error;
    * "hierarchical": Ward's agglomerative clustering, cut at k clusters;
    * "spectral": normalised cuts on at most 1,024 landmarks per group, an approximation;
    * "random": uniform labels, each codeword the mean of its cluster.

    kmeans, bisecting and hierarchical treat a group of up to 65,536 values exactly in float32, and
    a larger one exactly when its values are fp16-representable. Other values of larger groups are
    first merged into fp16 cells (relative width 2^-11 to 2^-10) placed at their mean, so clusters
    end at cell borders. Afterwards codebooks are rounded to fp16, the precision they are stored in,
    and each value takes its nearest codeword (random labels are kept).

    Args:
        values: (N,) floating tensor of any device; computed on the CPU. float64 is rounded to
            float32.
        k: codebook size, 1 to 256.
        method: one of `METHODS`.
        sizes: (G,) positive int64 lengths of consecutive groups, summing to N; None for a single
            group.
        importance: (N,) non-negative weights of the squared errors, or None. A group whose
            importance is zero everywhere is treated as equally weighted.
        seed: seed of "random" and "spectral"; the other methods are deterministic.

    Returns:
        codebooks: (G, k) float32 holding fp16-representable values, ascending in each row. A group
            with fewer clusters than k repeats its last codeword.
        codes: (N,) uint8.

    Raises:
        ValueError: on an unknown method, k out of range, or malformed values, sizes or importance.
    """
    lengths = _checked(values, k, method, sizes, importance)
    device = values.device
    values = values.detach().cpu()
    importance = None if importance is None else importance.detach().cpu()
    if method == "random":
        codebooks, codes = _random(values, k, lengths, importance, seed)
        return codebooks.to(device), codes.to(device)
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    def codebooks_of(groups: tuple[int, int]) -> np.ndarray:
        part = slice(offsets[groups[0]], offsets[groups[1]])
        points = distinct(
            values[part], lengths[slice(*groups)], None if importance is None else importance[part]
        )
        return _fit(points, k, method, seed)

    chunks = _chunks(lengths)
    workers = min(len(chunks), torch.get_num_threads())
    if workers > 1:
        # One BLAS thread per worker: many small eigenproblems would wait for each other otherwise.
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(codebooks_of, chunks))
    else:
        parts = [codebooks_of(chunk) for chunk in chunks]
    codebooks = torch.from_numpy(np.concatenate(parts)).half().float()
    codes = assign(values, codebooks, sizes=torch.from_numpy(lengths))
    return codebooks.to(device), codes.to(device)


def assign(values: Tensor, codebooks: Tensor, *, sizes: Tensor | None = None) -> Tensor:
    """Index of the codeword nearest to each value in the codebook of its own group.

    Args:
        values: (N,) floating tensor.
        codebooks: (G, k) tensor on the same device, ascending in each row, k at most 256.
        sizes: (G,) positive int64 lengths of consecutive groups, summing to N; None when G is 1.

    Returns:
        (N,) uint8 codes; a value as far from two codewords takes the lower index.

    Raises:
        ValueError: when sizes do not match values and codebooks, or a codebook row is not
            ascending.
    """
    lengths = _checked_sizes(values, sizes)
    if codebooks.dim() != 2 or len(codebooks) != len(lengths):
        raise ValueError(
            f"codebooks must have shape ({len(lengths)}, k) for {len(lengths)} groups, "
            f"got {tuple(codebooks.shape)}"
        )
    if not 1 <= codebooks.shape[1] <= 256:
        raise ValueError(f"codebooks must have 1 to 256 codewords, got {codebooks.shape[1]}")
    borders = _borders(codebooks.detach().double())
    if values.dtype != torch.float64:
        # Largest float32 not above the border: a float32 value exceeds one exactly when it exceeds
        # the other.
        rounded = borders.float()
        below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        borders = torch.where(rounded.double() > borders, below, rounded)
    if len(values) >= _LONG_GROUP * len(lengths):
        return _assign_long(values.detach(), borders, lengths)
    return _assign_short(values.detach(), borders, lengths)


def _borders(codebooks: Tensor) -> Tensor:
    """Values above which the next codeword is nearer, (G, k - 1) float64 ascending."""
    low, high = codebooks[:, :-1], codebooks[:, 1:]
    if bool((high < low).any()) or bool(codebooks.isnan().any()):
        raise ValueError("codebooks must be ascending in each row; sort them along dim 1")
    # A repeated codeword is never chosen: its border is the next one further up.
    middle = torch.where(high > low, (low + high) / 2, torch.inf)
    return middle.flip(1).cummin(dim=1).values.flip(1) if middle.shape[1] else middle


def _assign_long(values: Tensor, borders: Tensor, lengths: np.ndarray) -> Tensor:
    codes = torch.empty(len(values), dtype=torch.uint8, device=values.device)
    start = 0
    for group, length in enumerate(lengths.tolist()):
        for a in range(start, start + length, _ASSIGN_CHUNK):
            b = min(a + _ASSIGN_CHUNK, start + length)
            piece = values[a:b].to(borders.dtype)
            codes[a:b] = torch.bucketize(piece, borders[group], out_int32=True)
        start += length
    return codes


def _assign_short(values: Tensor, borders: Tensor, lengths: np.ndarray) -> Tensor:
    steps = borders.shape[1].bit_length()
    width = 1 << steps
    table = torch.full((len(borders), width), torch.inf, dtype=borders.dtype, device=values.device)
    table[:, : borders.shape[1]] = borders
    table = table.view(-1)
    ends = torch.from_numpy(np.cumsum(lengths)).to(values.device)
    codes = torch.empty(len(values), dtype=torch.uint8, device=values.device)
    for a in range(0, len(values), _ASSIGN_CHUNK):
        piece = values[a : a + _ASSIGN_CHUNK].to(borders.dtype)
        positions = torch.arange(a, a + len(piece), device=values.device)
        base = torch.searchsorted(ends, positions, right=True) * width
        place = base.clone()
        for step in reversed(range(steps)):
            place += (piece > table[place + ((1 << step) - 1)]).long() << step
        codes[a : a + len(piece)] = place - base
    return codes


def _fit(points: Points, k: int, method: str, seed: int) -> np.ndarray:
    match method:
        case "kmeans":
            return codebooks_from_starts(points, kmeans_starts(points, k), k)
        case "bisecting":
            return codebooks_from_starts(points, bisecting_starts(points, k), k)
        case "hierarchical":
            return codebooks_from_starts(points, ward_starts(points, k), k)
        case "spectral":
            return spectral_codebooks(points, k, seed)
    raise AssertionError(method)


def _chunks(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of groups holding about `_CHUNK` values; groups above `SORT_LIMIT` stand alone."""
    block = (np.cumsum(lengths) - lengths) // _CHUNK
    alone = lengths > SORT_LIMIT
    breaks = np.flatnonzero((block[1:] != block[:-1]) | alone[1:] | alone[:-1]) + 1
    edges = [0, *breaks.tolist(), len(lengths)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _random(
    values: Tensor, k: int, lengths: np.ndarray, importance: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(k, (len(values),), generator=generator, dtype=torch.uint8)
    ends = torch.from_numpy(np.cumsum(lengths))

    def slots() -> Iterator[tuple[slice, int, Tensor]]:
        """Pieces of the values, their first slot, and the (group, label) slots from there."""
        for a in range(0, len(values), _ASSIGN_CHUNK):
            piece = slice(a, min(a + _ASSIGN_CHUNK, len(values)))
            group = torch.searchsorted(ends, torch.arange(a, piece.stop), right=True)
            first = int(group[0])
            yield piece, first * k, (group - first) * k + codes[piece]

    sums = torch.zeros(4, len(lengths) * k, dtype=torch.float64)
    for piece, first, slot in slots():
        value = values[piece].double()
        one = torch.ones_like(value)
        weight = one if importance is None else importance[piece].double()
        for row, term in zip(sums, (one, value, weight, weight * value), strict=True):
            part = torch.bincount(slot, weights=term)
            row[first : first + len(part)] += part
    number, plain, mass, weighted = sums.view(4, len(lengths), k)
    # A cluster without importance still needs a codeword for its members: their plain mean.
    means = torch.where(mass > 0, weighted / mass, plain / number)
    means, order = torch.where(number > 0, means, torch.inf).sort(dim=1)
    rank = order.argsort(dim=1).to(torch.uint8).view(-1)
    for piece, first, slot in slots():
        codes[piece] = rank[first + slot]
    found = (number > 0).sum(dim=1, keepdim=True)
    column = torch.minimum(torch.arange(k).expand_as(order), found - 1)
    return means.gather(1, column).half().float(), codes


def _checked(
    values: Tensor, k: int, method: str, sizes: Tensor | None, importance: Tensor | None
) -> np.ndarray:
    if method not in METHODS:
        raise ValueError(
            f"unknown clustering method {method!r}, choose one of {', '.join(METHODS)}"
        )
    if not 1 <= k <= 256:
        raise ValueError(f"k must be 1 to 256 so that codes fit in uint8, got {k}")
    lengths = _checked_sizes(values, sizes)
    low, high = values.detach().aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError("values contain NaN or Inf; clean the weights before clustering")
    if max(-low.item(), high.item()) > FP16_MAX:
        raise ValueError(
            f"values exceed the fp16 range of codebooks (+-{FP16_MAX:g}); rescale them"
        )
    if importance is not None:
        if importance.shape != values.shape:
            raise ValueError(
                f"importance must have the shape of values {tuple(values.shape)}, "
                f"got {tuple(importance.shape)}"
            )
        low, high = importance.detach().aminmax()
        if not (low.isfinite() and high.isfinite()) or low < 0:
            raise ValueError("importance must be finite and non-negative")
    return lengths


def _checked_sizes(values: Tensor, sizes: Tensor | None) -> np.ndarray:
    if values.dim() != 1 or len(values) == 0 or not values.is_floating_point():
        raise ValueError(
            "values must be a non-empty 1-D floating tensor, "
            f"got {tuple(values.shape)} {values.dtype}"
        )
    if sizes is None:
        return np.array([len(values)], dtype=np.int64)
    lengths = sizes.detach().cpu().numpy().astype(np.int64)
    if lengths.ndim != 1 or (lengths <= 0).any() or lengths.sum() != len(values):
        raise ValueError(
            f"sizes must be positive and sum to the {len(values)} values, "
            f"got {lengths.size} sizes summing to {lengths.sum()}"
        )
    return lengths

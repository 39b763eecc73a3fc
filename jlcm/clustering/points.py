"""Weighted distinct values of many groups of scalars, kept flat with one offset per group.

Scalar clustering only needs the sorted distinct values of a group and how much each of them weighs,
so duplicates (an fp16 tensor has at most 65,536 distinct values) are removed before any method
starts. All groups live in the same flat arrays, which is what lets every method treat thousands of
groups at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SORT_LIMIT = 65_536
"""Longest group whose values are kept exactly in float32; longer ones are binned to fp16 cells."""

_CELLS = 65_536
_SLICE = 1 << 20  # values converted at once: bounds the temporaries of very large groups


@dataclass(frozen=True, kw_only=True)
class Points:
    """Sorted weighted distinct values of G groups.

    Attributes:
        values: (n,) float64, strictly ascending inside each group.
        weights: (n,) float64, positive.
        offsets: (G + 1,) int64; group g owns ``offsets[g]:offsets[g + 1]`` and is never empty.
    """

    values: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Number of distinct values in each group, (G,) int64."""
        return np.diff(self.offsets)

    def select(self, groups: np.ndarray) -> tuple[Points, np.ndarray]:
        """The groups marked True in ``groups`` (G,), and the (n,) mask of their points."""
        kept = np.repeat(groups, self.counts)
        offsets = np.concatenate([[0], np.cumsum(self.counts[groups])])
        return Points(values=self.values[kept], weights=self.weights[kept], offsets=offsets), kept


def distinct(values: Tensor, sizes: np.ndarray, importance: Tensor | None = None) -> Points:
    """Reduce consecutive groups of values to weighted distinct values.

    Args:
        values: (N,) floating CPU tensor, finite and inside the fp16 range.
        sizes: (G,) int64 group lengths summing to N; one group may exceed `SORT_LIMIT` only when G
            is 1.
        importance: (N,) non-negative floating CPU tensor, or None for equal weights. A group whose
            importance is zero everywhere is treated as equally weighted; other zero weights are
            dropped.

    Returns:
        The points of all groups. A group above `SORT_LIMIT` has one point per occupied fp16 cell,
        placed at the weighted mean of the values of that cell, so that fp16-representable values
        stay exact.
    """
    if len(sizes) == 1 and sizes[0] > SORT_LIMIT:
        return _binned(values, importance)
    return _sorted(values, sizes, importance)


def _sorted(values: Tensor, sizes: np.ndarray, importance: Tensor | None) -> Points:
    # Adding zero turns -0.0 into 0.0, which would otherwise count as a second distinct value.
    bits = (values.to(torch.float32) + 0.0).numpy().view(np.int32)
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
    key = (np.repeat(np.arange(len(sizes)), sizes) << 32) | (ordered + (1 << 31))
    if importance is None:
        key = np.sort(key)
    else:
        order = np.argsort(key)
        key = key[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    if importance is None:
        weights = np.diff(np.append(first, len(key))).astype(np.float64)
    else:
        weights = np.add.reduceat(
            _weights_or_uniform(importance.to(torch.float64).numpy(), sizes)[order], first
        )
    key = key[first]
    kept = weights > 0
    key, weights = key[kept], weights[kept]
    ordered = ((key & 0xFFFFFFFF) - (1 << 31)).astype(np.int32)
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32)
    counts = np.bincount(key >> 32, minlength=len(sizes))
    return Points(
        values=bits.view(np.float32).astype(np.float64),
        weights=weights,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
    )


def _weights_or_uniform(weights: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    silent = np.add.reduceat(weights, starts) <= 0
    return np.where(np.repeat(silent, sizes), 1.0, weights) if silent.any() else weights


def _binned(values: Tensor, importance: Tensor | None) -> Points:
    weighted = importance is not None and bool((importance > 0).any())
    mass, total = np.zeros(_CELLS), np.zeros(_CELLS)
    for start in range(0, len(values), _SLICE):
        piece = values[start : start + _SLICE]
        half = piece.to(torch.float16)
        bits = half.view(torch.int16).numpy()
        cell = np.where(bits < 0, bits ^ 0x7FFF, bits).astype(np.int64) + _CELLS // 2
        weights = importance[start : start + _SLICE].to(torch.float64).numpy() if weighted else None
        part = np.bincount(cell, weights=weights, minlength=_CELLS)
        mass += part
        if piece.dtype == torch.float16 or torch.equal(half.to(piece.dtype), piece):
            total += part * _CELL_VALUES
        else:
            exact = piece.to(torch.float64).numpy()
            exact = exact if weights is None else exact * weights
            total += np.bincount(cell, weights=exact, minlength=_CELLS)
    zero = _CELLS // 2  # the cell below holds -0.0, the same value
    mass[zero] += mass[zero - 1]
    total[zero] += total[zero - 1]
    mass[zero - 1] = 0
    kept = mass > 0
    return Points(
        values=total[kept] / mass[kept], weights=mass[kept], offsets=np.array([0, kept.sum()])
    )


def _cell_values() -> np.ndarray:
    ordered = np.arange(-_CELLS // 2, _CELLS // 2).astype(np.int16)
    bits = np.where(ordered < 0, ordered ^ np.int16(0x7FFF), ordered).astype(np.int16)
    values = bits.view(np.float16).astype(np.float64)
    return np.where(np.isfinite(values), values, 0.0)


_CELL_VALUES = _cell_values()


@dataclass(frozen=True, kw_only=True)
class PrefixSums:
    """Running sums of the standardised points (each group: total weight 1, mean 0, variance 1).

    Group g owns entries ``offsets[g] : offsets[g] + counts[g] + 1``; the sum over its points a..b-1
    is ``s[offsets[g] + b] - s[offsets[g] + a]``.

    Attributes:
        weight: (n + G,) float64 sums of w.
        first: (n + G,) float64 sums of w x.
        second: (n + G,) float64 sums of w x^2.
        offsets: (G,) int64.
        counts: (G,) int64 number of points of each group.
    """

    weight: np.ndarray
    first: np.ndarray
    second: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray


def standardise(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights, (n,) each, with total weight 1, mean 0 and variance 1 in every group.

    Weights below 1e-14 of their group are raised to it: smaller ones vanish in a float64 running
    sum.
    """
    starts, counts = points.offsets[:-1], points.counts
    weights = points.weights / np.repeat(np.add.reduceat(points.weights, starts), counts)
    weights = np.maximum(weights, 1e-14)
    mean = np.add.reduceat(weights * points.values, starts) / np.add.reduceat(weights, starts)
    x = points.values - np.repeat(mean, counts)
    deviation = np.sqrt(np.add.reduceat(weights * x * x, starts))
    return x / np.repeat(np.where(deviation > 0, deviation, 1.0), counts), weights


def prefix_sums(x: np.ndarray, weights: np.ndarray, counts: np.ndarray) -> PrefixSums:
    """Running sums that restart in every group, from flat standardised points."""
    groups = len(counts)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    offsets = starts + np.arange(groups)
    place = np.arange(len(x)) + np.repeat(np.arange(groups) + 1, counts)

    def running(terms: np.ndarray) -> np.ndarray:
        steps = np.zeros(len(x) + groups)
        steps[place] = terms
        # Each group's leading entry undoes the previous total, so sums never grow over the groups.
        steps[offsets[1:]] = -np.add.reduceat(terms, starts)[:-1]
        return np.cumsum(steps)

    return PrefixSums(
        weight=running(weights),
        first=running(weights * x),
        second=running(weights * x * x),
        offsets=offsets,
        counts=counts,
    )


def codebooks_from_starts(points: Points, starts: np.ndarray, k: int) -> np.ndarray:
    """Weighted means of interval clusters, (G, k) float64 ascending.

    Args:
        points: the points.
        starts: (n,) bool, True at the first point of every cluster (at most k for a group).
        k: codebook size; missing codewords repeat the last one.
    """
    begin = np.flatnonzero(starts)
    mass = np.add.reduceat(points.weights, begin)
    means = np.add.reduceat(points.weights * points.values, begin) / mass
    first = np.searchsorted(begin, points.offsets[:-1])
    found = np.diff(np.append(first, len(begin)))
    return means[first[:, None] + np.minimum(np.arange(k), found[:, None] - 1)]

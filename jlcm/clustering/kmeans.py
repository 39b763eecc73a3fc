"""Optimal and bisecting k-means on the real line, for many groups at once.

On a line the clusters of an optimal k-means are intervals of the sorted values, so the problem is a
shortest path solved by dynamic programming (Wang and Song, "Ckmeans.1d.dp", R Journal 2011). The
best last boundary moves right as more points are covered, so each layer is solved by divide and
conquer (Gronlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D",
2017). Every level of that recursion is one ragged array computation over all groups.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jlcm.clustering.points import Points, PrefixSums, prefix_sums, standardise

_BOUND_ITERATIONS = 8


def kmeans_starts(points: Points, k: int) -> np.ndarray:
    """First points of the clusters with the least weighted squared error.

    Args:
        points: weighted distinct values of G groups.
        k: number of clusters; a group with at most k distinct values gets one cluster for each.

    Returns:
        (n,) bool, True at the first point of every cluster. Optimal up to float64 rounding.
    """
    starts = _first_points(points)
    large = points.counts > k
    starts |= ~np.repeat(large, points.counts)
    if k == 1 or not large.any():
        return starts
    rest, kept = points.select(large)
    begin = _optimal_boundaries(rest, k) + rest.offsets[:-1, None]
    starts[np.flatnonzero(kept)[begin.ravel()]] = True
    return starts


def bisecting_starts(points: Points, k: int) -> np.ndarray:
    """First points of the clusters found by repeatedly splitting the worst interval in two.

    Each of the k - 1 steps takes the interval with the largest weighted squared error of every
    group and cuts it at the best of all its boundaries.

    Args:
        points: weighted distinct values of G groups.
        k: number of clusters.

    Returns:
        (n,) bool, True at the first point of every cluster.
    """
    starts = _first_points(points)
    groups = len(points.counts)
    sums = prefix_sums(*standardise(points), points.counts)
    begin = np.zeros((groups, k), dtype=np.int64)
    end = np.zeros((groups, k), dtype=np.int64)
    error = np.full((groups, k), -1.0)
    end[:, 0] = points.counts
    error[:, 0] = np.where(points.counts > 1, 1.0, -1.0)
    for clusters in range(1, k):
        worst = error.argmax(axis=1)
        active = np.flatnonzero(error[np.arange(groups), worst] >= 0)
        if len(active) == 0:
            break
        worst = worst[active]
        base = sums.offsets[active]
        low, high = base + begin[active, worst], base + end[active, worst]

        def explained(cut: np.ndarray, counts: np.ndarray, low=low, high=high) -> np.ndarray:
            left, right = np.repeat(low, counts), np.repeat(high, counts)
            return _explained(sums, left, cut) + _explained(sums, cut, right)

        cut, _ = _ragged_argmax(low + 1, high - 1, explained)
        end[active, clusters] = end[active, worst]
        begin[active, clusters] = end[active, worst] = cut - base
        for column in (worst, np.full_like(worst, clusters)):
            a, b = begin[active, column], end[active, column]
            spread = sums.second[base + b] - sums.second[base + a]
            spread = np.maximum(spread - _explained(sums, base + a, base + b), 0.0)
            error[active, column] = np.where(b - a > 1, spread, -1.0)
        starts[points.offsets[active] + cut - base] = True
    return starts


def _first_points(points: Points) -> np.ndarray:
    starts = np.zeros(len(points.values), dtype=bool)
    starts[points.offsets[:-1]] = True
    return starts


def _explained(sums: PrefixSums, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(sum of w x)^2 / (sum of w) over points a..b-1: the error one codeword removes."""
    first = sums.first[b] - sums.first[a]
    return first * first / (sums.weight[b] - sums.weight[a])


def _ragged_argmax(
    low: np.ndarray, high: np.ndarray, score: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """First position of low..high (inclusive, never empty) with the largest score, per node.

    ``score`` receives all positions of all nodes (T,) and the number of positions of each node.
    """
    counts = high - low + 1
    offsets = np.cumsum(counts) - counts
    position = np.arange(offsets[-1] + counts[-1])
    position += np.repeat(low - offsets, counts)
    scores = score(position, counts)
    best = np.maximum.reduceat(scores, offsets)
    hits = np.flatnonzero(scores == np.repeat(best, counts))
    if len(hits) > len(counts):  # equal scores: keep the first of each node
        hits = hits[np.searchsorted(hits, offsets)]
    return position[hits], best


def _optimal_boundaries(points: Points, k: int) -> np.ndarray:
    """Start of clusters 2..k in each group, (G, k - 1) int64; every group has over k points.

    The programme runs from both ends at once, ceil(k / 2) clusters from the left and the rest from
    the right (as further groups holding the points in reverse), and joins them in the middle: with
    a known upper bound of the total error, neither half has to look far beyond the middle.
    """
    groups, counts = len(points.counts), points.counts
    x, weights = standardise(points)
    bound = _error_bound(x, weights, counts, k) * (1 + 1e-9) + 1e-12
    lanes = np.concatenate([counts, counts[::-1]])
    sums = prefix_sums(
        np.concatenate([x, x[::-1]]), np.concatenate([weights, weights[::-1]]), lanes
    )
    bound = np.concatenate([bound, bound[::-1]])
    left, right = (k + 1) // 2, k // 2

    offset = np.repeat(sums.offsets, lanes + 1)
    value = np.full(len(offset), -np.inf)
    inner = np.ones(len(offset), dtype=bool)
    inner[sums.offsets] = False
    inner = np.flatnonzero(inner)
    value[inner] = _explained(sums, offset[inner], inner)
    # The furthest prefix of each lane whose error does not exceed the bound already.
    within = sums.second[inner] - sums.second[offset[inner]] - value[inner]
    within = within <= np.repeat(bound, lanes)
    reach = np.add.reduceat(within.astype(np.int64), np.cumsum(lanes) - lanes)
    reach = np.clip(reach, 1, lanes - k + 1)
    backward, choices = value, [None]
    for clusters in range(2, left + 1):
        running = 2 * groups if clusters <= right else groups
        value, choice, reach = _layer(sums, value, choices[-1], reach, bound, clusters, k, running)
        choices.append(choice)
        if clusters == right:
            backward = value

    forward_base = sums.offsets[:groups]
    mirror = sums.offsets[2 * groups - 1 - np.arange(groups)] + counts
    shift = forward_base + mirror  # entry p of the forward lane meets entry shift - p of its mirror

    def joined(position: np.ndarray, repeat: np.ndarray) -> np.ndarray:
        return value[position] + backward[np.repeat(shift, repeat) - position]

    middle, _ = _ragged_argmax(forward_base + left, forward_base + counts - right, joined)
    boundaries = np.empty((groups, k - 1), dtype=np.int64)
    boundaries[:, left - 1] = middle - forward_base
    mirrored_base = mirror - counts
    at, back = boundaries[:, left - 1].copy(), counts - boundaries[:, left - 1]
    for clusters in range(left, 1, -1):
        at = choices[clusters - 1][forward_base + at].astype(np.int64)
        boundaries[:, clusters - 2] = at
    for clusters in range(right, 1, -1):
        back = choices[clusters - 1][mirrored_base + back].astype(np.int64)
        boundaries[:, k - clusters] = counts - back
    return boundaries


def _layer(
    sums: PrefixSums,
    previous: np.ndarray,
    previous_choice: np.ndarray | None,
    reach: np.ndarray,
    bound: np.ndarray,
    clusters: int,
    k: int,
    running: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best explained sum of every prefix with one cluster more, by divide and conquer.

    Args:
        sums: running sums of all lanes.
        previous: best explained sums with ``clusters - 1`` clusters, -inf where not needed.
        previous_choice: last boundaries of those, a lower bound of the new ones; None for one
            cluster.
        reach: (lanes,) furthest prefix whose error with ``clusters - 1`` clusters is within the
            bound.
        bound: (lanes,) upper bound of the optimal error.
        clusters: clusters of this layer.
        k: clusters of the whole problem.
        running: only the first ``running`` lanes are computed.

    Returns:
        The layer's sums, its last boundaries (int32, relative to the lane) and its reach.
    """
    value = np.full(len(previous), -np.inf)
    choice = np.zeros(len(previous), dtype=np.int32)
    base = sums.offsets[:running]
    lane = np.arange(running)
    low = base + clusters
    high = base + sums.counts[:running] - (k - clusters)
    first, last = base + clusters - 1, base + reach[:running]
    furthest = np.full(len(reach), clusters)
    limit = bound + sums.second[sums.offsets]
    while len(lane):
        middle = (low + high) >> 1
        origin = sums.offsets[lane]
        nearest = first
        if previous_choice is not None:
            # A prefix's last boundary never moves left when clusters are added (0 where unknown).
            nearest = np.maximum(first, origin + previous_choice[middle])
        edge = np.maximum(np.minimum(last, middle - 1), nearest)
        edge_first, edge_weight = sums.first[middle], sums.weight[middle]

        def score(position: np.ndarray, counts: np.ndarray) -> np.ndarray:
            total = np.repeat(edge_first, counts)  # noqa: B023 - called at once
            total -= sums.first[position]
            total *= total
            mass = np.repeat(edge_weight, counts)  # noqa: B023
            mass -= sums.weight[position]
            total /= mass
            total += previous[position]
            return total

        best, explained = _ragged_argmax(nearest, edge, score)
        value[middle] = explained
        choice[middle] = best - origin
        within = sums.second[middle] - explained <= limit[lane]
        np.maximum.at(furthest, lane[within], (middle - origin)[within])
        go_left, go_right = low < middle, within & (middle < high)
        lane = np.concatenate([lane[go_left], lane[go_right]])
        low, high, first, last = (
            np.concatenate([low[go_left], middle[go_right] + 1]),
            np.concatenate([middle[go_left] - 1, high[go_right]]),
            np.concatenate([first[go_left], best[go_right]]),
            np.concatenate([best[go_left], last[go_right]]),
        )
    return value, choice, furthest


def _error_bound(x: np.ndarray, weights: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """Squared error of a quick clustering of each group, (G,): an upper bound of the optimal one.

    Clusters hold equal parts of the integral of density^(1/3), which is optimal for fine codebooks
    (Panter and Dite, 1951), and are refined by a few Lloyd iterations.
    """
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    group = np.repeat(np.arange(len(counts)), counts)
    step = np.zeros(len(x))
    step[1:] = np.cbrt((weights[1:] + weights[:-1]) * np.square(x[1:] - x[:-1]))
    step[starts] = 0.0
    measure = np.cumsum(step)
    measure -= np.repeat(measure[starts], counts)
    total = measure[starts + counts - 1]
    code = np.minimum((measure * np.repeat(k / total, counts)).astype(np.int64), k - 1)
    error = np.full(len(counts), np.inf)
    for _ in range(_BOUND_ITERATIONS):
        begin = np.flatnonzero(np.concatenate([[True], np.diff(group * k + code) != 0]))
        mass = np.add.reduceat(weights, begin)
        mean = np.add.reduceat(weights * x, begin) / mass
        gone = np.bincount(group[begin], weights=mass * mean * mean, minlength=len(counts))
        error = np.minimum(error, 1.0 - gone)
        # Move every boundary between two neighbouring clusters to the middle of their means.
        inner = np.flatnonzero(group[begin[1:]] == group[begin[:-1]])
        cut = (mean[inner] + mean[inner + 1]) / 2
        owner = group[begin[inner]]
        low, high = starts[owner], starts[owner] + counts[owner]
        while (low < high).any():
            middle = (low + high) >> 1
            below = x[np.minimum(middle, len(x) - 1)] < cut
            open_ = low < high
            low = np.where(open_ & below, middle + 1, low)
            high = np.where(open_ & ~below, middle, high)
        code = np.bincount(low, minlength=len(x) + 1)[: len(x)].cumsum()
        before = np.concatenate([[0], np.bincount(owner, minlength=len(counts)).cumsum()[:-1]])
        code = code - np.repeat(before, counts)
    return np.maximum(error, 0.0)

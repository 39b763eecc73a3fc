"""Ward's hierarchical clustering on the real line, for many groups at once.

Two facts make the exact dendrogram cheap. For clusters A < B < C on a line the cost of merging A
and C is at least the smaller cost of merging B with either, so only neighbours ever merge. And
Ward's cost is reducible, so merging all pairs that are each other's cheapest neighbour in one step
gives the dendrogram of merging the cheapest pair first (Muellner, "Modern hierarchical,
agglomerative clustering algorithms", 2011). Each round of such merges is one array computation over
all groups.
"""

from __future__ import annotations

import heapq

import numpy as np

from jlcm.clustering.points import Points, standardise

_SLOW_ROUND = 0.01  # part of the clusters merged below which a heap is faster than further rounds
_HEAP_MINIMUM = 1_000


def ward_starts(points: Points, k: int) -> np.ndarray:
    """First points of Ward's k clusters.

    Args:
        points: weighted distinct values of G groups.
        k: number of clusters; a group with at most k distinct values gets one cluster for each.

    Returns:
        (n,) bool, True at the first point of every cluster. Equal merge costs are ordered by a
        fixed rule.
    """
    height, step = _dendrogram(points)
    starts = np.zeros(len(height), dtype=bool)
    starts[points.offsets[:-1]] = True
    if k > 1:
        starts[_highest(height, step, points, k - 1)] = True
    return starts


def _dendrogram(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """Cost and step of the merge that removes the boundary before each point, (n,) float64.

    First points of groups get -inf: their boundary is not a merge.
    """
    mean, mass = standardise(points)
    n = len(mean)
    first = np.zeros(n, dtype=bool)
    first[points.offsets[:-1]] = True
    height, step = np.full(n, -np.inf), np.zeros(n)
    start = np.arange(n)
    # Ties are broken by a scrambled position within the group: always taking the leftmost of many
    # equal gaps would leave one merge for each round.
    local = start - np.repeat(points.offsets[:-1], points.counts)
    rank = (local * 0x9E3779B1) & 0xFFFFFFFF
    highest = np.full(n, -np.inf)
    rounds = 0
    while len(start) > len(points.counts):
        cost = _costs(mass, mean, first)
        # cheaper[i]: the boundary in front of cluster i + 1 goes before the one in front of cluster
        # i.
        cheaper = (cost[1:] < cost[:-1]) | ((cost[1:] == cost[:-1]) & (rank[1:] < rank[:-1]))
        chosen = np.flatnonzero(~first[1:] & cheaper & ~np.append(cheaper[1:], False)) + 1
        kept_left = chosen - 1
        if len(chosen) < _SLOW_ROUND * len(start) and len(start) > _HEAP_MINIMUM:
            _heap_merge(mass, mean, first, highest, start, height, step, rounds)
            break
        reached = np.maximum(cost[chosen], np.maximum(highest[kept_left], highest[chosen]))
        height[start[chosen]], step[start[chosen]] = reached, rounds
        highest[kept_left] = reached
        both = mass[kept_left] + mass[chosen]
        mean[kept_left] += (mean[chosen] - mean[kept_left]) * (mass[chosen] / both)
        mass[kept_left] = both
        keep = np.ones(len(start), dtype=bool)
        keep[chosen] = False
        mass, mean, first = mass[keep], mean[keep], first[keep]
        highest, start, rank = highest[keep], start[keep], rank[keep]
        rounds += 1
    return height, step


def _costs(mass: np.ndarray, mean: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Error added when each cluster joins the one before it; inf for first clusters."""
    cost = np.full(len(mass), np.inf)
    gap = mean[1:] - mean[:-1]
    cost[1:] = mass[1:] * mass[:-1] / (mass[1:] + mass[:-1]) * gap * gap
    cost[first] = np.inf
    return cost


def _heap_merge(
    mass: np.ndarray,
    mean: np.ndarray,
    first: np.ndarray,
    highest: np.ndarray,
    start: np.ndarray,
    height: np.ndarray,
    step: np.ndarray,
    rounds: int,
) -> None:
    """Finish the merges one by one, cheapest first (fills ``height`` and ``step`` in place)."""
    cost = _costs(mass, mean, first)
    n = len(mass)
    before = list(range(-1, n - 1))
    after = list(range(1, n + 1))
    edge = [*first.tolist(), True]
    mass, mean, highest = mass.tolist(), mean.tolist(), highest.tolist()
    version = [0] * n
    heap = [(c, i, 0) for i, c in enumerate(cost.tolist()) if not edge[i]]
    heapq.heapify(heap)
    done = 0

    def push(i: int) -> None:
        j = before[i]
        gap = mean[i] - mean[j]
        version[i] += 1
        price = mass[i] * mass[j] / (mass[i] + mass[j]) * gap * gap
        heapq.heappush(heap, (price, i, version[i]))

    while heap:
        price, i, seen = heapq.heappop(heap)
        if seen != version[i]:
            continue
        j = before[i]
        version[i] = -1  # cluster i is now part of j
        highest[j] = max(price, highest[i], highest[j])
        done += 1
        height[start[i]], step[start[i]] = highest[j], rounds + done / n
        both = mass[i] + mass[j]
        mean[j] += (mean[i] - mean[j]) * (mass[i] / both)
        mass[j] = both
        after[j] = after[i]
        if after[j] < n:
            before[after[j]] = j
            if not edge[after[j]]:
                push(after[j])
        if not edge[j]:
            push(j)


def _highest(height: np.ndarray, step: np.ndarray, points: Points, wanted: int) -> np.ndarray:
    """Points whose boundaries are the ``wanted`` last merges of their group."""
    groups = len(points.counts)
    group = np.repeat(np.arange(groups), points.counts)
    merged = np.isfinite(height)
    # Any `wanted` boundaries bound the wanted-th largest height from below; the latest ones do it
    # well and leave few candidates to sort.
    steps = step.astype(np.int64)
    span = int(steps.max()) + 1
    table = np.bincount(group[merged] * span + steps[merged], minlength=groups * span)
    later = table.reshape(groups, span)[:, ::-1].cumsum(axis=1)[:, ::-1]
    oldest = np.maximum((later >= wanted).sum(axis=1) - 1, 0)
    late = merged & (steps >= np.repeat(oldest, points.counts))
    floor = np.minimum.reduceat(np.where(late, height, np.inf), points.offsets[:-1])
    candidates = np.flatnonzero(merged & (height >= np.repeat(floor, points.counts)))
    order = np.lexsort((-step[candidates], -height[candidates], group[candidates]))
    owner = group[candidates]  # sorted already, and lexsort keeps the groups in order
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    return candidates[order[place < wanted]]

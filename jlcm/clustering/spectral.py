"""Approximate spectral clustering of scalars through weighted landmarks.

Normalised cuts (Shi and Malik, "Normalized cuts and image segmentation", 2000) with K eigenvectors,
rows scaled to unit length before k-means (Ng, Jordan and Weiss, "On spectral clustering", 2001):
without that scaling the eigenvectors of heavy-tailed weights single out a few outliers and leave
the bulk in one cluster. A full affinity matrix is out of reach for millions of weights, so each
group is first summarised by at most 1,024 landmarks: consecutive distinct values share a landmark,
placed at their weighted mean.
"""

from __future__ import annotations

import numpy as np

from jlcm.clustering.points import Points, standardise

LANDMARKS = 1024
"""Most landmarks of one group."""

_BATCH_ENTRIES = 1 << 21  # affinity matrix entries held at once
_LLOYD_ITERATIONS = 50


def spectral_codebooks(points: Points, k: int, seed: int) -> np.ndarray:
    """Weighted means of spectral clusters, (G, k) float64 ascending.

    The number of landmarks is the power of two below the larger of 2 k and four times the square
    root of the group's distinct values, between 64 and `LANDMARKS`. The affinity is exp(-(x - y)^2
    / (2 s^2)) with s the standard deviation of the group, times 16 / k above 16 clusters so that K
    eigenvalues stay above rounding errors. Clusters need not be intervals of the values. A group
    with at most k distinct values gets each of them as a codeword. Missing codewords repeat the
    last one. Rounding in the eigenvectors can decide between nearly equal clusterings.

    Args:
        points: weighted distinct values of G groups.
        k: number of clusters and eigenvectors.
        seed: seed of the k-means++ start in the embedding; all groups share its random numbers.
    """
    counts = points.counts
    out = np.empty((len(counts), k))
    few = counts <= k
    index = np.minimum(points.offsets[:-1, None] + np.arange(k), points.offsets[1:, None] - 1)
    out[few] = points.values[index[few]]
    target = np.maximum(4 * np.sqrt(counts), 2 * k)
    landmarks = np.clip(2 ** np.floor(np.log2(target)), 64, LANDMARKS).astype(np.int64)
    for size in np.unique(landmarks[~few]):
        chosen = np.flatnonzero((landmarks == size) & ~few)
        batch = max(1, _BATCH_ENTRIES // int(size) ** 2)
        for start in range(0, len(chosen), batch):
            part = np.zeros(len(counts), dtype=bool)
            part[chosen[start : start + batch]] = True
            subset, _ = points.select(part)
            out[part] = _cluster_batch(subset, k, int(size), seed)
    return out


def _cluster_batch(points: Points, k: int, size: int, seed: int) -> np.ndarray:
    place, mass, value = _landmarks(points, size)
    labels = _kmeans(_embedding(place, mass, k), mass, k, seed)
    member = _one_hot(labels, k) * mass[:, :, None]
    total = member.sum(axis=1)
    moment = (member * value[:, :, None]).sum(axis=1)
    means = np.where(total > 0, moment / np.where(total > 0, total, 1.0), np.inf)
    means.sort(axis=1)
    found = (total > 0).sum(axis=1, keepdims=True)
    return np.take_along_axis(means, np.minimum(np.arange(k), found - 1), axis=1)


def _landmarks(points: Points, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardised places, masses (0 for padding) and values of landmarks, (G, size) each.

    Cells are equal parts of half the mass plus half the range: fine where values are dense, and
    never so coarse in the tails that an outlier shares a landmark with the bulk.
    """
    x, weights = standardise(points)
    starts, counts = points.offsets[:-1], points.counts
    rank = np.arange(len(x)) - np.repeat(starts, counts)
    before = np.cumsum(weights) - weights
    before -= np.repeat(before[starts], counts)
    low = x[starts]
    span = x[points.offsets[1:] - 1] - low
    measure = before + (x - np.repeat(low, counts)) / np.repeat(span, counts)
    cell = np.minimum((measure * (size / 2)).astype(np.int64), size - 1)
    cell = np.where(np.repeat(counts <= size, counts), rank, cell)
    flat = np.repeat(np.arange(len(counts)) * size, counts) + cell
    shape = (len(counts), size)

    def gathered(terms: np.ndarray) -> np.ndarray:
        return np.bincount(flat, weights=terms, minlength=shape[0] * size).reshape(shape)

    mass = gathered(weights)
    safe = np.where(mass > 0, mass, 1.0)
    return gathered(weights * x) / safe, mass, gathered(weights * points.values) / safe


def _embedding(place: np.ndarray, mass: np.ndarray, k: int) -> np.ndarray:
    """Leading K eigenvectors of the normalised affinity, rows of unit length, (G, L, k)."""
    width = min(1.0, 16 / k)
    affinity = place[:, :, None] - place[:, None, :]
    affinity *= affinity
    affinity *= -0.5 / width**2
    np.exp(affinity, out=affinity)
    degree = np.einsum("gij,gj->gi", affinity, mass)
    # sqrt(m) K sqrt(m) between landmarks has the spectrum of the affinity between all the values
    # they stand for.
    half = np.sqrt(mass / degree)
    affinity *= half[:, :, None]
    affinity *= half[:, None, :]
    # Padding decouples and goes to the bottom of the spectrum: a Gaussian kernel has no negative
    # eigenvalue.
    diagonal = np.arange(place.shape[1])
    affinity[:, diagonal, diagonal] -= mass == 0
    vectors = np.linalg.eigh(affinity)[1][:, :, -k:]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-12)


def _kmeans(points: np.ndarray, mass: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Weighted k-means++ and Lloyd iterations on (G, L, d) points, labels (G, L)."""
    groups, size, width = points.shape
    centres = np.zeros((groups, k, width))
    closest = np.ones_like(mass)
    for column, draw in enumerate(np.random.default_rng(seed).random(k)):
        chance = (mass * closest).cumsum(axis=1)
        pick = (chance <= draw * chance[:, -1:]).sum(axis=1)
        centre = points[np.arange(groups), np.minimum(pick, size - 1)]
        centres[:, column] = centre
        distance = np.square(points - centre[:, None, :]).sum(axis=2)
        closest = distance if column == 0 else np.minimum(closest, distance)
    labels = None
    for _ in range(_LLOYD_ITERATIONS):
        # The squared norm of the point itself does not matter to which centre is nearest.
        distance = np.square(centres).sum(axis=2)[:, None, :] - 2 * points @ centres.swapaxes(1, 2)
        new = distance.argmin(axis=2)
        if labels is not None and np.array_equal(new, labels):
            break
        labels = new
        member = _one_hot(labels, k) * mass[:, :, None]
        total = member.sum(axis=1)[:, :, None]
        moved = member.swapaxes(1, 2) @ points / np.where(total > 0, total, 1.0)
        centres = np.where(total > 0, moved, centres)
    return labels


def _one_hot(labels: np.ndarray, k: int) -> np.ndarray:
    return (labels[:, :, None] == np.arange(k)).astype(np.float64)

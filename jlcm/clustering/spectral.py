"""Approximate spectral clustering of scalars through weighted landmarks.

Normalised cuts (Shi and Malik, "Normalized cuts and image segmentation", 2000) with K eigenvectors,
rows scaled to unit length before k-means (Ng, Jordan and Weiss, "On spectral clustering", 2001):
without that scaling the eigenvectors of heavy-tailed weights single out a few outliers and leave
the bulk in one cluster. A full affinity matrix is out of reach for millions of weights, so each
group is first summarised by at most 1,024
landmarks: consecutive distinct values share a landmark, placed at their weighted mean.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jlcm.clustering.points import Points, standardise

LANDMARKS = 1024
"""Most landmarks of one group."""

_BATCH_ENTRIES = 1 << 22  # affinity matrix entries held at once
_LLOYD_ITERATIONS = 50


def spectral_codebooks(points: Points, k: int, seed: int) -> np.ndarray:
    """Weighted means of spectral clusters, (G, k) float64 ascending.

    The number of landmarks is the power of two below the larger of 2 k and four times the square
    root of the group's distinct values, between 64 and `LANDMARKS`. The affinity is exp(-(x - y)^2
    / (2 s^2)) with s the standard deviation of the group. Clusters need not be intervals of the
    values. A group with at most k distinct values gets each of them as a codeword. Missing
    codewords repeat the last one.

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
    x, mass, value = _landmarks(points, size)
    embedding = _embedding(x, mass, k)
    labels = _kmeans(embedding, mass, k, seed)
    total = torch.zeros(len(x), k, dtype=torch.float64).scatter_add_(1, labels, mass)
    moment = torch.zeros_like(total).scatter_add_(1, labels, mass * value)
    means = torch.where(total > 0, moment / total, torch.inf).sort(dim=1).values
    found = (total > 0).sum(dim=1, keepdim=True)
    column = torch.minimum(torch.arange(k).expand_as(means), found - 1)
    return means.gather(1, column).numpy()


def _landmarks(points: Points, size: int) -> tuple[Tensor, Tensor, Tensor]:
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
    place, value = gathered(weights * x) / safe, gathered(weights * points.values) / safe
    return torch.from_numpy(place), torch.from_numpy(mass), torch.from_numpy(value)


def _embedding(x: Tensor, mass: Tensor, k: int) -> Tensor:
    """Leading K eigenvectors of the normalised affinity, rows of unit length, (G, L, k)."""
    affinity = torch.exp(-0.5 * (x[:, :, None] - x[:, None, :]).square())
    degree = (affinity * mass[:, None, :]).sum(dim=2)
    # sqrt(m) K sqrt(m) between landmarks has the spectrum of the affinity between all the values
    # they stand for.
    half = (mass / degree).sqrt()
    affinity *= half[:, :, None] * half[:, None, :]
    # Padding decouples and goes to the bottom of the spectrum (a Gaussian kernel has no negative
    # eigenvalue).
    affinity.diagonal(dim1=1, dim2=2).sub_((mass == 0).double())
    vectors = torch.linalg.eigh(affinity).eigenvectors[:, :, -k:]
    return torch.nn.functional.normalize(vectors, dim=2)


def _kmeans(points: Tensor, mass: Tensor, k: int, seed: int) -> Tensor:
    """Weighted k-means++ and Lloyd iterations on (G, L, d) points, labels (G, L)."""
    draws = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    groups, _, width = points.shape
    centres = torch.zeros(groups, k, width, dtype=points.dtype)
    closest = torch.ones_like(mass)
    for column in range(k):
        chance = (mass * closest).cumsum(dim=1)
        pick = torch.searchsorted(chance, draws[column] * chance[:, -1:], right=True)
        pick = pick.clamp_max(points.shape[1] - 1)
        centre = points.gather(1, pick[:, :, None].expand(-1, -1, width))
        centres[:, column] = centre[:, 0]
        distance = (points - centre).square().sum(dim=2)
        closest = distance if column == 0 else torch.minimum(closest, distance)
    labels = None
    for _ in range(_LLOYD_ITERATIONS):
        new = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(
            dim=2
        )
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        member = torch.nn.functional.one_hot(labels, k).to(points.dtype) * mass[:, :, None]
        total = member.sum(dim=1)
        moved = member.transpose(1, 2) @ points / total.clamp_min(1e-300)[:, :, None]
        centres = torch.where((total > 0)[:, :, None], moved, centres)
    return labels

"""Clustering of weight matrix rows, to bring similar output neurons together (Eq. 4)."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import BisectingKMeans, KMeans, MiniBatchKMeans, SpectralClustering
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from jlcm.clustering.scalar import METHODS

FEATURES = ("weights", "quantiles")
"""Row descriptions accepted by `order_rows`."""

MAX_CLUSTERS = 256
"""Cap on the number of row clusters."""

MAX_ROWS = 4096
"""Rows clustered directly; more are first summarised by `CENTRES` mini-batch k-means centres."""

MAX_SPECTRAL_ROWS = 1024
"""The same limit for "spectral", which decomposes the whole row affinity matrix."""

CENTRES = 1024

_QUANTILES = 32


def order_rows(
    matrix: Tensor,
    *,
    clusters: int,
    method: str = "hierarchical",
    normalize: bool = False,
    features: str = "weights",
    seed: int = 0,
) -> Tensor:
    """Row order that makes rows of the same cluster contiguous.

    Clusters are ordered by the mean of their weights, rows within a cluster by their norm; equal
    rows keep their order. At most ``min(clusters, n_o, MAX_CLUSTERS)`` clusters are formed. Above
    `MAX_ROWS` rows (`MAX_SPECTRAL_ROWS` for "spectral") the rows are first assigned to `CENTRES`
    mini-batch k-means centres, and the method clusters these centres, each counted once.

    Args:
        matrix: (n_o, n_i) floating weights, one output neuron per row; zero rows are allowed.
        clusters: wanted number of clusters, at least 1.
        method: one of `jlcm.clustering.scalar.METHODS`, applied to the rows as vectors.
        normalize: cluster rows scaled to unit norm (their direction), as multi-codebook layouts
            with scales want.
        features: "weights" compares rows weight by weight; "quantiles" compares 32 quantiles of
            their weights, so rows with similar distributions are similar whatever the position of
            the weights.
        seed: seed of every random choice; equal seeds give equal orders.

    Returns:
        (n_o,) int64 on the matrix's device: new row i is old row ``order[i]`` (Eq. 4).

    Raises:
        ValueError: on an unknown method or features, clusters below 1, or a malformed matrix.
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown clustering method {method!r}, choose one of {', '.join(METHODS)}"
        )
    if features not in FEATURES:
        raise ValueError(f"unknown features {features!r}, choose one of {', '.join(FEATURES)}")
    if clusters < 1:
        raise ValueError(f"clusters must be at least 1, got {clusters}")
    if matrix.dim() != 2 or matrix.numel() == 0 or not matrix.is_floating_point():
        raise ValueError(
            "matrix must be a non-empty 2-D floating tensor, "
            f"got {tuple(matrix.shape)} {matrix.dtype}"
        )
    rows = matrix.detach().float().cpu()
    if not rows.isfinite().all():
        raise ValueError("matrix contains NaN or Inf; clean the weights before ordering rows")
    means = rows.mean(dim=1, dtype=torch.float64).numpy()
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    count = min(clusters, len(rows), MAX_CLUSTERS)
    if normalize:
        rows = rows / torch.where(norms > 0, norms, 1.0).float()[:, None]
    if features == "quantiles":
        levels = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
        rows = torch.from_numpy(np.quantile(rows.numpy(), levels, axis=1).T.astype(np.float32))
    labels = _labels(rows.numpy(), count, method, seed)
    size = np.maximum(np.bincount(labels, minlength=count), 1)
    cluster_mean = np.bincount(labels, weights=means, minlength=count) / size
    rank = np.argsort(np.argsort(cluster_mean, kind="stable"))
    order = np.lexsort((norms.numpy(), rank[labels]))
    return torch.from_numpy(order).to(matrix.device)


def _labels(rows: np.ndarray, count: int, method: str, seed: int) -> np.ndarray:
    """Cluster of each row, (n_o,) integers below ``count``."""
    if count == 1:
        return np.zeros(len(rows), dtype=np.int64)
    if count == len(rows):
        return np.arange(len(rows))
    if method == "random":
        return np.random.default_rng(seed).integers(count, size=len(rows))
    if len(rows) > (MAX_SPECTRAL_ROWS if method == "spectral" else MAX_ROWS):
        summary = MiniBatchKMeans(CENTRES, n_init=1, batch_size=4 * CENTRES, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than centres
            nearest = summary.fit_predict(rows)
        used, nearest = np.unique(nearest, return_inverse=True)
        return _cluster_rows(summary.cluster_centers_[used], count, method, seed)[nearest]
    return _cluster_rows(rows, count, method, seed)


def _cluster_rows(rows: np.ndarray, count: int, method: str, seed: int) -> np.ndarray:
    if len(rows) <= count:
        return np.arange(len(rows))
    distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
    if len(distinct) <= count:  # the clusterers warn or fail when there is nothing left to split
        return inverse
    match method:
        case "kmeans":
            return KMeans(count, n_init=1, random_state=seed).fit_predict(rows)
        case "bisecting":
            model = BisectingKMeans(count, init="k-means++", random_state=seed)
            return model.fit_predict(rows)
        case "spectral":
            return _spectral(rows, count, seed)
        case "hierarchical":
            # Condensed distances from one matrix product: many times faster than pair by pair.
            tree = linkage(squareform(np.sqrt(_squared_distances(rows)), checks=False), "ward")
            return fcluster(tree, count, "maxclust") - 1
    raise AssertionError(method)


def _spectral(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    squared = _squared_distances(rows)
    # Typical neighbours get an affinity of 1/e whatever the scale of the weights.
    affinity = np.exp(-squared / squared.mean())
    model = SpectralClustering(
        count, affinity="precomputed", n_init=1, assign_labels="kmeans", random_state=seed
    )
    return model.fit_predict(affinity)


def _squared_distances(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows -= rows.mean(axis=0)
    square = np.einsum("ij,ij->i", rows, rows)
    distances = np.maximum(square[:, None] + square[None, :] - 2 * rows @ rows.T, 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances

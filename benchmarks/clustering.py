"""Time and squared error of scalar clustering against other libraries, measured in one run.

    python -m benchmarks.clustering --output clustering.csv

Table 1 clusters one layer of Gaussian fp16 weights into small codebooks. Table 2 gives each of many
small groups its own codebook, in one call and in Python loops. Every codebook is rounded to fp16
and its error measured on all weights, each at its nearest codeword (random labels are kept as they
are). Seconds are the best of ``--repeats`` runs from tensor to codebook and codes, after a warm-up
on a small input.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
import torch
from sklearn.cluster import BisectingKMeans, KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from jlcm.clustering.scalar import METHODS, assign, cluster

try:
    import fastcluster
except ImportError:
    fastcluster = None
try:
    import flash1dkmeans
except ImportError:
    flash1dkmeans = None

SUBSAMPLE = 20_000
REFERENCE = "scikit-learn KMeans"

Result = tuple[np.ndarray | Tensor, Tensor | None]  # codewords, and codes when they are to be kept


def main() -> None:
    """Parse the command line, run both tables and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="inputs about 20 times smaller")
    parser.add_argument("--repeats", type=int, default=3, help="runs, the best counts (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and methods")
    parser.add_argument("--output", type=Path, help="also write all rows to this CSV file")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output: folder {arguments.output.absolute().parent} does not exist")
    scale = 20 if arguments.quick else 1
    generator = torch.Generator().manual_seed(arguments.seed)
    layer = (torch.randn(512 * 512 * 9 // scale, generator=generator) * 0.02).half()
    grouped = (torch.randn(5_000 // scale, 480, generator=generator) * 0.02).half()
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}, "
        f"scikit-learn {sklearn.__version__}, best of {arguments.repeats}"
    )
    one = one_layer(layer, arguments.repeats, arguments.seed)
    show(f"{len(layer):,} fp16 weights, one codebook", one)
    many = many_groups(grouped, arguments.repeats, arguments.seed)
    show(f"{len(grouped):,} groups of {grouped.shape[1]} fp16 weights, one codebook each", many)
    if arguments.output is not None:
        table = pd.concat(
            [one.assign(table="one layer"), many.assign(table="many groups")], ignore_index=True
        )
        write_csv(table, arguments.output)


def one_layer(layer: Tensor, repeats: int, seed: int) -> pd.DataFrame:
    """Every method on one tensor (N,), one row per codebook size and method."""
    small = layer[:2_000]
    rows = []
    tasks = [(k, *task) for k in (4, 8, 16) for task in layer_methods(k, seed)]
    for k, name, run, note in tqdm(tasks, desc="one layer", leave=False):
        if run is None:
            rows.append({"k": k, "method": name, "note": note})
            continue
        run(small)
        seconds, (codebook, codes) = best_time(lambda run=run: run(layer), repeats)
        codebook = torch.as_tensor(codebook).flatten().half().float()
        if codes is None:
            codebook = codebook.sort().values
            codes = assign(layer, codebook[None])
        error = squared_error(layer, codebook[codes.long()])
        rows.append({"k": k, "method": name, "seconds": seconds, "error": error, "note": note})
    return with_ratios(pd.DataFrame(rows))


def layer_methods(
    k: int, seed: int
) -> Iterator[tuple[str, Callable[[Tensor], Result] | None, str]]:
    """Name, function from weights to codebook and note; no function where a package is missing."""
    for method in METHODS:

        def ours(values: Tensor, method: str = method) -> Result:
            codebooks, codes = cluster(values, k=k, method=method, seed=seed)
            return codebooks[0], codes if method == "random" else None

        yield f"jlcm {method}", ours, ""

    def column(values: Tensor) -> np.ndarray:
        return values.float().numpy()[:, None]

    def kmeans(values: Tensor) -> Result:
        return KMeans(k, n_init=1, random_state=seed).fit(column(values)).cluster_centers_, None

    def bisecting(values: Tensor) -> Result:
        return BisectingKMeans(k, random_state=seed).fit(column(values)).cluster_centers_, None

    def ward(values: Tensor) -> Result:
        from scipy.cluster.hierarchy import fcluster

        picked = np.random.default_rng(seed).permutation(len(values))[:SUBSAMPLE]
        sample = column(values)[picked].astype(np.float64)
        labels = fcluster(fastcluster.linkage_vector(sample, "ward"), k, "maxclust") - 1
        return np.bincount(labels, weights=sample[:, 0]) / np.bincount(labels), None

    def flash(values: Tensor) -> Result:
        return flash1dkmeans.kmeans_1d(values.float().numpy(), k, random_state=seed)[0], None

    missing = "not installed"
    yield REFERENCE, kmeans, "n_init=1"
    yield "scikit-learn BisectingKMeans", bisecting, ""
    if fastcluster is None:
        yield "fastcluster Ward", None, missing
    else:
        yield "fastcluster Ward", ward, f"O(N^2): fitted and timed on {SUBSAMPLE:,} weights only"
    if flash1dkmeans is None:
        yield "flash1dkmeans", None, missing
    else:
        yield "flash1dkmeans", flash, "not counting compilation"


def many_groups(grouped: Tensor, repeats: int, seed: int) -> pd.DataFrame:
    """One codebook per row of (G, L): one call, a loop of calls, and a loop of scikit-learn."""
    groups, length = grouped.shape
    sizes = torch.full((groups,), length)
    flat = grouped.flatten()
    rows = []

    def record(k: int, name: str, note: str, repeats: int, run: Callable[[], Tensor]) -> None:
        seconds, codebooks = best_time(run, repeats)
        codebooks = codebooks.half().float().sort(dim=1).values
        codes = assign(flat, codebooks, sizes=sizes).view(groups, length).long()
        error = squared_error(grouped, codebooks.gather(1, codes))
        rows.append({"k": k, "method": name, "seconds": seconds, "error": error, "note": note})

    def looped(k: int, method: str) -> Tensor:
        parts = [
            cluster(row, k=k, method=method, seed=seed)[0]
            for row in tqdm(grouped, desc=f"{method} loop", leave=False)
        ]
        return torch.cat(parts)

    def looped_reference(k: int) -> Tensor:
        # One thread is the fastest setting for so few values at a time.
        with threadpool_limits(1):
            parts = [
                KMeans(k, n_init=1, random_state=seed).fit(row[:, None]).cluster_centers_.T
                for row in tqdm(grouped.float().numpy(), desc="scikit-learn loop", leave=False)
            ]
        return torch.from_numpy(np.concatenate(parts))

    for k in (4, 16):
        for method in ("kmeans", "bisecting", "hierarchical", "spectral"):

            def batched(k: int = k, method: str = method) -> Tensor:
                return cluster(flat, k=k, method=method, sizes=sizes, seed=seed)[0]

            record(k, f"jlcm {method}", "one call", repeats, batched)
            if method != "spectral":
                record(k, f"jlcm {method}", "loop, 1 run", 1, lambda k=k, m=method: looped(k, m))
        record(k, REFERENCE, "loop, 1 run, n_init=1", 1, lambda k=k: looped_reference(k))
    return with_ratios(pd.DataFrame(rows))


def best_time(run: Callable, repeats: int) -> tuple[float, object]:
    """Least wall-clock seconds of ``repeats`` runs, and the last result."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run()
        best = min(best, time.perf_counter() - start)
    return best, result


def squared_error(weights: Tensor, approximation: Tensor) -> float:
    """Sum of squared errors in float64."""
    return float((weights.double() - approximation.double()).square().sum())


def with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Add speed-up and relative error against scikit-learn KMeans at the same codebook size."""
    reference = table[table.method == REFERENCE].set_index("k")
    table["speedup"] = table.k.map(reference.seconds) / table.seconds
    table["error_ratio"] = table.error / table.k.map(reference.error)
    return table


def show(title: str, table: pd.DataFrame) -> None:
    """Print one table."""
    header = {
        "k": "k",
        "method": "method",
        "seconds": "seconds",
        "speedup": "times faster",
        "error": "squared error",
        "error_ratio": "error ratio",
        "note": "note",
    }
    formats = {
        "seconds": "{:.3f}".format,
        "speedup": "{:.1f}".format,
        "error": "{:.5g}".format,
        "error_ratio": "{:.4f}".format,
    }
    print(f"\n{title} (ratios to {REFERENCE})")
    text = table[list(header)].copy()
    for column, form in formats.items():
        text[column] = [("--" if pd.isna(value) else form(value)) for value in text[column]]
    print(text.rename(columns=header).to_string(index=False))


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write the table atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        table.to_csv(temporary, index=False)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


if __name__ == "__main__":
    main()

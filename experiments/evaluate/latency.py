"""Times of a network in memory, with its weights on disk, and packed (Table 2 and the rebuttal).

All variants are timed in turn, round after round, so that a machine that slows down slows all of
them. Their ratios are taken within a round.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import jlcm
from experiments.config import LatencyConfig
from experiments.evaluate.offload import drop_page_cache, offloaded, read_from_disk
from jlcm.config import Invalid
from jlcm.learning.forward import logits_of

#: Widths of the whole network in memory.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: By the type of the device: the variant that others are compared with, whose dtype they share.
REFERENCE = {"cpu": "fp32", "cuda": "fp16"}


@dataclass(kw_only=True)
class Variant:
    """A way to run the network.

    Attributes:
        module: the network on its device.
        dtype: of its inputs.
        prepare: runs before each forward, and is not timed.
        disk: whether the bytes that a forward reads from the disk are counted.
    """

    module: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    prepare: Callable[[], Any] | None = None
    disk: bool = False


def check_latency(options: LatencyConfig) -> None:
    """Check the options of the measurement.

    Raises:
        Invalid: (a ValueError) naming the option.
    """
    sizes = options.batch_sizes
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise Invalid(f"latency.batch_sizes={list(sizes)} must be different sizes of at least 1")
    for name in ("rounds", "repeats", "memory_limit"):
        if getattr(options, name) < 1:
            raise Invalid(f"latency.{name}={getattr(options, name)} must be at least 1")


def measure_latency(
    module: nn.Module,
    inputs: Tensor,
    packed: Path,
    options: LatencyConfig,
    *,
    device: torch.device,
    notes: list[str],
) -> dict[str, Any]:
    """Time one network on one device.

    Args:
        module: the network.
        inputs: images or token ids, as many as the largest batch.
        packed: its packed file.
        options: batch sizes, rounds and the memory limit.
        device: where it runs.
        notes: gets a sentence where the disk could not be measured.

    Returns:
        What `docs/records.md` describes as `results.latency.<device>`.
    """
    reference = REFERENCE[device.type]
    # On the disk of the results: the system's folder for temporary files may lie in memory.
    with tempfile.TemporaryDirectory(prefix="weights-", dir=packed.parent) as folder:
        files = Path(folder) / "weights"
        variants = build_variants(module, packed, files, device, options.memory_limit)
        with torch.inference_mode():
            results: dict[str, Any] = {
                "reference": reference,
                "outputs": compare_outputs(variants, inputs[:1].to(device), reference),
            }
            for size in options.batch_sizes:
                try:
                    timings = time_in_turn(variants, inputs[:size].to(device), options, device)
                except torch.OutOfMemoryError as error:
                    raise Invalid(f"latency.batch_sizes: no memory for {size} inputs") from error
                results[f"batch_{size}"] = summarise(timings, reference, size)
        stored = [file for file in files.iterdir() if file.suffix == ".dat"]
        results["disk"] = {
            "files": len(stored),
            "bytes": sum(file.stat().st_size for file in stored),
            "weight_bytes": sum(t.nbytes for t in variants[reference].module.state_dict().values()),
        }
    read = results[f"batch_{options.batch_sizes[0]}"]["disk_offload"]["read_bytes"]
    results["disk"]["cached"] = None if read is None else read < results["disk"]["bytes"] / 2
    if results["disk"]["cached"] is not False:
        notes.append(
            f"{device.type}: disk_offload may have read from memory: the system "
            + ("did not drop the files" if read is not None else "does not count what it reads")
        )
    if len(options.batch_sizes) > 1:
        results["best_batch"] = best_batches(results, reference)
    return results


def build_variants(
    module: nn.Module, packed: Path, files: Path, device: torch.device, memory_limit: int
) -> dict[str, Variant]:
    """All ways to run a network, by name; `files` is the folder for weights on disk."""
    reference = REFERENCE[device.type]
    shared = PRECISIONS[reference]
    variants = {
        name: Variant(module=copy.deepcopy(module).to(device, dtype), dtype=dtype)
        for name, dtype in PRECISIONS.items()
    }
    on_disk = offloaded(variants[reference].module, files, device=device, memory_limit=memory_limit)
    read = Variant(module=on_disk, dtype=shared, disk=True, prepare=lambda: drop_page_cache(files))
    cached = Variant(module=on_disk, dtype=shared, disk=True)
    loaded = Variant(module=jlcm.load(packed, device=device, dtype=shared), dtype=shared)
    return variants | {"disk_offload": read, "disk_offload_cached": cached, "packed": loaded}


def compare_outputs(
    variants: dict[str, Variant], inputs: Tensor, reference: str
) -> dict[str, float]:
    """Relative distance ||y - y_reference|| / ||y_reference|| of each variant's outputs."""
    outputs = {
        n: logits_of(v.module(_cast(inputs, v.dtype)), n).double().cpu()
        for n, v in variants.items()
    }
    norm = outputs[reference].norm()
    return {n: float((y - outputs[reference]).norm() / norm) for n, y in outputs.items()}


@dataclass(kw_only=True)
class Timing:
    """Forwards of one variant in one round: milliseconds, and bytes read from the disk."""

    ms: list[float]
    read: list[int | None]


def time_in_turn(
    variants: dict[str, Variant], inputs: Tensor, options: LatencyConfig, device: torch.device
) -> dict[str, list[Timing]]:
    """Time each variant in each round, after a forward to warm up."""
    timings: dict[str, list[Timing]] = {name: [] for name in variants}
    for _ in tqdm(range(options.rounds), f"batch {len(inputs)}", unit="round", leave=False):
        for name, variant in variants.items():
            batch = _cast(inputs, variant.dtype)
            variant.module(batch)
            timing = Timing(ms=[], read=[])
            for _ in range(options.repeats):
                if variant.prepare:
                    variant.prepare()
                before = read_from_disk() if variant.disk else None
                with _stopwatch(timing.ms, device):
                    variant.module(batch)
                timing.read.append(None if before is None else read_from_disk() - before)
            timings[name].append(timing)
    return timings


def summarise(
    timings: dict[str, list[Timing]], reference: str, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Medians and ratios of each variant."""
    rounds = {n: [statistics.median(t.ms) for t in found] for n, found in timings.items()}
    results = {}
    for name, found in timings.items():
        times = sorted(ms for timing in found for ms in timing.ms)
        ratios = [a / b for a, b in zip(rounds[name], rounds[reference], strict=True)]
        ms = statistics.median(times)
        results[name] = {
            "ms": ms,
            "ms_quartiles": [times[len(times) // 4], times[(3 * len(times)) // 4]],
            "time_ratio": statistics.median(ratios),
            "per_second": 1000 * batch_size / ms,
        }
        read = [bytes_ for timing in found for bytes_ in timing.read if bytes_ is not None]
        if name.startswith("disk"):
            results[name]["read_bytes"] = statistics.median(read) if read else None
    return results


def best_batches(results: dict[str, Any], reference: str) -> dict[str, dict[str, Any]]:
    """Each variant at the batch size with its highest throughput."""
    sizes = [int(key.removeprefix("batch_")) for key in results if key.startswith("batch_")]
    best = {}
    for name in results[f"batch_{sizes[0]}"]:
        size = max(sizes, key=lambda s: results[f"batch_{s}"][name]["per_second"])
        found = results[f"batch_{size}"][name]
        best[name] = {"batch_size": size, "ms": found["ms"], "per_second": found["per_second"]}
    for found in best.values():
        found["throughput_ratio"] = found["per_second"] / best[reference]["per_second"]
    return best


def _cast(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in the dtype of a variant, token ids as they are."""
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


@contextmanager
def _stopwatch(times: list[float], device: torch.device) -> Iterator[None]:
    """Append the milliseconds of what runs inside, a GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    times.append(1000 * (time.perf_counter() - start))

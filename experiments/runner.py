"""One run: network and data -> compress -> save -> reload -> evaluate -> record."""

import hashlib
import importlib.metadata
import json
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import jlcm
from experiments.config import Config
from experiments.data import Data, check_files, load_data
from experiments.evaluate.vision import accuracy, distance, predict
from experiments.models import Network, load_network
from experiments.records import read_record, write_record
from jlcm.config import ALLOCATIONS, REORDERINGS, Invalid, check_alpha, check_choice
from jlcm.files import replacing

PACKED_FILE = "packed.safetensors"


def run(config: Config, *, run_id: str, identity: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do one run, or return the record of a finished one.

    Args:
        config: the whole configuration.
        run_id: name of the run.
        identity: the part of the configuration that decides the result; it goes into the record.
        folder: of the run.

    Returns:
        The record. Its keys are described in `docs/records.md`.

    Raises:
        ValueError, OSError: for bad options, data or weights, before long work where possible.
    """
    encoding, init = check_options(config)
    stages = learning_options(config)
    if not config.force and (record := read_record(folder)) is not None:
        return record
    device = choose_device(config.compute.device)
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    check_files(config.data)
    finished = folder / "learning" if config.stages_dir is None else Path(config.stages_dir)
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        network = load_network(config.model, config.data, seed=config.seed, device=device)
        data = load_data(
            config.data, network.preprocessing, classes=network.classes, seed=config.seed
        )
    with _timed(seconds, "compress"), _memory_errors():
        compressed = jlcm.compress(
            network.module,
            alpha=config.alpha,
            init=init,
            encoding=encoding,
            reorder=config.reorder.mode,
            example_inputs=torch.zeros(1, 3, *[network.preprocessing.crop] * 2),
            importance=config.learn.importance,
            allocation=config.learn.allocation,
            calibration=_calibration_images(data) if needs_calibration(config) else None,
            **stages,
            folder=finished,
            seed=config.seed,
            device=device,
        )
    path = folder / PACKED_FILE
    with _timed(seconds, "save"):
        jlcm.save(compressed, path, architecture=network.architecture)
    with _timed(seconds, "evaluate_original"):
        original, labels = _original_logits(config, network, data, identity, device)
    with _timed(seconds, "reload"):
        packed = jlcm.load(path, device=device)
    with _timed(seconds, "evaluate_packed"):
        logits, _ = _predict(config, packed, data, device, "packed")
    footprint = jlcm.footprint(path)
    record = {
        "run_id": run_id,
        "config": identity,
        "original": accuracy(original, labels),
        "packed": accuracy(logits, labels) | distance(original, logits),
        "footprint": footprint.as_dict(),
        "file": str(path),
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": str(device),
        "versions": versions(),
        "notes": compressed.compression.notes,
        "layers": [asdict(layer) for layer in footprint.layers],
        "stages": {name: asdict(stage) for name, stage in stages.items() if stage},
        "learning": [asdict(result) for result in compressed.learning],
    }
    write_record(folder, record)
    if config.stages_dir is None:  # only needed to go on after a stop
        shutil.rmtree(finished, ignore_errors=True)
    return read_record(folder)


def check_options(config: Config) -> tuple[jlcm.Encoding, jlcm.Init]:
    """Check every option that needs no data.

    Raises:
        Invalid: (a ValueError) naming the option and the valid choices.
    """
    check_alpha(config.alpha)
    check_choice("reorder", config.reorder.mode, REORDERINGS)
    check_choice("learn.allocation", config.learn.allocation, ALLOCATIONS)
    if config.learn.importance is not None:
        check_choice("learn.importance", config.learn.importance, ("fisher",))
    check_choice("output", config.output, ("table", "json"))
    check_choice("tracking", config.tracking.mode, ("off",))
    if config.compute.batch_size < 1 or config.compute.workers < 0:
        raise Invalid("compute.batch_size must be at least 1 and compute.workers at least 0")
    if config.data.limit is not None and config.data.limit < 1:
        raise Invalid(f"data.limit={config.data.limit} must be at least 1, or null for all samples")
    encoding = jlcm.Encoding(
        kind=config.encoding.kind,
        budget=config.encoding.budget,
        fold_bn=config.encoding.fold_bn,
        first_last=config.encoding.first_last,
        refit_scales=config.encoding.refit_scales,
    )
    return encoding, jlcm.Init(method=config.init.method, features=config.init.features)


def learning_options(config: Config) -> dict[str, Any]:
    """The stages of learning as arguments of `jlcm.compress`, None where one is left out.

    Raises:
        Invalid: (a ValueError) for an option that does not exist or is out of range.
    """
    chosen = config.learn
    try:
        learn = jlcm.Learn(kind=chosen.kind, **_tuples(chosen.options))
        blocks = None if chosen.blocks is None else jlcm.Blocks(**_tuples(chosen.blocks))
        distill = None if chosen.distill is None else jlcm.Distill(**_tuples(chosen.distill))
    except TypeError as error:  # an unknown field of the dataclass
        raise Invalid(f"learn: {error}") from error
    learn = None if learn.kind == "none" else learn
    return {"learn": learn, "blocks": blocks, "distill": distill}


def needs_calibration(config: Config) -> bool:
    """Whether any stage looks at calibration images."""
    learn = config.learn
    plain = learn.allocation == "uniform" and learn.importance is None
    return not (plain and learn.kind == "none" and learn.blocks is None and learn.distill is None)


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _calibration_images(data: Data) -> Tensor:
    """Calibration images as one tensor; labels are left behind."""
    if data.calibration is None:
        raise Invalid("learning needs calibration images: set data.calibration_list, or learn=none")
    return torch.stack([image for image, _ in tqdm(data.calibration, "calibration", leave=False)])


def choose_device(device: str) -> torch.device:
    """Resolve auto, and refuse a GPU that is not there.

    Raises:
        Invalid: for an unknown device, or a CUDA device that PyTorch does not see.
    """
    check_choice("compute.device", device.partition(":")[0], ("auto", "cpu", "cuda"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Invalid(f"compute.device={device}, but PyTorch sees no GPU: use compute.device=auto")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("jlcm", "torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_rss_bytes() -> int:
    """Largest resident set size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts KiB


def _original_logits(
    config: Config, network: Network, data: Data, identity: dict[str, Any], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Outputs of the original network: computed once for all runs of a sweep, then read."""
    what = {k: identity[k] for k in ("model", "data", "seed")} | versions()
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(config.results_dir) / "originals" / f"{name}.safetensors"
    if path.is_file() and not config.force:
        kept = load_file(path)
        return kept["logits"], kept["labels"]
    logits, labels = _predict(config, network.module.to(device), data, device, "original")
    with replacing(path) as temporary:
        save_file({"logits": logits, "labels": labels}, temporary)
    return logits, labels


def _predict(config, module, data, device, description) -> tuple[Tensor, Tensor]:
    return predict(
        module,
        data.test,
        device=device,
        batch_size=config.compute.batch_size,
        workers=config.compute.workers,
        description=description,
    )


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Say in one line what to do where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has an exception of its own for GPUs, and a plain RuntimeError on the CPU.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError):
            if "can't allocate memory" not in str(error):
                raise
        raise ValueError(
            "out of memory while compressing: lower +learn.options.memory (bytes of activations), "
            "+learn.options.forward_batch or +learn.distill.batch_size; the same command goes on "
            "after the layers that are finished"
        ) from error


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)

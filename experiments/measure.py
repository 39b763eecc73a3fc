"""One measurement: memory, times or 16-bit accuracy of a network, and its record."""

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jlcm
from experiments.config import Config, DiffusionModelConfig, LanguageModelConfig, LearnConfig
from experiments.data import check_files, load_data
from experiments.evaluate.latency import check_latency, measure_latency
from experiments.evaluate.memory import check_footprint, measure_footprint, measure_language
from experiments.evaluate.offload import check_offload
from experiments.evaluate.precision import measure_precision
from experiments.machine import choose_device, describe_machine, limit_threads, versions
from experiments.models import Network, load_network
from experiments.options import compressor, needs_calibration
from experiments.records import PACKED_FILE, write_record
from experiments.tracking import Tracker
from jlcm.architecture import Architecture
from jlcm.config import Invalid


def check_measurement(config: Config) -> None:
    """Check the options of a measurement, and that its data is there.

    Raises:
        ValueError, OSError: for bad options or data.
    """
    if isinstance(config.model, LanguageModelConfig) and config.task == "precision":
        raise Invalid("task=precision measures networks of images")
    if isinstance(config.model, DiffusionModelConfig):
        raise Invalid(f"task={config.task} is not for text-to-image pipelines")
    match config.task:
        case "footprint":
            check_footprint(config.footprint)
        case "latency":
            check_latency(config.latency)
            _packer(config)
        case "precision":
            check_files(config.data)


def measure(
    config: Config, *, run_id: str, identity: dict[str, Any], folder: Path, tracker: Tracker
) -> None:
    """Do one measurement and write its record, whose keys are described in `docs/records.md`.

    Args:
        config: the whole configuration, checked; its `task` is a measurement.
        run_id: name of the run.
        identity: what the measurement looks at; it goes into the record.
        folder: of the run.
        tracker: is started at the end, so that it does not disturb the measurement.
    """
    devices = choose_devices(config.compute.device)
    limit_threads(config.compute.threads)
    start, notes = time.perf_counter(), []
    match config.task:
        case "footprint":
            results = _footprint(config, devices, notes)
        case "latency":
            results = _latency(config, folder, devices, notes)
        case "precision":
            devices = devices[-1:]
            results = _precision(config, devices[0])
    record = {
        "run_id": run_id,
        "task": config.task,
        "config": identity,
        "results": {config.task: results},
        **({"file": str(folder / PACKED_FILE)} if config.task == "latency" else {}),
        "seconds": {"measure": round(time.perf_counter() - start, 3)},
        "device": ", ".join(device.type for device in devices),
        "machine": describe_machine(),
        "versions": versions("accelerate"),
        "notes": notes,
    }
    write_record(folder, record)
    tracker.start(identity | {"compute": asdict(config.compute)}, config.task)


def choose_devices(device: str) -> list[torch.device]:
    """The device that is asked for; auto means the CPU, and the GPU where there is one.

    Raises:
        Invalid: (a ValueError) as `choose_device` does.
    """
    found = choose_device(device)
    return [torch.device("cpu"), found] if device == "auto" and found.type != "cpu" else [found]


def _footprint(config: Config, devices: list[torch.device], notes: list[str]) -> dict[str, Any]:
    if not isinstance(config.model, LanguageModelConfig):
        return measure_footprint(_network(config), config.footprint, devices, notes)
    from experiments.models.language import untrained_language_model  # imports transformers

    notes.append("counted only: the weights lie on the meta device")
    module = untrained_language_model(config.model, device="meta")
    return measure_language(module, config.data.window, config.footprint)


def _network(config: Config) -> Network:
    """The network with random weights, or `model.weights`."""
    cpu = torch.device("cpu")
    return load_network(config.model, config.data, seed=config.seed, device=cpu, trained=False)


def _packer(config: Config) -> partial:
    """What compresses the network that is timed: without learning, which hardly changes times."""
    if config.method.name == "jlcm":
        config = replace(config, learn=LearnConfig(rotation=config.learn.rotation))
    if needs_calibration(config):
        raise Invalid(
            f"task=latency compresses without data, which method={config.method.name} needs"
        )
    return compressor(config)


def _latency(
    config: Config, folder: Path, devices: list[torch.device], notes: list[str]
) -> dict[str, Any]:
    check_offload()  # a finished run needs no accelerate
    path = folder / PACKED_FILE
    module, inputs, options, architecture = _timed_network(config)
    packed = _packer(config)(
        module,
        alpha=config.alpha,
        calibration=None,
        folder=None,
        seed=config.seed,
        device=devices[-1],
        **options,
    )
    jlcm.save(packed, path, architecture=architecture)
    del packed  # what is timed is the file, loaded again
    times = {
        device.type: measure_latency(
            module, inputs, path, config.latency, device=device, notes=notes
        )
        for device in devices
    }
    return times | {"packed_file": jlcm.footprint(path).as_dict()}


def _timed_network(
    config: Config,
) -> tuple[nn.Module, Tensor, dict[str, Any], Architecture | None]:
    """Network, random inputs of the largest batch, options of compression, architecture."""
    generator = torch.Generator().manual_seed(config.seed)
    count = max(config.latency.batch_sizes)
    if not isinstance(config.model, LanguageModelConfig):
        network = _network(config)
        side = network.preprocessing.crop
        images = torch.randn(count, 3, side, side, generator=generator)
        options = {"example_inputs": torch.zeros(1, 3, side, side)}
        return network.module, images, options, network.architecture
    from experiments.models.language import decoder_filter, untrained_language_model

    module = untrained_language_model(config.model, device="cpu", seed=config.seed)
    shape = count, config.data.window
    tokens = torch.randint(0, module.config.vocab_size, shape, generator=generator)
    chosen = decoder_filter(module, config.model.embeddings)
    return module, tokens, {"example_inputs": tokens[:1, :8], "filter_fn": chosen}, None


def _precision(config: Config, device: torch.device) -> dict[str, Any]:
    network = load_network(config.model, config.data, seed=config.seed, device=device)
    data = load_data(config.data, network.preprocessing, classes=network.classes, seed=config.seed)
    return measure_precision(network, data.test, config.compute, device)

"""One run: network and data -> compress -> save -> reload -> evaluate -> record."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import jlcm
from experiments.config import CommonsenseConfig, Config, PromptsConfig
from experiments.data import check_files
from experiments.machine import (
    choose_device,
    describe_machine,
    keep_freed_blocks,
    limit_threads,
    peak_rss_bytes,
    reset_peak_rss,
    versions,
)
from experiments.measure import check_measurement, measure
from experiments.options import check_options, compressor, needs_calibration, stages_of
from experiments.records import PACKED_FILE, RECORD, read_record, write_record
from experiments.subject import Subject
from experiments.tracking import OFF, Tracker
from experiments.vision import Classifier
from jlcm.locks import once, seconds_waited


def run(
    config: Config,
    *,
    run_id: str,
    identity: dict[str, Any],
    folder: Path,
    tracker: Tracker = OFF,
) -> dict[str, Any]:
    """Do one run or measurement, or return the record of a finished one.

    A process that comes to a run that another one works on waits for it.

    Args:
        config: the whole configuration.
        run_id: name of the run.
        identity: the part of the configuration that decides the result; it goes into the record.
        folder: of the run.
        tracker: mirrors the run; the caller closes it.

    Returns:
        The record. Its keys are described in `docs/records.md`.

    Raises:
        ValueError, OSError: for bad options, data or weights, before long work where possible.
    """
    check_options(config)
    if config.task == "compress":
        work = partial(_compress, compress=compressor(config))
    else:
        check_measurement(config)
        work = measure
    with once(folder / RECORD, again=config.force, lock=folder) as missing:
        if missing:
            work(config, run_id=run_id, identity=identity, folder=folder, tracker=tracker)
    record = read_record(folder)
    if missing:
        tracker.log_record(record)
    else:
        tracker.mirror(record)
    return record


def _compress(
    config: Config,
    *,
    compress: partial,
    run_id: str,
    identity: dict[str, Any],
    folder: Path,
    tracker: Tracker,
) -> None:
    device = choose_device(config.compute.device)
    limit_threads(config.compute.threads)
    check_subject(config)
    finished = folder / "learning" if config.stages_dir is None else Path(config.stages_dir)
    seconds: dict[str, float] = {}
    waited = seconds_waited()
    keep_freed_blocks()
    reset_peak_rss()
    with _timed(seconds, "load"):
        subject = load_subject(config, identity, device, folder)
    tracker.start(identity | {"compute": asdict(config.compute)})
    with _timed(seconds, "compress"), _memory_errors():
        compressed = compress(
            subject.module,
            alpha=config.alpha,
            filter_fn=subject.filter_fn,
            calibration=subject.calibration() if needs_calibration(config) else None,
            example_inputs=subject.example_inputs,
            folder=finished,
            seed=config.seed,
            device=device,
            on_result=tracker.log_result,
        )
    path = folder / PACKED_FILE
    with _timed(seconds, "save"):
        jlcm.save(compressed, path, architecture=subject.architecture)
    learning = compressed.learning
    del compressed  # what is evaluated is the file, loaded again
    with _timed(seconds, "evaluate_original"):
        original = subject.original()
    with _timed(seconds, "reload"):
        reloaded = jlcm.load(path, device=device)
    with _timed(seconds, "evaluate_packed"):
        packed = subject.packed(reloaded)
    if (wait := seconds_waited() - waited) > 0:
        seconds["wait"] = round(wait, 3)
    footprint = jlcm.footprint(path)
    record = {
        "run_id": run_id,
        "config": identity,
        "original": original,
        "packed": packed,
        "footprint": footprint.as_dict(),
        "file": str(path),
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": str(device),
        "machine": describe_machine(),
        "versions": versions(),
        "notes": reloaded.compression.notes,
        "layers": [asdict(layer) for layer in footprint.layers],
        "stages": stages_of(compress.keywords),
        "learning": [asdict(result) for result in learning],
    }
    write_record(folder, record)
    if config.stages_dir is None:  # only needed to go on after a stop
        shutil.rmtree(finished, ignore_errors=True)


def check_subject(config: Config) -> None:
    """Check the options and files of network and data.

    Raises:
        ValueError, OSError: naming the option, before anything is fetched.
    """
    if isinstance(config.data, CommonsenseConfig):
        from experiments.language import check_language

        check_language(config)
    elif isinstance(config.data, PromptsConfig):
        from experiments.diffusion import check_diffusion

        check_diffusion(config)
    else:
        check_files(config.data)


def load_subject(
    config: Config, identity: dict[str, Any], device: torch.device, folder: Path
) -> Subject:
    """The network and its data.

    Raises:
        ValueError, OSError: for a network or data that cannot be had.
    """
    if isinstance(config.data, CommonsenseConfig):
        from experiments.language import LanguageSubject  # imports transformers

        return LanguageSubject(config, identity, device)
    if isinstance(config.data, PromptsConfig):
        from experiments.diffusion import DiffusionSubject  # imports diffusers

        return DiffusionSubject(config, identity, device, folder)
    return Classifier(config, identity, device)


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
    """Seconds of a stage without those spent waiting for other processes."""
    start = time.perf_counter() - seconds_waited()
    yield
    seconds[stage] = round(time.perf_counter() - seconds_waited() - start, 3)

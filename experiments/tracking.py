"""W&B as a mirror of the records: results while a run learns, everything else at its end.

The record on disk is the truth. Whatever fails with W&B once its package is there is said in one
line, and the run goes on without it.
"""

import functools
import importlib
import io
import math
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from experiments.config import TrackingConfig
from experiments.runs import flatten
from jlcm.config import Invalid, check_choice
from jlcm.files import replacing

MODES = ("off", "offline", "online")
INSTALL = 'pip install -c constraints.txt -e ".[tracking]"'
#: Seconds to wait for the server at the start of a run, and for uploads at its end.
INIT_TIMEOUT, FINISH_TIMEOUT = 30, 120
#: Groups of metrics, each with what its points are numbered by.
STEPS = {"learn": "learn/part", "curve": "curve_step", "distill": "distill/epoch"}


class Tracker:
    """Tracks nothing, and names what a tracker can be told. Leave it as a context to close it."""

    def start(self, config: dict[str, Any], job_type: str = "compress") -> None:
        """Begin, or go on with, the run.

        Args:
            config: what W&B shows and groups runs by.
            job_type: what W&B tells kinds of runs apart by.
        """

    def log_result(self, result: Any) -> None:
        """Log what learning has just finished (`on_result` of `jlcm.compress`)."""

    def log_record(self, record: dict[str, Any]) -> None:
        """Log the record of the finished run: what no earlier call has logged."""

    def log_figures(self, figures: dict[str, Any]) -> None:
        """Log matplotlib figures as images, by name."""

    def mirror(self, record: dict[str, Any]) -> None:
        """Log a run that has finished before, unless all of it has been logged already."""

    def close(self, *, failed: bool = False) -> None:
        """End the run."""

    def __enter__(self) -> "Tracker":
        """Nothing begins before `start`."""
        return self

    def __exit__(self, kind, error, trace) -> None:
        """End the run, as failed after an exception."""
        self.close(failed=kind is not None)


OFF = Tracker()


def open_tracker(
    config: TrackingConfig,
    *,
    results_dir: Path,
    run_id: str,
    group: str | None = None,
    anew: bool = False,
) -> Tracker:
    """What mirrors a run.

    Args:
        config: where to.
        results_dir: all of W&B's files go to its folder `wandb`.
        run_id: of the run, on W&B too.
        group: name of the experiment that the run belongs to.
        anew: replace what W&B has of this run in place of going on with it.

    Raises:
        Invalid: (a ValueError) for an unknown mode, or if W&B is not installed.
    """
    check_choice("tracking.mode", config.mode, MODES)
    if config.mode == "off":
        return OFF
    root = Path(results_dir).absolute() / "wandb"
    wandb = import_wandb(root, needed_by=f"tracking={config.mode}")
    return WandbTracker(wandb, config, root, run_id, group, anew)


def import_wandb(root: Path, *, needed_by: str) -> Any:
    """W&B's module, told to keep its files in a folder rather than below the home folder.

    Raises:
        Invalid: (a ValueError) if it is not installed.
    """
    for name in ("cache", "data"):
        os.environ.setdefault(f"WANDB_{name.upper()}_DIR", str(root / name))
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise Invalid(f"{needed_by} needs W&B ({error}): {INSTALL}") from error


def never_fatal(method: Callable) -> Callable:
    """Give tracking up, with a warning, where a method of a tracker fails."""

    @functools.wraps(method)
    def guarded(self: "WandbTracker", *arguments, **options) -> None:
        if not self.failed:
            try:
                method(self, *arguments, **options)
            except Exception as error:  # the run is worth more than any of them
                self.give_up(error)

    return guarded


class WandbTracker(Tracker):
    """Mirrors one run to W&B.

    Attributes:
        failed: whether tracking was given up.
    """

    def __init__(
        self,
        wandb: Any,
        config: TrackingConfig,
        root: Path,
        run_id: str,
        group: str | None,
        anew: bool,
    ) -> None:
        """Remember what to do; arguments as in `open_tracker`."""
        self.wandb, self.config, self.root, self.run_id = wandb, config, root, run_id
        self.group, self.anew, self.failed = group, anew, False
        self.run, self.told, self.logged = None, 0, dict.fromkeys(STEPS.values(), 0)
        self.complete, self.finished = root / "complete" / run_id, False

    @never_fatal
    def start(self, config: dict[str, Any], job_type: str = "compress") -> None:
        """Begin, or go on with, the run."""
        wandb, online = self.wandb, self.config.mode == "online"
        self.root.mkdir(parents=True, exist_ok=True)
        self.complete.unlink(missing_ok=True)
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            silent=True,
            x_disable_stats=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
        )
        wandb.setup(settings)
        # Asked here, because wandb.init would wait for a key to be typed.
        if online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no account: run `wandb login`, or choose tracking=offline")
        self.run = wandb.init(
            mode=self.config.mode,
            project=self.config.project,
            entity=self.config.entity,
            id=self.run_id,
            name=self.run_id,
            group=self.group,
            job_type=job_type,
            config=config,
            dir=self.root.parent,
            # Offline nothing is known of earlier parts, so that all is logged again.
            resume="allow" if online and not self.anew else None,
            reinit="create_new",
            settings=settings,
        )
        for prefix, step in STEPS.items():
            self.run.define_metric(step)
            self.run.define_metric(f"{prefix}/*", step_metric=step, summary="none")
            self.logged[step] = self.run.summary.get(step) or 0
        where = self.run.url if online else Path(self.run.dir).parent
        tqdm.write(f"tracking: {where}", file=sys.stderr)

    @never_fatal
    def log_result(self, result: Any) -> None:
        """Log what learning has just finished."""
        self._log_learning(asdict(result))

    @never_fatal
    def log_record(self, record: dict[str, Any]) -> None:
        """Log the record of the finished run: what no earlier call has logged."""
        self.told = 0
        for result in record.get("learning", []):
            self._log_learning(result)
        if "layers" in record:
            self.run.log({"layers": self.wandb.Table(*layer_table(record["layers"]))})
        self.run.summary.update(summary_of(record))
        more = ("stages", "device", "machine", "versions", "notes")
        self.run.config.update({key: record[key] for key in more if key in record})
        if self.config.artifact and "file" in record:
            artifact = self.wandb.Artifact(f"packed-{self.run_id}", type="model")
            artifact.add_file(record["file"])
            self.run.log_artifact(artifact)
        self.finished = True

    @never_fatal
    def log_figures(self, figures: dict[str, Any]) -> None:
        """Log matplotlib figures as images, by name."""
        images = {}
        for name, figure in figures.items():
            figure.savefig(file := io.BytesIO(), format="png")
            images[f"figures/{name}"] = self.wandb.Image(Image.open(file))
        self.run.log(images)

    @never_fatal
    def mirror(self, record: dict[str, Any]) -> None:
        """Log a run that has finished before, unless all of it has been logged already."""
        if not self.complete.exists():
            self.start(record["config"], record.get("task", "compress"))
            self.log_record(record)

    @never_fatal
    def close(self, *, failed: bool = False) -> None:
        """End the run."""
        if self.run is None:
            return
        self.run.finish(exit_code=int(failed))
        if self.finished:
            self._remove_stopped()
            with replacing(self.complete) as temporary:
                temporary.write_text(f"{self.config.mode}\n")

    def give_up(self, error: Exception) -> None:
        """Warn once and log nothing more."""
        self.failed = True
        reason = " ".join(str(error).split()) or type(error).__name__
        tqdm.write(f"warning: W&B: {reason}; the run goes on untracked", file=sys.stderr)
        with suppress(Exception):  # ends the run; the next one starts W&B's own process anew
            self.wandb.teardown(exit_code=1)

    def _log_learning(self, result: dict[str, Any]) -> None:
        """Log a layer, block or epoch, or all epochs of distillation as they are recorded."""
        if "history" in result:
            for epoch, losses in enumerate(result["history"], 1):
                losses = dict(zip(("training_loss", "held_out_loss"), losses, strict=True))
                self._log_point("distill", epoch, losses)
        elif "epoch" in result:
            self._log_point("distill", result["epoch"], result)
        else:
            self.told += 1
            if "best_epoch" in result:  # a block
                kept = "learned" if result["best_epoch"] else "initialisation"
                result = {"kept": kept} | result
            if self._log_point("learn", self.told, result):
                # W&B does not apply a definition of metrics to names with dots.
                name = f"curve/{result['name']}".replace(" .. ", " to ").replace(".", "/")
                for step, loss in enumerate(result["curve"]):
                    self.run.log({"curve_step": step, name: loss})

    def _log_point(self, prefix: str, number: int, values: dict[str, Any]) -> bool:
        """Log a point unless an earlier attempt at this run has done so; returns whether it did."""
        step = STEPS[prefix]
        if number <= self.logged[step]:
            return False
        self.logged[step] = number
        named = {f"{prefix}/{key}": value for key, value in values.items() if _is_scalar(value)}
        self.run.log(named | {step: number})
        return True

    def _remove_stopped(self) -> None:
        """Remove what stopped attempts at this run left for `wandb sync`, which has all of it."""
        for log in self.root.glob(f"offline-run-*/run-{self.run_id}.wandb"):
            if log.parent != Path(self.run.dir).parent:
                shutil.rmtree(log.parent, ignore_errors=True)


def summary_of(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record that runs are compared by, under the names that W&B shows."""
    if "results" in record:  # a measurement
        values = flatten(record["results"])
        return {k.replace(".", "/"): v for k, v in values.items() if _is_scalar(v)}
    values = dict(record["packed"])
    values |= {f"original/{key}": value for key, value in record["original"].items()}
    sizes = ("alpha_layers", "alpha_total", "file_bytes")
    values |= {key: record["footprint"][key] for key in sizes}
    values |= {f"seconds/{stage}": value for stage, value in record["seconds"].items()}
    values["peak_rss_bytes"] = record["peak_rss_bytes"]
    for result in record.get("learning", []):
        if "history" in result:
            values |= {f"distill/{key}": value for key, value in result.items()}
    return {key: value for key, value in values.items() if _is_scalar(value)}


def layer_table(layers: list[dict[str, Any]]) -> tuple[list[str], list[list]]:
    """Columns and rows of the record's lines per layer; shapes as text."""
    columns = list(layers[0]) if layers else ["name"]
    rows = [layer | {"shape": "x".join(map(str, layer["shape"]))} for layer in layers]
    return columns, [[row[column] for column in columns] for row in rows]


def _is_scalar(value: Any) -> bool:
    """Whether W&B can draw or show it: a finite number or a text."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int | str) and value != ""

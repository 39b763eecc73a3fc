"""A sweep in which each run gets its turn; the failed ones are listed at the end.

Hydra finds plugins in the namespace package `hydra_plugins`.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

#: What submitit and Ray raise where a process is killed, named since they may not be installed.
_DEATHS = {"UncompletedJobError", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError"}


class PatientSweeper(BasicSweeper):
    """Hydra's own sweeper for jobs that return None, or what went wrong in one line."""

    def setup(self, *, hydra_context, task_function, config) -> None:
        """Check the number of jobs and make the launcher.

        Raises:
            CompactHydraException: `compute.jobs` does not fit the launcher.
        """
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        jobs = config.compute.jobs
        if jobs is not None and jobs < 1:
            raise CompactHydraException(f"error: compute.jobs={jobs} must be at least 1")
        if jobs is not None and isinstance(self.launcher, BasicLauncher):
            raise CompactHydraException(
                f"error: compute.jobs={jobs} needs compute=joblib, submitit_local, submitit_slurm "
                "or ray; compute=local does one run after another"
            )
        self.launcher = _Launcher(self.launcher, hydra_context.config_loader, config)

    def sweep(self, arguments: list[str]):
        """Run all jobs.

        Raises:
            CompactHydraException: (Hydra then exits with 1) listing the jobs that failed, or saying
                that `results_dir` cannot be written.
        """
        try:
            returns = super().sweep(arguments)
        except OSError as error:
            raise CompactHydraException(f"error: the sweep cannot start: {error}") from error
        if failed := self.launcher.failed:
            count = sum(map(len, self.overrides))
            lines = [f"  {' '.join(job)}: {why}" for job, why in failed]
            raise CompactHydraException(
                "\n".join([f"error: {len(failed)} of {count} runs failed:", *lines])
            )
        return returns


class _Launcher:
    """Launches with another launcher, and keeps what failed: overrides and reason."""

    def __init__(self, launcher: Launcher, loader, config: DictConfig) -> None:
        self.launcher, self.loader, self.config = launcher, loader, config
        self.failed: list[tuple[Sequence[str], str]] = []

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            returns = self.launcher.launch(jobs, initial_job_idx=initial_job_idx)
        except Exception as error:
            killed = isinstance(error, BrokenExecutor) or type(error).__name__ in _DEATHS
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if not killed:
                name = type(self.launcher).__name__
                raise CompactHydraException(f"error: {name} failed: {reason}") from error
            if len(jobs) == 1:
                self.failed.append((jobs[0], f"its process was killed ({reason})"))
            else:
                self._launch_missing(jobs, initial_job_idx)
            return []
        self.failed += [(job.overrides, job.return_value) for job in returns if job.return_value]
        return returns

    def _launch_missing(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        # Which run it was is not always known, and others may have been stopped with it.
        print("a run's process was killed: what is missing starts again", file=sys.stderr)
        size = self.config.compute.jobs or 1
        size = size if len(jobs) > size else 1
        for start in range(0, len(jobs), size):
            group = [job for job in jobs[start : start + size] if not self._finished(job)]
            if group:
                self.launch(group, initial_job_idx + start)

    def _finished(self, overrides: Sequence[str]) -> bool:
        job = self.loader.load_sweep_config(self.config, list(overrides))
        record = Path(job.hydra.sweep.dir) / job.hydra.sweep.subdir / "record.json"
        return record.is_file() and not job.force

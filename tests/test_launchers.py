"""Sweeps in several processes: runs are done once, whatever is killed, and failures are listed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from hydra import compose, initialize
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from experiments.config import cores_per_job, register, run_id
from experiments.overrides import check_overrides
from hydra_plugins.patient_sweeper import _Launcher

register()

ROOT = Path(__file__).parent.parent
#: Runs of a second, of a network that trains on the digits in seconds.
SMALL = [
    "model=timm",
    "model.name=test_byobnet",
    "data.epochs=1",
    "data.limit=64",
    "init=random",
    "learn=none",
]
LAUNCHERS = ["joblib", "submitit_local", "submitit_slurm", "ray"]


def needs(name):
    plugin = f"hydra_{name}_launcher"
    missing = find_spec(f"hydra_plugins.{plugin}") is None
    return pytest.mark.skipif(missing, reason=f"{plugin} is not installed: docs/launchers.md")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache, tmp_path):
    """Start run.py with its results in a folder of the test."""
    started = []

    def begin(*arguments, program=("run.py",), **environment):
        process = subprocess.Popen(
            [sys.executable, *program, *arguments, *SMALL, f"results_dir={tmp_path}"],
            cwd=ROOT,
            env=os.environ | {"JLCM_CACHE": str(cache), "PYTHONPATH": python_path()} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def python_path():
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def finish(process, *, failed=""):
    """Wait for a sweep; the runs that failed are listed, each with its overrides."""
    output, errors = process.communicate(timeout=300)
    summary = errors.partition("runs failed:")[2]
    assert process.returncode == bool(failed), errors[-3000:]
    assert failed in summary and "Traceback" not in errors, errors[-3000:]
    return output, errors


def records(folder):
    found = [json.loads(path.read_text()) for path in folder.glob("runs/*/record.json")]
    return {record["config"]["alpha"]: record for record in found}


def stamps(folder):
    """What changes when a record or a packed file is written again."""
    files = [p for p in folder.glob("runs/*/*") if p.name in ("record.json", "packed.safetensors")]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def wait_for_records(folder, process, *, count):
    deadline = time.monotonic() + 120
    while len(list(folder.glob("runs/*/record.json"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@needs("joblib")
def test_killed_sweep_goes_on_with_what_is_missing(start, tmp_path):
    process = start("-m", "compute=joblib", "compute.jobs=1", "alpha=3,4,5,6")
    wait_for_records(tmp_path, process, count=1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path.parent for path in tmp_path.glob("runs/*/record.json")}
    before = {path: stamp for path, stamp in stamps(tmp_path).items() if path.parent in finished}
    assert 1 <= len(finished) < 4

    # Processes that load images work in joblib's processes, too.
    process = start("-m", "compute=joblib", "compute.workers=1", "alpha=3,4,99,5,6")
    _, errors = finish(process, failed="alpha=99 ")
    assert "1 of 5 runs failed" in errors and "at most 16" in errors.partition("runs failed")[2]
    assert sorted(records(tmp_path)) == [3, 4, 5, 6]
    assert before.items() <= stamps(tmp_path).items()
    fresh = [r for r in records(tmp_path).values() if Path(r["file"]).parent not in finished]
    assert {record["machine"]["threads"] for record in fresh} == {cores_per_job(2)}
    assert len(list(tmp_path.glob("originals/*"))) == 1


@pytest.mark.slow
@needs("joblib")
def test_runs_whose_process_is_killed_start_again(start, tmp_path):
    process = start("-m", "compute=joblib", "alpha=3,4,5,6")
    wait_for_records(tmp_path, process, count=1)
    children = psutil.Process(process.pid).children()
    worker = next(child for child in children if "LokyProcess" in " ".join(child.cmdline()))
    worker.kill()
    _, errors = finish(process)
    assert "process was killed" in errors
    assert sorted(records(tmp_path)) == [3, 4, 5, 6]


@needs("submitit")
def test_submitit_runs_each_job_in_a_process_of_its_own(start, tmp_path):
    options = ["compute=submitit_local", "compute.jobs=1", "compute.threads=2"]
    finish(start("-m", *options, "alpha=99,3"), failed="alpha=99 ")
    assert [record["machine"]["threads"] for record in records(tmp_path).values()] == [2]
    assert len(list(tmp_path.glob("runs/.submitit/*/*_log.out"))) == 2


#: As Slurm's: sbatch keeps the script and runs the tasks of its array, srun runs the command.
SLURM = {
    "sbatch": """
        cp "$1" "$KEPT_SCRIPT"
        export SLURM_ARRAY_JOB_ID=7 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
        export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
        for task in 0 1; do
          SLURM_JOB_ID=7$task SLURM_ARRAY_TASK_ID=$task bash "$1" >/dev/null 2>&1 &
        done
        echo "Submitted batch job 7"
    """,
    "srun": """
        while [[ $1 == --* ]]; do
          if [[ $1 == --unbuffered ]]; then shift; else shift 2; fi
        done
        exec "$@"
    """,
    "sacct": "echo 'JobID|State|NodeList'",
}


@needs("submitit")
def test_slurm_is_asked_for_what_the_configuration_says(start, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in SLURM.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}")
        (folder / name).chmod(0o755)
    options = ["compute=submitit_slurm", "compute.threads=2", "hydra.launcher.partition=long"]
    options += ["hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=30"]
    kept = folder / "script"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    finish(
        start("-m", *options, "alpha=3,99", PATH=path, KEPT_SCRIPT=str(kept)), failed="alpha=99 "
    )
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in kept.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    expected = {
        "array": "0-1%2",
        "cpus-per-task": "2",
        "gpus-per-node": "1",
        "job-name": "jlcm",
        "mem": "16GB",
        "ntasks-per-node": "1",
        "partition": "long",
        "time": "30",
    }
    assert expected.items() <= asked.items()
    assert [record["machine"]["threads"] for record in records(tmp_path).values()] == [2]


class Fragile:
    """Launches runs until one comes that kills its process, and with it those after it."""

    def __init__(self, folder):
        self.folder, self.groups = folder, []

    def launch(self, jobs, initial_job_idx):
        self.groups.append((initial_job_idx, [int(job[0]) for job in jobs]))
        for job in jobs:
            if job == ["2"]:
                raise BrokenExecutor("out of memory")
            (self.folder / job[0]).mkdir()
            (self.folder / job[0] / "record.json").touch()
        return [JobReturn(overrides=job, status=JobStatus.COMPLETED) for job in jobs]

    def load_sweep_config(self, config, job):
        sweep = {"dir": str(self.folder), "subdir": job[0]}
        return OmegaConf.create({"hydra": {"sweep": sweep}, "force": False})


def test_a_run_that_is_killed_alone_counts_as_failed(tmp_path):
    fragile = Fragile(tmp_path)
    launcher = _Launcher(fragile, fragile, OmegaConf.create({"compute": {"jobs": 3}}))
    launcher.launch([[str(number)] for number in range(7)], 0)
    # All; groups of three, of which the first lacks 2 only; then the rest.
    assert fragile.groups == [(0, [0, 1, 2, 3, 4, 5, 6]), (0, [2]), (3, [3, 4, 5]), (6, [6])]
    assert launcher.failed == [(["2"], "its process was killed (BrokenExecutor: out of memory)")]
    with pytest.raises(CompactHydraException, match="Fragile failed: FileExistsError"):
        launcher.launch([["0"]], 0)


@pytest.mark.slow
@needs("ray")
def test_ray_runs_a_sweep_and_goes_on(start, tmp_path):
    options = ["compute=ray", "compute.jobs=2", "compute.threads=1"]
    finish(start("-m", *options, "alpha=3,99,4"), failed="alpha=99 ")
    before = stamps(tmp_path)
    finish(start("-m", *options, "alpha=3,4,5"))
    assert sorted(records(tmp_path)) == [3, 4, 5]
    assert before.items() <= stamps(tmp_path).items()


#: run.py, with a line in a file for each time that a network is compressed.
COUNTING = """
import os, runpy, sys
import jlcm
compress = jlcm.compress

def counted(*arguments, **options):
    with open(os.environ["COUNTED"], "a") as file:
        file.write("once more\\n")
    return compress(*arguments, **options)

jlcm.compress = counted
sys.argv[0] = "run.py"
runpy.run_path("run.py", run_name="__main__")
"""


def test_two_processes_do_a_run_once(start, tmp_path):
    program = tmp_path / "counting.py"
    program.write_text(COUNTING)
    arguments = ["alpha=3", "output=json"]
    options = {"program": (str(program),), "COUNTED": str(tmp_path / "counted")}
    both = [start(*arguments, **options) for _ in range(2)]
    returned = [json.loads(finish(process)[0].splitlines()[-1]) for process in both]
    assert (tmp_path / "counted").read_text() == "once more\n"
    assert returned == [records(tmp_path)[3]] * 2


def composed(*overrides):
    with initialize(version_base="1.3", config_path="../conf"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


INSTALLED = [pytest.param(name, marks=needs(name.partition("_")[0])) for name in LAUNCHERS]


@pytest.mark.parametrize("name", INSTALLED)
def test_where_a_run_is_done_is_no_part_of_it(name):
    config = composed(f"compute={name}", "compute.jobs=3")
    assert run_id(config) == run_id(composed())
    assert config.compute.jobs == 3 and config.compute.device == "auto"


def documented(name):
    """Commands of docs/launchers.md for a launcher, each with the first value of a sweep."""
    lines = (ROOT / "docs" / "launchers.md").read_text().splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("python run.py")]
    return [[re.sub(r",.*", "", w) for w in c[3:]] for c in words if f"compute={name}" in c]


@pytest.mark.parametrize("name", INSTALLED)
def test_documented_commands_compose(name):
    commands = documented(name)
    assert commands
    for command in commands:
        check_overrides(["-m", *command])
        assert OmegaConf.to_container(composed(*command).compute, resolve=True)["threads"] >= 1


@pytest.mark.parametrize(("cores", "jobs", "threads"), [(16, 4, 4), (16, 5, 3), (2, 8, 1)])
def test_jobs_share_the_cores(cores, jobs, threads, monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: cores)
    config = OmegaConf.create(
        {"jobs": jobs, "threads": "${cores_per_job:${jobs}}", "left": "${cores_per_job:1}"}
    )
    assert (config.threads, config.left) == (threads, cores)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_missing_plugin_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr("experiments.overrides.find_spec", lambda module: None)
    extra = "ray" if name == "ray" else "launchers"
    with pytest.raises(ValueError, match=rf"pip install -c constraints.txt -e '.\[{extra}\]'"):
        check_overrides(["-m", f"compute={name}", "alpha=3,4"])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_need_a_sweep(name, monkeypatch):
    monkeypatch.setattr("experiments.overrides.find_spec", lambda module: module)
    check_overrides(["-m", f"compute={name}", "alpha=3,4"])
    with pytest.raises(ValueError, match="launches sweeps: add -m"):
        check_overrides([f"compute={name}", "alpha=3"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compute.jobs=2"], "compute.jobs=2 needs compute=joblib, submitit_local"),
        (["compute.jobs=0"], "compute.jobs=0 must be at least 1"),
    ],
)
def test_wrong_numbers_of_jobs_are_refused_in_one_line(options, message, start, tmp_path):
    _, errors = start("-m", "alpha=3,4", *options).communicate()
    assert message in errors and "Traceback" not in errors
    assert not records(tmp_path)

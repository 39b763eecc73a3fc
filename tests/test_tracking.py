"""W&B mirrors records: what it is told, and that no failure of it costs a run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_wandb import FakeWandb
from hydra import compose, initialize
from omegaconf import OmegaConf

from experiments.config import TrackingConfig, identity, register, run_id
from experiments.runner import run
from experiments.tracking import open_tracker, summary_of
from jlcm.learning.distill import EpochResult
from jlcm.learning.sequential import LayerResult
from scripts import wandb_dashboard

register()

ROOT = Path(__file__).parent.parent
# A small network that trains on the digits in seconds, and every kind of result.
SMALL = [
    "experiment=table4_digits", "model=timm", "model.name=test_byobnet", "data.epochs=2",
    "data.limit=32", "data.calibration_samples=48", "init=random", "reorder=none",
    "learn.allocation=uniform", "learn.distill.epochs=2", "+learn.options.positions=4",
    "compute.workers=0",
]  # fmt: skip
OFFLINE = TrackingConfig(mode="offline")
ONLINE = TrackingConfig(mode="online")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Variables that tracking sets are gone after each test."""
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def fake(monkeypatch):
    def install(*fails, **options):
        module = FakeWandb(*fails, **options)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


def tracked_run(folder, cache, config=OFFLINE, stages=None, **options):
    """A whole run in this process; its record, and whether the tracker gave up.

    Runs with the same folder of stages take over what the first has learned.
    """
    given = [f"results_dir={folder}", f"stages_dir={stages or 'null'}"]
    with initialize(version_base="1.3", config_path="../conf"):
        composed = compose("config", overrides=[*SMALL, *given])
    name = run_id(composed)
    where = {"results_dir": folder, "run_id": name, **options}
    with pytest.MonkeyPatch.context() as patch, open_tracker(config, **where) as tracker:
        patch.setenv("JLCM_CACHE", str(cache))
        record = run(
            OmegaConf.to_object(composed),
            run_id=name,
            identity=identity(composed),
            folder=folder / "runs" / name,
            tracker=tracker,
        )
    return record, getattr(tracker, "failed", False)


@pytest.fixture(scope="module")
def stages(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("stages")
    tracked_run(tmp_path_factory.mktemp("first"), cache, TrackingConfig(), folder)
    return folder


@pytest.fixture(scope="module")
def untracked(tmp_path_factory, cache, stages):
    record, _ = tracked_run(tmp_path_factory.mktemp("off"), cache, TrackingConfig(), stages)
    return record


def timeless(record):
    """What must not depend on tracking: all but times, memory and paths."""
    kept = {k: v for k, v in record.items() if k not in ("seconds", "peak_rss_bytes")}
    return kept | {"file": Path(record["file"]).read_bytes()}


def layer(number, loss=0.5, **options):
    given = {"before": 1.0, "after": loss, "kept": "learned", "curve": [loss, loss / 2]}
    return LayerResult(name=f"part.{number}.weight", **given | options)


def test_off_needs_no_package_and_takes_everything(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_tracker(TrackingConfig(), results_dir=tmp_path, run_id="r") as tracker:
        tracker.start({})
        tracker.log_result(layer(1))
        tracker.log_figures({})
        tracker.mirror({})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_missing_package_is_said_before_any_work(mode, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = rf'tracking={mode} needs W&B .*pip install -c constraints.txt -e ".\[tracking\]"'
    with pytest.raises(ValueError, match=message) as error:
        open_tracker(TrackingConfig(mode=mode), results_dir=tmp_path, run_id="r")
    assert len(str(error.value).splitlines()) == 1


def test_wrong_mode_lists_the_right_ones(tmp_path):
    with pytest.raises(ValueError, match="off, offline, online"):
        open_tracker(TrackingConfig(mode="on"), results_dir=tmp_path, run_id="r")


@pytest.mark.parametrize(
    "fails", [["setup"], ["init"], ["define_metric"], ["log"], ["Table"], ["finish", "teardown"]]
)
def test_run_survives_every_failure_with_the_same_record(
    fails, fake, untracked, cache, stages, tmp_path, capfd
):
    module = fake(*fails)
    record, gave_up = tracked_run(tmp_path, cache, stages=stages)
    assert gave_up and timeless(record) == timeless(untracked)
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: W&B" in line]
    assert len(warnings) == 1
    assert f"{fails[0]} failed for some reason; the run goes on untracked" in warnings[0]
    # Nothing says that the run is tracked: the same command without the failure tracks it.
    module.fails.clear()
    again, gave_up = tracked_run(tmp_path, cache, stages=stages)
    assert not gave_up and again == record
    assert module.runs[-1].points("learn/name") == [r["name"] for r in record["learning"][:-1]]


def test_tracked_run_is_told_the_record_while_it_learns(fake, untracked, cache, tmp_path):
    module = fake()
    record, gave_up = tracked_run(tmp_path, cache, group="table4_digits")
    assert not gave_up and record["packed"] == untracked["packed"]
    (told,) = module.runs
    assert told.options["id"] == record["run_id"] and told.options["group"] == "table4_digits"
    assert told.options["config"].items() >= record["config"].items()
    *layers, distilled = record["learning"]
    for key in ("name", "before", "after", "kept", "seconds"):
        assert told.points(f"learn/{key}") == [result[key] for result in layers]
    assert told.points("learn/part") == list(range(1, len(layers) + 1))
    trained, held_out = map(list, zip(*distilled["history"], strict=True))
    assert told.points("distill/training_loss") == trained
    assert told.points("distill/held_out_loss") == held_out
    assert all(seconds > 0 for seconds in told.points("distill/seconds"))
    assert told.summary.items() >= summary_of(record).items() and told.exit_code == 0
    assert told.config["versions"] == record["versions"]
    # Live: all that learning told came before the table of the record.
    assert "layers" in told.logged[-1] and not told.artifacts


def test_finished_run_is_tracked_once(fake, cache, stages, tmp_path):
    module = fake()
    record, _ = tracked_run(tmp_path, cache, TrackingConfig(), stages)
    for _ in range(2):
        config = TrackingConfig(mode="offline", artifact=True)
        assert tracked_run(tmp_path, cache, config) == (record, False)
    (told,) = module.runs
    assert told.options["config"] == record["config"]
    assert told.points("learn/after") == [r["after"] for r in record["learning"][:-1]]
    assert told.points("distill/epoch") == [1, 2]
    assert [artifact.name for artifact in told.artifacts] == [f"packed-{record['run_id']}"]


def test_measurement_is_told_its_numbers(fake, tmp_path):
    module = fake()
    results = {"latency": {"cpu": {"batch_1": {"fp32": {"ms": 2.5, "read_bytes": None}}}}}
    record = {"task": "latency", "config": {"task": "latency"}, "results": results, "notes": []}
    with open_tracker(OFFLINE, results_dir=tmp_path, run_id="r") as tracker:
        tracker.mirror(record)
    (told,) = module.runs
    assert told.options["job_type"] == "latency" and not told.logged
    assert told.summary == {"latency/cpu/batch_1/fp32/ms": 2.5} and told.config["notes"] == []
    assert not tracker.failed and told.exit_code == 0


def test_failed_run_is_marked_failed_and_told_anew(fake, tmp_path):
    module = fake()
    with (
        pytest.raises(KeyboardInterrupt),
        open_tracker(OFFLINE, results_dir=tmp_path, run_id="r") as tracker,
    ):
        tracker.start({})
        raise KeyboardInterrupt
    assert module.runs[0].exit_code == 1
    assert not (tmp_path / "wandb" / "complete").exists()


RECORD = {
    "packed": {"top1": 90.0, "top5": None},
    "original": {"top1": 91.0},
    "footprint": {"alpha_layers": 4.0, "alpha_total": 3.5, "file_bytes": 10, "codes": 3},
    "seconds": {"load": 1.5},
    "peak_rss_bytes": 7,
    "learning": [
        *({"name": f"part.{i}.weight", "after": 0.5, "curve": [0.5, 0.25]} for i in (1, 2, 3)),
        {"history": [[0.3, 0.4], [0.2, None]], "initial_loss": 0.5, "best_epoch": 2},
    ],
    "layers": [{"name": "part.1.weight", "shape": [2, 3], "relative_error": None}],
    "stages": {},
    "device": "cpu",
    "versions": {},
    "notes": [],
    "config": {"alpha": 4.0},
}


def test_summary_has_the_numbers_alone():
    assert summary_of(RECORD) == {
        "top1": 90.0,
        "original/top1": 91.0,
        "alpha_layers": 4.0,
        "alpha_total": 3.5,
        "file_bytes": 10,
        "seconds/load": 1.5,
        "peak_rss_bytes": 7,
        "distill/initial_loss": 0.5,
        "distill/best_epoch": 2,
    }


def go_on(tracker, finished=3):
    """An attempt at a run: layers read again from its folder, and new ones."""
    with tracker:
        tracker.start({})
        for number in range(1, finished + 1):
            tracker.log_result(layer(number))
        if finished == 3:
            tracker.log_result(EpochResult(epoch=1, training_loss=0.3, held_out_loss=0.4))
            tracker.log_record(RECORD)


def test_resumed_online_run_goes_on_where_it_stopped(fake, tmp_path):
    module = fake()
    options = {"results_dir": tmp_path, "run_id": "r"}
    go_on(open_tracker(ONLINE, **options), finished=2)
    go_on(open_tracker(ONLINE, **options))
    stopped, resumed = module.runs
    assert stopped.options["resume"] == resumed.options["resume"] == "allow"
    assert stopped.points("learn/part") == [1, 2] and resumed.points("learn/part") == [3]
    assert resumed.points("curve/part/3/weight") == [0.5, 0.25]
    assert resumed.points("distill/epoch") == [1, 2]  # the second from the record
    go_on(open_tracker(ONLINE, anew=True, **options))
    assert module.runs[-1].options["resume"] is None
    assert module.runs[-1].points("learn/part") == [1, 2, 3]


def test_no_account_is_said_and_the_run_goes_on(fake, tmp_path, capfd):
    module = fake(account=False)
    go_on(open_tracker(ONLINE, results_dir=tmp_path, run_id="r"))
    assert not module.runs
    (line,) = capfd.readouterr().err.splitlines()
    assert "no account: run `wandb login`" in line


# From here on with W&B itself.


@pytest.fixture
def inspect():
    """What W&B reads from a run's folder."""
    pytest.importorskip("wandb", reason='needs pip install -c constraints.txt -e ".[tracking]"')
    return read_back


def read_back(folder, *options):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(text) if options else [json.loads(line) for line in text.splitlines()]


def history(lines):
    return [line["history"]["item"] for line in lines if line["type"] == "history"]


def points(lines, key):
    return [item[key] for item in history(lines) if key in item]


@pytest.fixture(scope="module")
def offline(cache, stages, tmp_path_factory):
    """A run of `run.py` at tracking=offline: its record, and the folder of its W&B run."""
    pytest.importorskip("wandb", reason='needs pip install -c constraints.txt -e ".[tracking]"')
    results, home = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("home")
    where = [f"results_dir={results}", f"stages_dir={stages}"]
    tracking = ["tracking=offline", "tracking.artifact=true", "output=json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"JLCM_CACHE": str(cache), "PYTHONPATH": path, "HOME": str(home)}
    result = subprocess.run(
        [sys.executable, "run.py", *SMALL, *where, *tracking],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "warning" not in result.stderr
    (folder,) = (results / "wandb").glob("offline-run-*")
    assert f"tracking: {folder}" in result.stderr
    assert not [path for path in home.rglob("*") if "wandb" in str(path)]
    return json.loads(result.stdout.splitlines()[-1]), folder


def test_offline_run_reads_back_as_its_record(offline, inspect):
    record, folder = offline
    summary = inspect(folder, "--summary")
    assert (summary["run_id"], summary["state"]) == (record["run_id"], "finished")
    assert summary["project"] == "jlcm"
    config = summary["config"]
    expected = json.loads(json.dumps(record["config"]))
    for group in ("method", "learn"):  # empty dictionaries are left out
        expected[group] = {k: v for k, v in expected[group].items() if v != {}}
    assert {key: config[key] for key in expected} == expected
    assert config["stages"] == record["stages"] and config["versions"] == record["versions"]
    shown = summary["summary"]
    assert {key: shown[key] for key in summary_of(record)} == pytest.approx(summary_of(record))
    assert shown["top1"] == record["packed"]["top1"]
    assert shown["file_bytes"] == os.path.getsize(record["file"])
    # Points are in the history alone, so that the table of runs stays readable.
    assert not [key for key in shown if key.startswith(("curve/", "learn/")) and "part" not in key]


def test_offline_history_is_that_of_the_record(offline, inspect):
    record, folder = offline
    lines = inspect(folder)
    *layers, distilled = record["learning"]
    for key in ("name", "before", "after", "kept", "seconds"):
        assert points(lines, f"learn/{key}") == [result[key] for result in layers]
    for result in layers:
        name = f"curve/{result['name'].replace('.', '/')}"
        assert points(lines, name) == result["curve"]
    assert points(lines, "distill/epoch") == [1, 2]
    trained, held_out = map(list, zip(*distilled["history"], strict=True))
    assert points(lines, "distill/training_loss") == trained
    assert points(lines, "distill/held_out_loss") == held_out
    (started,) = [line["run"] for line in lines if line["type"] == "run"]
    assert started["run_group"] == "table4_digits" and started["job_type"] == "compress"
    steps = {m["metric"].get("glob_name"): m["metric"] for m in lines if m["type"] == "metric"}
    assert steps["learn/*"]["step_metric"] == "learn/part"
    assert steps["curve/*"]["step_metric"] == "curve_step"


def test_offline_table_and_artifact_are_those_of_the_record(offline, inspect):
    record, folder = offline
    (table,) = folder.glob("files/media/table/layers_*.table.json")
    table = json.loads(table.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    for row, line in zip(rows, record["layers"], strict=True):
        assert row == line | {"shape": "x".join(map(str, line["shape"]))}
    artifacts = [line["artifact"] for line in inspect(folder) if line["type"] == "artifact"]
    (packed,) = [a for a in artifacts if a["name"] == f"packed-{record['run_id']}"]
    (content,) = packed["manifest"]["contents"]
    assert int(content["size"]) == os.path.getsize(record["file"])
    assert Path(content["local_path"]).is_relative_to(folder.parent)


def test_stopped_and_resumed_offline_run_is_one_run(inspect, tmp_path):
    options = {"results_dir": tmp_path, "run_id": "r"}
    go_on(open_tracker(OFFLINE, results_dir=tmp_path, run_id="other-r"), finished=1)
    go_on(open_tracker(OFFLINE, **options), finished=2)
    (stopped,) = tmp_path.glob("wandb/offline-run-*/run-r.wandb")
    go_on(open_tracker(OFFLINE, **options))
    (whole,) = tmp_path.glob("wandb/offline-run-*/run-r.wandb")
    assert whole != stopped
    lines = inspect(whole.parent)
    assert points(lines, "learn/part") == [1, 2, 3] and points(lines, "distill/epoch") == [1, 2]
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-other-r.wandb"))) == 1


def test_figures_become_images(inspect, tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    with open_tracker(OFFLINE, results_dir=tmp_path, run_id="figures") as tracker:
        tracker.start({}, job_type="figures")
        tracker.log_figures({"table3": figure})
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (item,) = history(inspect(folder))
    (image,) = folder.glob("files/media/images/**/*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert [key for key in item if key.startswith("figures/table3")]


@pytest.mark.filterwarnings("ignore:Pydantic V1")
def test_dashboard_shows_metrics_that_runs_have(offline, inspect, tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason="needs wandb-workspaces")
    _, folder = offline
    path = tmp_path / "dashboard.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wandb_dashboard.py", "--offline", str(path)])
    wandb_dashboard.main()
    view = json.loads(path.read_text())
    assert view["project"] == TrackingConfig.project
    section = view["spec"]["section"]
    panels = {s["name"]: s["panels"] for s in section["panelBankConfig"]["sections"]}
    assert list(panels) == [
        "Accuracy against bytes", "Learning", "Seconds and memory", "Table of runs"
    ]  # fmt: skip
    logged = {key for item in history(inspect(folder)) for key in item}
    summary = inspect(folder, "--summary")
    for panel in sum(panels.values(), []):
        config = panel["config"]
        axes = [config.get("xAxis"), config.get("yAxis"), *config.get("metrics", [])]
        for name in filter(None, axes):
            kind, _, rest = name.partition(":")
            known = summary["summary"] if kind == "summary" else logged | set(summary["summary"])
            assert (rest or name) in known, name
        if "metricRegex" in config:
            assert [key for key in logged if re.fullmatch(config["metricRegex"], key)]
    for column in section["runSets"][0]["runFeed"]["columnOrder"]:
        kind, _, name = column.partition(":")
        if kind == "config":
            value = summary["config"]
            for part in name.replace(".value", "").split("."):
                value = value[part]
        elif kind == "summary":
            assert name in summary["summary"], name

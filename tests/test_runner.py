"""Whole runs on a small network: record, resume, sweep, errors; the README's first command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
# A small network that trains on the digits in seconds.
SMALL = ["model=timm", "model.name=test_byobnet", "data.epochs=2", "init=kmeans", "learn=none"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(*arguments, cache, cwd=ROOT, expect=0):
    result = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=cwd,
        env=os.environ | {"JLCM_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode == 0) == (expect == 0), result.stderr[-3000:]
    return result


def last_json(result):
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    result = run(*SMALL, f"results_dir={results}", "output=json", "alpha=3.9", cache=cache)
    return results, last_json(result)


def test_record_is_complete_and_agrees_with_the_file(finished):
    results, record = finished
    assert Path(record["file"]).is_file()
    assert record == json.loads((results / "runs" / record["run_id"] / "record.json").read_text())
    size = record["footprint"]
    assert size["file_bytes"] == os.path.getsize(record["file"])
    assert size["file_bytes"] == size["header"] + size["payload"]
    parts = size["codes"] + size["codebooks"] + size["scales"] + size["orders"]
    assert sum(layer["nbytes"] for layer in record["layers"]) == parts
    assert size["payload"] == parts + size["other"]
    assert size["alpha_layers"] == pytest.approx(size["reference_layers"] / parts)
    assert size["alpha_total"] == pytest.approx(size["reference_total"] / size["file_bytes"])
    assert 3.9 <= size["alpha_layers"] <= 1.02 * 3.9
    for key in ("original", "packed"):
        assert 0 <= record[key]["top1"] <= record[key]["top5"] <= 100
    assert 0 <= record["packed"]["agreement"] <= 100 and record["packed"]["kl"] >= 0
    assert record["peak_rss_bytes"] > 1e8 and record["versions"]["torch"]
    assert set(record["seconds"]) >= {"load", "compress", "save", "reload", "evaluate_packed"}


def test_finished_run_is_skipped_unless_forced(finished, cache):
    results, record = finished
    path = results / "runs" / record["run_id"] / "record.json"
    marked = record | {"notes": ["kept"]}
    path.write_text(json.dumps(marked))
    arguments = [*SMALL, f"results_dir={results}", "output=json", "alpha=3.9"]
    assert last_json(run(*arguments, cache=cache))["notes"] == ["kept"]
    again = last_json(run(*arguments, "force=true", cache=cache))
    assert again["notes"] == record["notes"]
    assert again["packed"] == record["packed"]  # and deterministic


def test_default_learning_comes_closer_at_the_same_bytes(finished, cache):
    results, free = finished
    arguments = [*SMALL, f"results_dir={results}", "output=json", "alpha=3.9", "learn=jlcm"]
    record = last_json(run(*arguments, cache=cache))
    assert record["packed"]["kl"] < free["packed"]["kl"]
    for size in (record["footprint"], free["footprint"]):
        assert 3.9 <= size["alpha_layers"] <= 1.02 * 3.9
    assert record["stages"]["learn"]["kind"] == "lnq"  # defaults are recorded too
    assert record["stages"]["distill"]["epochs"] > 0 and free["stages"] == {}
    *layers, distilled = record["learning"]
    assert {layer["name"] for layer in layers} == {layer["name"] for layer in record["layers"]}
    assert all(layer["after"] <= layer["before"] for layer in layers)
    assert distilled["final_loss"] <= distilled["initial_loss"]
    assert not (results / "runs" / record["run_id"] / "learning").exists()


def test_unfinished_run_runs_again(finished, cache):
    results, record = finished
    (results / "runs" / record["run_id"] / "record.json").unlink()
    arguments = [*SMALL, f"results_dir={results}", "output=json", "alpha=3.9"]
    assert last_json(run(*arguments, cache=cache))["packed"] == record["packed"]


def test_sweep_goes_on_after_a_failed_job_and_writes_its_table(finished, cache):
    results, _ = finished
    sweep = [*SMALL, f"results_dir={results}", "alpha=3.9,99,7.5", "encoding=auto"]
    arguments = ["-m", "experiment=table3_digits", *sweep]
    result = run(*arguments, cache=cache, expect=1)
    records = [json.loads(p.read_text()) for p in results.glob("runs/*/record.json")]
    alphas = sorted(
        r["config"]["alpha"] for r in records if r["config"]["encoding"]["kind"] == "auto"
    )
    assert alphas == [3.9, 7.5]
    assert "alpha=99.0 must be above 1 and at most 16" in result.stderr
    (table,) = (results / "tables").glob("table3_digits@*.csv")
    cells = pd.read_csv(table).query("init == 'kmeans'").set_index("alpha")
    assert cells.loc[99, "status"] == "not run" and pd.isna(cells.loc[99, "ours"])
    for record in records:
        alpha = record["config"]["alpha"]
        if record["config"]["encoding"]["kind"] == "auto":
            assert cells.loc[alpha, "ours"] == pytest.approx(record["packed"]["top1"], rel=1e-5)
            assert cells.loc[alpha, "runs"] == record["run_id"]
    assert "table3_digits@" in (results / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alpha=17"], "must be above 1 and at most 16"),
        (["data=imagenet", "data.root=/nonexistent"], "/nonexistent"),
        (["data=image_list", "data.root=.", "data.list=missing.tsv"], "missing.tsv"),
        (["model=timm", "model.name=no_such_network"], "no_such_network"),
        (["compute.device=tpu"], "auto, cpu, cuda"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(arguments, message, cache, tmp_path):
    result = run(*arguments, f"results_dir={tmp_path}", cache=cache, expect=1)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_readme_main_job(tmp_path_factory):
    """The first command of the README, in this environment: a real network in a real file."""
    results = tmp_path_factory.mktemp("main")
    options = f"model=resnet18 init=hierarchical results_dir={results} output=json"
    stamp = f"{sys.prefix}/.run"  # this environment is installed already
    result = subprocess.run(
        [
            "make",
            "--no-print-directory",
            "-o",
            stamp,
            "run",
            f"VENV={sys.prefix}",
            f"ARGS={options}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    record = last_json(result)
    assert record["original"]["top1"] >= 98
    assert 7.5 <= record["footprint"]["alpha_layers"] <= 1.02 * 7.5
    assert record["footprint"]["file_bytes"] == os.path.getsize(record["file"])
    assert record["packed"]["top1"] >= 97  # without learning it is near chance

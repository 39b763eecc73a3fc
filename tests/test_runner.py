"""Whole runs on a small network: record, resume, sweep, errors. The README's commands run too."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.config import register
from experiments.overrides import check_overrides

register()

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


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_readme_commands_compose():
    """Each documented command parses: make targets exist, and configurations compose."""
    commands = readme_commands()
    assert any(c.startswith("make run") for c in commands)
    assert any(c.startswith("make test") for c in commands)
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            subprocess.run([*words, "-n"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        elif words[:2] == ["python", "run.py"] and "--help" not in words:
            first = [re.sub(r"=([^,]+),.*", r"=\1", w) for w in words[2:] if w != "-m"]
            check_overrides(first)


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


def test_readme_example(tmp_path, monkeypatch, capsys):
    """The Python of the README runs as it stands."""
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    alpha, shape = capsys.readouterr().out.splitlines()
    assert 7 < float(alpha) < 7.5 and shape == "torch.Size([1, 10])"


@pytest.mark.slow
def test_readme_commands_run(tmp_path):
    """Every other command of the README, whole; sweeps take minutes."""
    data = Path(os.environ.get("JLCM_DATA", ROOT.parent / "shared" / "data")) / "vision"
    if not (data / "imagenet_like_1000.tsv").is_file():
        pytest.skip(f"no images in {data}: set JLCM_DATA")
    lists = {
        "DIR/list.tsv": str(data / "imagenet_like_1000.tsv"),
        "DIR": str(data / "imagenet_like_1000"),
    }
    for command in readme_commands():
        for placeholder, value in lists.items():
            command = command.replace(placeholder, value)
        words = shlex.split(command)
        if words[0] != "python" or "pip" in words:
            continue
        if "run.py" in words and "--help" not in words:
            words += [f"results_dir={tmp_path}"]
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)

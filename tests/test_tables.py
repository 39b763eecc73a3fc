"""Tables: cells and records find each other, and what is printed is what was recorded."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from experiments.records import load_records, publish_record, write_record
from experiments.tables import cells as rowsmodule
from experiments.tables.cells import cells, narrowed, nominal_alpha, tidy
from experiments.tables.make import after_sweep, make_tables
from experiments.tables.specs import TABLES, paper_numbers
from experiments.tables.write import latex, markdown, wide

ROOT = Path(__file__).parent.parent


def record_of(cell, seed=0, top1=50.0, samples=360, **changes):
    """What a run of a cell would have recorded."""
    config = json.loads(cell.identity) | {"seed": seed}
    for key, value in changes.pop("config", {}).items():
        group, _, name = key.partition(".")
        config[group] = config[group] | {name: value}
    text = json.dumps(config, sort_keys=True)
    return {
        "run_id": f"net-{hash(text) % 10**10:010d}",
        "config": config,
        "original": {"top1": 90.0, "samples": samples},
        "packed": {"top1": top1, "top1_standard_error": 1.5, "samples": samples, "kl": 0.25},
        "footprint": {
            "alpha_layers": 0.99 * config["alpha"],
            "alpha_total": 5.0,
            "file_bytes": 1234,
        },
        "layers": [{"shape": [4, 5], "bits": 3}, {"shape": [20], "bits": 5}],
        "learning": [{"name": "a", "curve": [1.0, 0.5], "seconds": 2.0}],
        "seconds": {"compress": 12.0},
        "peak_rss_bytes": 2_000_000_000,
        "file": "/somewhere/packed.safetensors",
        "notes": [],
    } | changes


@pytest.fixture(scope="module")
def digits():
    return cells("table5_digits")


def test_every_table_is_an_experiment_and_shows_all_its_keys():
    experiments = {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")}
    assert set(TABLES) <= experiments
    for name, table in TABLES.items():
        assert set(rowsmodule._sweep(name)) == {*table.lines, *table.columns}, name


@pytest.mark.parametrize(
    "name", [n for n, t in TABLES.items() if t.full_scale is not None and t.paper]
)
def test_all_numbers_of_the_paper_are_in_the_table(name):
    numbers = paper_numbers(TABLES[name])
    found = tidy(name, [])
    printed = numbers[[m for m in TABLES[name].measures if m in numbers]]
    assert sorted(found["paper"].dropna()) == sorted(printed.to_numpy().ravel())
    assert found["ours"].isna().all() and set(found["status"]) == {"not run"}


def test_seeds_are_averaged_and_other_runs_left_aside(digits):
    cell, other = digits[0], digits[1]
    records = [
        record_of(cell, 0, 50.0),
        record_of(cell, 1, 60.0),
        record_of(cell, 2, 99.0, config={"data.limit": 100}),  # another run
        record_of(other, 0, 70.0, notes=["did less", "did more"]),
    ]
    lines = tidy("table5_digits", records).set_index(list(cell.keys))
    line = lines.loc[tuple(cell.keys.values())]
    assert (line["ours"], line["seeds"], line["samples"]) == (55.0, 2, 360)
    assert line["seed_std"] == pytest.approx(50**0.5) and line["standard_error"] == 1.5
    assert (
        line["original"] == 90.0
        and line["true alpha"] == 0.99 * float(cell.keys["alpha"])
        and line["peak GB"] == 2.0
    )
    assert line["nominal alpha"] == 4.0  # 20 codes of 3 bits, 20 of 5
    assert line["status"] == "reduced scale" and pd.isna(line["difference"])
    assert line["runs"].split() == [record["run_id"] for record in records[:2]]
    assert lines.loc[tuple(other.keys.values()), "notes"] == "did less; did more"
    assert (lines["seeds"] > 0).sum() == 2


def test_only_full_samples_are_compared_with_the_paper():
    cell = cells("table4")[0]
    for samples, status in ((50_000, "reproduced"), (1_000, "reduced scale")):
        line = tidy("table4", [record_of(cell, top1=21.5, samples=samples)]).iloc[0]
        assert line["status"] == status and line["paper"] == 20.555
        assert pd.isna(line["difference"]) == (samples == 1_000)
    assert line["ours"] == 21.5


def test_runs_on_different_data_are_refused(digits):
    records = [record_of(digits[0], samples=360), record_of(digits[1], samples=300)]
    with pytest.raises(ValueError, match="different data.*" + records[1]["run_id"]):
        tidy("table5_digits", records)


def test_bits_of_layers_give_the_nominal_alpha():
    assert nominal_alpha({"layers": [{"shape": [7, 3], "bits": 3}]}) == pytest.approx(16 / 3)
    assert nominal_alpha({}) is None


def test_overrides_that_change_runs_make_a_table_of_their_own():
    kept = ["data.limit=100", "+learn.options.rounds=3", "alpha=6"]
    dropped = ["model=vit_b16", "init=kmeans,random", "seed=0,1", "data.root=x/y", "force=true"]
    dropped += ["results_dir=/tmp/a", "compute.threads=1", "hydra.verbose=true"]
    assert narrowed("table3", [*dropped, *kept]) == kept


def filled(digits, tmp_path):
    """Records for most cells of a table, as runs."""
    for place, cell in enumerate(digits[:-3]):
        record = record_of(cell, top1=40 + 1.37 * place, notes=["at 2^3 & 50 % of_it"])
        write_record(tmp_path / "runs" / record["run_id"], record)
    return list(load_records(tmp_path).values())


def test_latex_and_markdown_print_the_numbers_of_the_csv(digits, tmp_path):
    files = make_tables_of(digits, tmp_path)
    table = pd.read_csv(files[".csv"], dtype={"alpha": str})
    source, text = files[".tex"].read_text(), files[".md"].read_text()
    body = source.split("\\midrule")[1].split("\\bottomrule")[0].strip().splitlines()
    plain = [re.sub(r"\\textbf{([^}]*)}", r"\1", line.removesuffix(" \\\\")) for line in body]
    printed = [[cell.strip() for cell in line.split("&")] for line in plain]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [[c.strip(" *") for c in line.split("|")[1:-1]] for line in lines] == printed
    assert len(printed) == 1 + table["method"].nunique()  # the original's line on top
    for row, (_, rows) in zip(printed[1:], table.groupby("method", sort=False), strict=True):
        numbers = [value.replace(",", "") for value in row[1:]]
        per_group = len(numbers) // 2
        for group, (_, cell) in enumerate(rows.iterrows()):
            paper, ours, *details = numbers[group * per_group :][:per_group]
            assert paper == ("" if pd.isna(cell["paper"]) else f"{cell['paper']:.2f}")
            names = ("ours", "KL", "true alpha", "seconds", "peak GB")
            for shown, name, places in zip((ours, *details), names, (2, 4, 2, 0, 1), strict=True):
                number = cell[name]
                assert shown == ("" if pd.isna(number) else f"{number:.{places}f}")
    counts = {len(re.findall(r"(?<!\\)&", line)) for line in body}
    assert counts == {12} and source.count("\\begin") == source.count("\\end")


def make_tables_of(digits, tmp_path):
    filled(digits, tmp_path)
    files = make_tables(tmp_path, ["table5_digits"])
    return {file.suffix: file for file in files}


def test_a_run_larger_than_asked_is_not_the_best(digits, tmp_path):
    spec, records = TABLES["table5_digits"], filled(digits, tmp_path)
    goal = records[0]["config"]["alpha"]
    records[0]["packed"]["top1"] = 100.0
    for reached, share in ((True, 0.96), (False, 0.9)):
        records[0]["footprint"]["alpha_layers"] = share * goal
        table = tidy("table5_digits", records)
        assert ("**100.00**" in markdown(spec, table)) == reached
        assert ("not marked" in markdown(spec, table)) != reached


@pytest.mark.parametrize("better", ["high", "low"])
def test_the_best_of_each_column_is_bold(digits, tmp_path, better):
    spec = TABLES["table5_digits"]
    measures = {k: replace(m, better=better) for k, m in spec.measures.items()}
    spec = replace(spec, measures=measures, details=())
    table = tidy("table5_digits", filled(digits, tmp_path))
    texts, best = wide(spec, table)
    for column in texts:
        numbers = pd.to_numeric(texts[column].iloc[1:].replace("", None))
        expected = numbers.max() if better == "high" else numbers.min()
        assert list(best[column].iloc[1:]) == list(numbers == expected)
    assert not best.iloc[0].any()  # the original is no competitor
    assert latex("t", spec, table).count("\\textbf") == best.to_numpy().sum()
    assert markdown(spec, table).count("**") == 2 * best.to_numpy().sum()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (texlive-latex-base)")
def test_latex_of_every_table_compiles(digits, tmp_path):
    sources = [make_tables_of(digits, tmp_path)[".tex"].read_text()]
    for name, table in TABLES.items():
        empty = tidy(name, [])
        if empty["paper"].notna().any():
            sources.append(latex(name, table, empty))
    published = sorted((ROOT / "results/tables").glob("*.tex"))
    sources += [path.read_text() for path in published]
    text = "\n\\clearpage\n".join(sources)
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}%s\\end{document}"
    (tmp_path / "all.tex").write_text(document % text)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_published_records_alone_make_the_same_tables(digits, tmp_path):
    files = make_tables_of(digits, tmp_path)
    before = {suffix: file.read_text() for suffix, file in files.items()}
    shutil.rmtree(tmp_path / "runs")
    after = {file.suffix: file.read_text() for file in make_tables(tmp_path)}
    assert after == before
    for path in (tmp_path / "records").iterdir():
        record = json.loads(path.read_text())
        assert "file" not in record and "curve" not in record["learning"][0]


def test_published_records_name_no_folders(digits, tmp_path):
    places = {"data.root": "/home/me/images", "data.list": "/home/me/images.tsv"}
    record = record_of(digits[0], config=places)
    publish_record(tmp_path, record)
    text = next((tmp_path / "records").iterdir()).read_text()
    assert "/home" not in text and "images.tsv" in text


def test_a_damaged_record_is_named_and_skipped(digits, tmp_path, caplog):
    filled(digits, tmp_path)
    damaged = next((tmp_path / "runs").iterdir()) / "record.json"
    damaged.write_text(damaged.read_text()[:-20])
    table = pd.read_csv(make_tables(tmp_path, ["table5_digits"])[0])
    assert str(damaged) in caplog.text
    assert (table["seeds"] == 0).sum() == 4 and table["ours"].isna().sum() == 4


def test_what_is_missing_or_mistyped_is_said(tmp_path):
    with pytest.raises(ValueError, match="table5_digits: run it first"):
        make_tables(tmp_path, ["table5_digits"])
    with pytest.raises(ValueError, match="table9"):
        make_tables(tmp_path, ["table9"])
    assert after_sweep(["experiment=table5_digits"]) == []  # a single run is no sweep
    assert after_sweep(["-m", "model=resnet18", "alpha=5,6"]) == []
    assert not list(tmp_path.iterdir())


def test_sweep_with_other_options_has_its_own_file(digits, tmp_path):
    extra = ["data.limit=100"]
    record = record_of(cells("table5_digits", tuple(extra))[0], samples=100)
    write_record(tmp_path / "runs" / record["run_id"], record)
    sweep = ["-m", "experiment=table5_digits", f"results_dir={tmp_path}", "method=jlcm", *extra]
    assert [file.name for file in after_sweep(sweep)][0] == "table5_digits@data.limit=100.csv"
    with pytest.raises(ValueError, match="run it first"):
        make_tables(tmp_path, ["table5_digits"])

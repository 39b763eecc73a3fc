"""The command that draws all figures: what it writes, and what it says is missing."""

import runpy
import sys

import pytest
from fake_wandb import FakeWandb
from written_runs import write_run

from experiments.figures import CAPTIONS
from scripts.make_figures import main


@pytest.fixture
def results(tmp_path):
    write_run(tmp_path, "method=rtn", kl=0.5)
    write_run(tmp_path, "method=jlcm_init", kl=0.25)
    return tmp_path


def command(results, *arguments):
    main([*arguments, "--results-dir", str(results), "--output", str(results / "figures")])


def test_everything_that_can_be_drawn_is(results, capsys):
    command(results, "--formats", "png")
    written = {path.stem for path in (results / "figures").glob("*.png")}
    printed = capsys.readouterr()
    missing = {line.split(":")[0] for line in printed.err.splitlines()}
    assert written | missing == CAPTIONS.keys() and not written & missing
    assert written == {"pareto_top1", "pareto_kl", "init", "cost", "mapping_gradient"}
    assert all(": not drawn: " in line for line in printed.err.splitlines())
    assert "(from 2 runs)" in printed.out


def test_asked_for_but_missing_is_an_error_after_the_others_are_drawn(results, capsys):
    with pytest.raises(SystemExit) as stop:
        command(results, "reorder", "cost")
    assert stop.value.code == 1
    assert "reorder: not drawn: it needs the packed file" in capsys.readouterr().err
    assert {path.name for path in (results / "figures").iterdir()} == {"cost.pdf", "cost.png"}


def test_damaged_record_is_named_and_the_rest_drawn(results, capsys, caplog):
    damaged = results / "runs" / "broken" / "record.json"
    damaged.parent.mkdir()
    damaged.write_text('{"run_id": ')
    command(results, "cost", "--formats", "png")
    assert f"{damaged} is damaged" in caplog.text
    assert "cost.png" in capsys.readouterr().out


def test_damaged_packed_file_is_named(results, capsys):
    layer = {"name": "a", "shape": [64, 4], "codebooks": 1, "scales": 2, "stored_order": True}
    folder = write_run(results, "method=jlcm_init", "reorder=stored", layers=[layer])
    (folder / "packed.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        command(results, "reorder")
    assert f"{folder / 'packed.safetensors'}: truncated or not" in capsys.readouterr().err


def test_where_chooses_runs(results, capsys):
    command(results, "pareto_kl", "--formats", "png", "--where", "method.name=rtn")
    assert "(from 1 run)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: no run fits method.name=dkm"):
        command(results, "--where", "method.name=dkm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pareto"], "no figure pareto: choose from pareto_top1, "),
        (["--results-dir", "nowhere"], "--results-dir nowhere does not exist"),
    ],
)
def test_bad_arguments_are_said(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_that_cannot_be_written_is_said(results, capsys):
    (results / "figures").write_text("a file")
    with pytest.raises(SystemExit):
        command(results, "cost")
    assert "cost: not drawn: " in capsys.readouterr().err


def test_figures_are_tracked_as_one_run(results, monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    command(results, "cost", "init", "--formats", "png", "--tracking", "offline")
    (run,) = module.runs
    assert run.options["id"] == run.options["job_type"] == "figures"
    assert {name for entry in run.logged for name in entry} == {"figures/cost", "figures/init"}


def test_without_matplotlib_it_says_what_to_install(monkeypatch, request):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    script = request.config.rootpath / "scripts" / "make_figures.py"
    with pytest.raises(
        SystemExit, match=r"figures need matplotlib: python -m pip install .*figures"
    ):
        runpy.run_path(str(script), run_name="__main__")

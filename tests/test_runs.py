"""Runs as one table: the same run is the same, whether from its folder or published."""

import json

import pytest
from written_runs import PARAMETERS, write_run

from experiments.config import CONF
from experiments.records import publish_record, read_record
from experiments.runs import (
    default_options,
    flatten,
    read_runs,
    select,
)

METHODS = sorted(
    path.stem
    for path in (CONF / "method").glob("*.yaml")
    if not path.stem.endswith(("_short", "_rex"))
)
#: Overrides, the name of the method, and the options that are not at their defaults.
CASES = [
    ((), "jlcm", {}),
    (("learn=none",), "jlcm_init", {}),
    (("method=jlcm_init",), "jlcm_init", {}),
    (
        ("learn=lnq",),
        "jlcm",
        {"learn.allocation": "uniform", "learn.distill.epochs": None, "learn.rotation": None},
    ),
    (
        ("learn=none", "learn.rotation=hadamard"),
        "jlcm",
        {"learn.allocation": "uniform", "learn.distill.epochs": None, "learn.kind": "none"},
    ),
    (("learn.distill.epochs=4",), "jlcm", {"learn.distill.epochs": 4}),
    (("method=jlcm_init", "init=kmeans"), "jlcm_init", {"init.method": "kmeans"}),
    (("method=jlcm_rex",), "jlcm", {"rex.outliers": "auto"}),
    (("method=rtn", "init=kmeans", "learn=none"), "rtn", {}),
    (
        ("method=brecq", "method.bits=4", "encoding.first_last=int8"),
        "brecq",
        {"encoding.first_last": "int8", "method.bits": 4},
    ),
]


@pytest.mark.parametrize("method", METHODS)
def test_defaults_of_every_method_are_defaults(method, tmp_path):
    write_run(tmp_path, f"method={method}", "alpha=5.33", "seed=2", "model=efficientnet_lite0")
    runs = read_runs(tmp_path)
    assert list(runs["method"]) == [method]
    assert list(runs["options"]) == ["{}"]
    assert len(default_options(runs)) == 1


@pytest.mark.parametrize(("overrides", "method", "options"), CASES)
def test_options_are_what_differs_from_the_defaults(overrides, method, options, tmp_path):
    write_run(tmp_path, *overrides)
    (run,) = read_runs(tmp_path).itertuples()
    assert run.method == method
    assert json.loads(run.options) == options
    assert run.reference_bytes == 2 * PARAMETERS


@pytest.mark.parametrize("overrides", [case[0] for case in CASES])
def test_published_record_is_the_run(overrides, tmp_path):
    folder = write_run(tmp_path / "a", *overrides)
    publish_record(tmp_path / "b", read_record(folder))
    (record,), (published,) = (read_runs(tmp_path / name).itertuples() for name in "ab")
    for name in ("run_id", "method", "panel", "options", "alpha_goal", "kl", "file_bytes"):
        assert getattr(record, name) == getattr(published, name), name
    assert published.folder is None


def test_damaged_records_are_named_and_left_out(tmp_path, caplog):
    write_run(tmp_path, "method=rtn")
    runs = tmp_path / "runs"
    whole = json.loads(next(runs.glob("*/record.json")).read_text())
    damages = {
        "cut": json.dumps(whole)[:-20],
        "list": "[1, 2]",
        "number": "3",
        "no_layers": json.dumps({k: v for k, v in whole.items() if k != "layers"}),
        "no_top1": json.dumps(whole | {"packed": {"kl": 1.0, "samples": 5}}),
        "text": json.dumps(whole | {"footprint": {"file_bytes": "many", "alpha_total": 2}}),
        "no_config": json.dumps(whole | {"config": None}),
    }
    for name, text in damages.items():
        (runs / name).mkdir()
        (runs / name / "record.json").write_text(text.replace(whole["run_id"], name))
    table = read_runs(tmp_path)
    assert list(table["run_id"]) == [whole["run_id"]]
    assert len(caplog.messages) == len(damages)
    for name in damages:
        assert sum(name in message for message in caplog.messages) == 1, name


def test_divergence_that_is_not_finite_is_no_damage(tmp_path):
    write_run(tmp_path, kl=float("nan"))
    assert read_runs(tmp_path)["kl"].isna().all()


def test_images_of_other_lists_are_another_panel(tmp_path):
    for name in ("first", "second"):
        write_run(tmp_path, "data=image_list", "data.root=/images", f"data.list=/lists/{name}.tsv")
    panels = set(read_runs(tmp_path)["panel"])
    assert {panel.split(", ")[-1] for panel in panels} == {"first.tsv", "second.tsv"}
    write_run(tmp_path / "moved", "data=image_list", "data.root=/a", "data.list=/b/first.tsv")
    write_run(tmp_path / "moved", "data=image_list", "data.root=/c", "data.list=/d/first.tsv")
    assert read_runs(tmp_path / "moved")["panel"].nunique() == 1


def test_other_data_or_weights_are_another_panel(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, "data.image_size=64")
    write_run(tmp_path, "model.weights=/somewhere/mine.safetensors")
    panels = sorted(read_runs(tmp_path)["panel"])
    assert panels == [
        "resnet18, digits, 360 images",
        "resnet18, digits, 360 images, image_size=64",
        "resnet18, digits, 360 images, mine",
    ]


def test_select_by_options_as_written_on_the_command_line(tmp_path):
    for overrides in (("alpha=4",), ("alpha=5.33",), ("encoding.fold_bn=true",)):
        write_run(tmp_path, *overrides)
    runs = read_runs(tmp_path)
    assert list(select(runs, ["alpha=4"])["alpha_goal"]) == [4]
    assert len(select(runs, ["encoding.fold_bn=false", "model.name=resnet18"])) == 2
    assert len(select(runs, ["method.bits=null", "alpha=7.5"])) == 1
    one = runs["run_id"].iloc[0]
    assert list(select(runs, [f"run_id={one}"])["run_id"]) == [one]
    with pytest.raises(ValueError, match="no run has the option alhpa"):
        select(runs, ["alhpa=4"])
    with pytest.raises(ValueError, match="no run fits alpha=3"):
        select(runs, ["alpha=3"])
    with pytest.raises(ValueError, match="KEY=VALUE, not alpha"):
        select(runs, ["alpha"])


def test_default_options_but_for_what_was_asked(tmp_path):
    for overrides in ((), ("learn=lnq",), ("init=kmeans",)):
        write_run(tmp_path, *overrides)
    runs = read_runs(tmp_path)
    assert len(default_options(runs)) == 1
    assert len(default_options(runs, {"init.method"})) == 2
    chosen = {"learn.allocation", "learn.distill.epochs", "learn.rotation"}
    assert len(default_options(runs, chosen)) == 2


def test_flatten_leaves_out_what_is_null():
    nested = {"a": {"b": 1, "c": None, "d": {}}, "e": False, "f": [1]}
    assert flatten(nested) == {"a.b": 1, "e": False, "f": [1]}

"""The command line: names, types and choices, and what a run's identity depends on."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import DigitsConfig, ImageListConfig, identity, register, run_id
from experiments.options import AUTO_OUTLIERS, check_options, compressor, needs_calibration
from experiments.overrides import check_overrides, one_line, valid_keys
from experiments.runner import _memory_errors, choose_device
from jlcm.config import ENCODINGS, Invalid
from jlcm.quantize import METHODS

register()


def composed(*overrides):
    with initialize(version_base="1.3", config_path="../conf"):
        return compose("config", overrides=list(overrides))


def options_of(*overrides):
    """Arguments of the call that compresses."""
    config = OmegaConf.to_object(composed(*overrides))
    check_options(config)
    return compressor(config).keywords


@pytest.mark.parametrize("init", ["random", "kmeans", "bisecting", "spectral", "hierarchical"])
def test_every_init_composes_and_is_valid(init):
    assert options_of(f"init={init}")["init"].method == init


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_composes_and_is_valid(encoding):
    assert options_of(f"encoding={encoding}")["encoding"].kind == encoding


@pytest.mark.parametrize("model", ["smollm2_135m", "llama7b", "hf"])
def test_language_models_choose_their_data_and_encoding(model):
    chosen = f"model={model}", "model.name=folder"
    assert composed(*chosen).data.kind == "commonsense"
    assert options_of(*chosen)["encoding"].kind == "trellis"
    assert options_of(*chosen, "encoding=tiles")["encoding"].kind == "tiles"
    with pytest.raises(Invalid, match="learn=proximal moves codes .* encoding=multi_scale"):
        options_of(*chosen, "learn=proximal")
    options_of(*chosen, "learn=proximal", "encoding=multi_scale")


def test_groups_become_their_dataclasses():
    assert isinstance(OmegaConf.to_object(composed()).data, DigitsConfig)
    lists = composed("data=image_list", "data.root=a", "data.list=b")
    assert isinstance(OmegaConf.to_object(lists).data, ImageListConfig)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("alpah=3", ("alpah", "did you mean 'alpha'", "encoding")),
        ("encoding.budgett=pooled", ("encoding.budgett", "did you mean 'budget'")),
        ("init=foo", ("init/foo", "hierarchical", "spectral")),
        ("model=resnet19", ("resnet19", "resnet18", "vit_b16")),
        ("alpha=abc", ("alpha=abc", "could not be converted to Float")),
        ("seed=1.5", ("seed=1.5", "could not be converted to Integer")),
    ],
)
def test_wrong_overrides_name_the_cause_and_the_choices(argument, parts):
    with pytest.raises((ValueError, HydraException, OmegaConfBaseException)) as error:
        check_overrides([argument])
    assert all(part in one_line(error.value) for part in parts)


def test_right_overrides_pass():
    check_overrides(["model=mobilenet_v2", "alpha=5.33", "data.limit=10", "hydra.job.name=x"])
    check_overrides(["--multirun", "init=kmeans,random"])
    assert "image_size" in valid_keys()["data"] and "calibration_list" in valid_keys()["data"]


@pytest.mark.parametrize("alpha", [1, 0, -3, 16.01, "nan"])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha=.*must be above 1 and at most 16"):
        check_options(OmegaConf.to_object(composed(f"alpha={alpha}")))


@pytest.mark.parametrize("option", ["threads=0", "batch_size=0", "workers=-1"])
def test_the_machine_needs_sensible_numbers(option):
    with pytest.raises(ValueError, match=f"compute.{option.partition('=')[0]}.* at least"):
        options_of(f"compute.{option}")


@pytest.mark.parametrize(
    ("override", "choice"),
    [
        ("encoding.kind=huffman", "multi_codebook"),
        ("encoding.budget=none", "per_layer"),
        ("encoding.first_last=fp32", "int8"),
        ("init.method=som", "bisecting"),
        ("init.features=mean", "quantiles"),
        ("reorder.mode=maybe", "propagated"),
        ("output=xml", "json"),
    ],
)
def test_wrong_choices_list_the_right_ones(override, choice):
    with pytest.raises(ValueError, match=choice):
        options_of(override)


def test_unreachable_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="sees no GPU"):
        choose_device("cuda")


def test_identity_ignores_the_machine_and_nothing_else():
    base = run_id(composed())
    same = (
        "compute.batch_size=8", "force=true", "output=json", "results_dir=elsewhere",
        "tracking=online", "tracking.artifact=true",
    )  # fmt: skip
    different = ("alpha=5.33", "seed=1", "init=kmeans", "encoding=auto", "data.image_size=64")
    assert {run_id(composed(o)) for o in same} == {base}
    assert len({run_id(composed(o)) for o in different} | {base}) == len(different) + 1


@pytest.mark.parametrize(
    "kind", [path.stem for path in (Path(__file__).parent.parent / "conf" / "learn").iterdir()]
)
def test_every_learn_composes_and_is_valid(kind):
    config = OmegaConf.to_object(composed(f"learn={kind}"))
    stages = options_of(f"learn={kind}")
    assert (stages["learn"] is None) == (kind == "none")
    assert (stages["blocks"] is None) == (kind != "blocks")
    assert (stages["distill"] is None) == (kind not in ("distill", "jlcm"))
    assert needs_calibration(config) == (kind != "none")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_says_what_to_lower(error):
    with pytest.raises(ValueError, match="learn.options.memory"), _memory_errors():
        raise error
    with pytest.raises(RuntimeError, match="shapes"), _memory_errors():
        raise RuntimeError("shapes differ")


def test_unknown_learning_options_are_refused():
    with pytest.raises(ValueError, match="learning_rate"):
        options_of("+learn.options.learning_rate=1")
    with pytest.raises(ValueError, match="corrected, printed"):
        options_of("learn=joint", "+learn.options.sign=other")


CONF_METHODS = [path.stem for path in (Path(__file__).parent.parent / "conf" / "method").iterdir()]


def test_every_method_has_a_configuration():
    names = {method.removesuffix("_short").removesuffix("_rex") for method in CONF_METHODS}
    assert names == {"jlcm", "jlcm_init", *METHODS}


@pytest.mark.parametrize("method", CONF_METHODS)
def test_every_method_composes_and_is_valid(method):
    options = options_of(f"method={method}", "encoding.first_last=int8")
    config = OmegaConf.to_object(composed(f"method={method}"))
    method = config.method.name
    if method in METHODS:
        assert options["method"] == method and options["first_last"] == "int8"
        assert isinstance(options["options"], METHODS[method].options)
        assert needs_calibration(config) == METHODS[method].needs_inputs
    else:
        assert options["encoding"].first_last == "int8"
        assert (options["learn"] is None) == (method == "jlcm_init")
        assert needs_calibration(config) == (method == "jlcm")


def test_a_method_is_identified_by_what_it_looks_at():
    for other in ("init=kmeans", "encoding=auto", "learn=none", "reorder=none"):
        assert run_id(composed("method=rtn")) == run_id(composed("method=rtn", other))
        same = run_id(composed("method=jlcm_init")) == run_id(composed("method=jlcm_init", other))
        assert same == other.startswith("learn")
    assert identity(composed("method=rtn"))["encoding"] == {"first_last": "same"}
    different = ("method.bits=4", "+method.options.range=min_max", "encoding.first_last=int8")
    assert len({run_id(composed("method=rtn", o)) for o in different}) == len(different)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=gptq"], "squant"),
        (["method=rtn", "+method.options.lr=1"], "lr"),
        (["method=rtn", "+method.options.range=half"], "min_max"),
        (["method.bits=4"], "no options of its own"),
        (["method=rtn", "rex.outliers=auto"], "jlcm_init or rex"),
        (["rex.outliers=1.5"], "between 0 and 1"),
        (["rex.outliers=many"], "between 0 and 1"),
        (["method=dfq", "encoding.first_last=fp8"], "int8"),
    ],
)
def test_wrong_options_of_methods_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        options_of(*overrides)


def test_outliers_are_a_part_of_the_bytes():
    assert options_of("rex.outliers=auto")["outliers"] == AUTO_OUTLIERS
    assert options_of("rex.outliers=0.1")["outliers"] == 0.1
    assert options_of()["outliers"] == 0
    assert options_of("method=rex", "rex.outliers=0.1")["options"].outliers == 0.1

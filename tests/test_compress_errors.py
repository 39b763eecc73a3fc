"""Whole networks: wrong options, values and goals are refused, with a clear message."""

import copy
import math
import sys

import pytest
import torch
from conftest import compress
from torch import nn

import jlcm
from jlcm.config import Invalid


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0, -3.0, 16.01, math.nan, math.inf, -math.inf])
def test_alpha_out_of_range(mlp, alpha):
    with pytest.raises(Invalid, match="above 1 and at most 16"):
        compress(mlp, alpha=alpha)


@pytest.mark.parametrize(
    "option", ["init", "encoding", "reorder", "budget", "first_last", "features"]
)
def test_unknown_options_list_the_choices(mlp, option):
    with pytest.raises(Invalid, match=f"{option}='nonsense' is not one of .*, "):
        match option:
            case "budget" | "first_last":
                jlcm.Encoding(**{option: "nonsense"})
            case "features":
                jlcm.Init(features="nonsense")
            case _:
                compress(mlp, **{option: "nonsense"})


@pytest.mark.parametrize("tile", [(0, 8), (8,), (8, -1), (8, 8, 8), (8, 2.5)])
def test_tiles_are_two_positive_sizes(tile):
    with pytest.raises(Invalid, match="not two positive sizes"):
        jlcm.Encoding(kind="tiles", tile=tile)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["2.weight", "4.bias"])
def test_values_that_are_not_finite_name_the_tensor(mlp, value, name):
    model = copy.deepcopy(mlp)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(ValueError, match=f"tensor '{name}' has NaN or Inf"):
        compress(model)


def test_nan_statistics_name_the_buffer(cnn):
    model = copy.deepcopy(cnn)
    model.norm.running_var[2] = math.nan
    with pytest.raises(ValueError, match="tensor 'norm.running_var' has NaN"):
        compress(model)


@pytest.mark.parametrize("name", ["0.weight", "4.bias"])
def test_values_beyond_float16_name_the_tensor(mlp, name, monkeypatch):
    model = copy.deepcopy(mlp).double()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = 1e6
    monkeypatch.setattr(sys.modules["jlcm.compress"], "encode", None)  # before the long work
    with pytest.raises(ValueError, match=f"'{name}' has values beyond 65504"):
        compress(model)


def test_bfloat16_weights_beyond_float16(mlp):
    model = copy.deepcopy(mlp).bfloat16()
    with torch.no_grad():
        model[4].bias[0] = 1e6
        assert compress(model)[4].bias[0] > 9e5  # biases keep bfloat16
        model[0].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="'0.weight' has values beyond 65504"):
        compress(model)


def test_no_layer_selected(mlp):
    with pytest.raises(ValueError, match="no layer selected"):
        compress(mlp, filter_fn=lambda module, name: False)
    with pytest.raises(ValueError, match="no layer selected"):
        compress(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)))


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.BatchNorm1d(4), nn.LayerNorm(4, elementwise_affine=False)]
)
def test_filters_must_choose_layers_with_a_weight_matrix(module):
    model = nn.Sequential(nn.Linear(4, 4), module)
    with pytest.raises(ValueError, match="accepted layer '1', but .* has no weight matrix"):
        compress(model, filter_fn=lambda m, n: n in ("0", "1"))


def parametrized() -> list[nn.Module]:
    return [
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        torch.nn.utils.spectral_norm(nn.Linear(8, 8)),
    ]


@pytest.mark.parametrize("index", range(3))
def test_computed_weights_are_refused(index):
    model = nn.Sequential(nn.Linear(8, 8), parametrized()[index])
    with pytest.raises(ValueError, match="1.weight of .* is computed from other tensors"):
        compress(model)


@pytest.mark.parametrize("index", [0, 2])
def test_computed_weights_elsewhere_do_no_harm(index, tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 8), parametrized()[index]).eval()

    packed = compress(make(), alpha=2.5, filter_fn=lambda m, n: n == "0")
    x = torch.linspace(-1, 1, 24).view(3, 8)
    expected = make()[1](packed[0](x))
    assert (packed(x) - expected).norm() <= 2e-3 * expected.norm()
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    assert torch.equal(jlcm.load(path, model=make())(x), packed(x))


def test_compressing_twice_is_refused(mlp):
    packed = compress(mlp)
    with pytest.raises(ValueError, match="already compressed"):
        compress(packed)
    with pytest.raises(ValueError, match="already compressed"):
        compress(nn.Sequential(packed, nn.Linear(10, 10)))


def test_meta_tensors_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'0.weight' has no values"):
        compress(model)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({"7.weight": torch.ones(48, 48)}, "'7.weight', which is not a selected tensor"),
        ({"2.weight": torch.ones(48, 47)}, r"shape \(48, 47\)"),
        ({"2.weight": -torch.ones(48, 48)}, "negative"),
        ({"2.weight": torch.full((48, 48), math.nan)}, "NaN"),
    ],
)
def test_wrong_importance(mlp, importance, message):
    with pytest.raises(ValueError, match=message):
        compress(mlp, importance=importance)


def test_importance_of_zero_everywhere_counts_evenly(mlp):
    zero = {"2.weight": torch.zeros(48, 48)}
    one = {"2.weight": torch.ones(48, 48)}
    assert torch.equal(
        compress(mlp, importance=zero, reorder="none")[2].weight,
        compress(mlp, importance=one, reorder="none")[2].weight,
    )


def test_propagation_needs_example_inputs(mlp):
    with pytest.raises(Invalid, match="needs example_inputs"):
        compress(mlp, reorder="propagated")


def test_unreachable_goals_say_what_is_reached(mlp):
    with pytest.raises(Invalid, match=r"alpha=15.99 cannot be reached .* reach 1\d\.\d+"):
        compress(mlp, alpha=15.99)


@pytest.mark.parametrize("stage", [{"learn": jlcm.Learn()}, {"distill": jlcm.Distill()}])
def test_learning_needs_calibration_inputs(mlp, stage):
    with pytest.raises(Invalid, match="calibration"):
        compress(mlp, **stage)

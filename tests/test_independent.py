"""Compared methods against implementations of others, where these are installed.

AIMET is no dependency: `pip install --no-deps aimet-torch` and what its import then asks for.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jlcm
from jlcm.methods.adaround import AdaRound
from jlcm.methods.chains import Chains
from jlcm.methods.dfq import equalise
from jlcm.methods.grid import min_max

G = torch.Generator()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_row", [True, False])
def test_rounding_equals_pytorch_s_fake_quantisation(bits, per_row):
    weight = torch.randn(12, 50, generator=G.manual_seed(0)) + 0.2
    grid = min_max(weight, bits, per_row=per_row)
    scale, zero = grid.step.expand(12, 1).flatten(), grid.zero.expand(12, 1).flatten().int()
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, 0, 2**bits - 1)
    # PyTorch multiplies by the inverse of the step, which may tip a tie.
    difference = (grid.values(grid.codes(weight)) - expected).abs()
    assert (difference > 1e-6).float().mean() < 0.01


def images(count: int, seed: int) -> torch.Tensor:
    return F.interpolate(torch.randn(count, 3, 4, 4, generator=G.manual_seed(seed)), (8, 8))


def test_equalisation_equals_aimet_s():
    aimet = pytest.importorskip("aimet_torch.cross_layer_equalization")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.ReLU6()
    ).eval()
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    aimet.equalize_model(theirs, dummy_input=torch.zeros(1, 3, 8, 8))
    equalise(ours, Chains(ours, {}).pairs(), {})
    assert not torch.allclose(ours[0].weight, model[0].weight, rtol=0.01)
    for index in (0, 2):
        assert torch.allclose(ours[index].weight, theirs[index].weight, rtol=1e-4, atol=1e-6)
    assert torch.allclose(ours[0].bias, theirs[0].bias, rtol=1e-4, atol=1e-6)


def test_adaround_is_as_good_as_aimet_s(tmp_path):
    aimet = pytest.importorskip("aimet_torch.adaround.adaround_weight")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()
    x, new = images(256, 1), images(256, 2)
    loader = torch.utils.data.DataLoader(x, batch_size=32)
    theirs = aimet.Adaround.apply_adaround(
        copy.deepcopy(model),
        torch.zeros(1, 3, 8, 8),
        aimet.AdaroundParameters(
            loader, len(loader), default_num_iterations=2000, forward_fn=lambda net, data: net(data)
        ),
        str(tmp_path),
        "adaround",
        default_param_bw=4,
    )
    ours, nearest = (
        jlcm.quantize(model, m, bits=4, options=o, calibration=x, progress=False)
        for m, o in (("adaround", AdaRound()), ("rtn", None))
    )
    with torch.no_grad():
        errors = [float((net(new) - model(new)).norm()) for net in (ours, theirs, nearest)]
    assert errors[0] < 1.2 * errors[1] and errors[0] < 0.6 * errors[2]

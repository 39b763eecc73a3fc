"""AWQ: scales and ranges against plain loops over candidates, folding, files, notes."""

import copy

import pytest
import torch
from conftest import build
from test_scalings import Normed, llama, tokens
from torch import Tensor, nn

import jlcm
from jlcm.config import Invalid
from jlcm.layers import stored_tensors
from jlcm.learning.forward import running
from jlcm.methods.awq import AWQ, clipped, rounded_with, search_scales
from jlcm.methods.grid import join_groups, min_max
from jlcm.methods.network import Network
from jlcm.methods.observe import observe, stages
from jlcm.methods.rtn import RTN
from jlcm.methods.scalings import find_scalings
from jlcm.packing import packed_bytes
from jlcm.uniform import UniformWeight


def quantize(model: nn.Module, inputs: Tensor, bits: int = 3, **options) -> nn.Module:
    first_last = options.pop("first_last", "same")
    given = {"options": AWQ(**options), "calibration": inputs, "progress": False}
    return jlcm.quantize(model, "awq", bits=bits, first_last=first_last, **given)


def uniform(packed: nn.Module) -> dict[str, UniformWeight]:
    return {n: held for n, held in stored_tensors(packed) if isinstance(held, UniformWeight)}


def with_large_channels(model: nn.Module) -> nn.Module:
    """A few channels far larger than the others, as in large language models."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.fill_(1)[::8] *= 30
            elif name.endswith("v_proj.weight") or name.endswith("up_proj.weight"):
                parameter[::8] *= 30
    return model


@torch.no_grad()
def distance(packed: nn.Module, model: nn.Module, x: Tensor) -> float:
    outputs = (getattr(m(x), "logits", m(x)) for m in (packed, model))
    found, expected = outputs
    return float((found - expected).norm() / expected.norm())


def plain_rounding(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round to nearest from minimum to maximum, zero included, group by group."""
    result = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], group):
            part = weight[row, first : first + group]
            low, high = part.min().clamp(max=0), part.max().clamp(min=0)
            step = ((high - low) / (2**bits - 1) * 2 ** (bits - 1)).half().float() / 2 ** (bits - 1)
            zero = (-low / step).round()
            codes = (part / step + zero).round().clamp(0, 2**bits - 1)
            result[row, first : first + group] = (codes - zero) * step
    return result


@torch.no_grad()
@pytest.mark.parametrize("group", [None, 16])
def test_scales_are_the_best_of_the_candidates(group):
    """Every candidate is put into a copy of the network, whose blocks run on the same inputs."""
    model, x = with_large_channels(llama()), tokens(8)
    options, bits, size = AWQ(group=group), 3, group or 100
    weights = {n: p for n, p in model.named_parameters() if n.endswith("proj.weight")}
    network = Network(model, weights, dict.fromkeys(weights, bits), 5.33, calibration=x)
    scalings = find_scalings(model, {}, x)
    units = [list(scaling.consumers) for scaling in scalings]
    moved = 0
    for stage in stages(model, units, [x], 4):
        here = [s for s in scalings if s.consumers[0] in stage.names]
        blocks = {s.block for s in here if s.block}
        grams = {name for s in here if not s.block for name in s.consumers}
        settings = {"blocks": blocks, "grams": grams, "positions": 512, "kept": 512}
        seen = observe(model, stage, [x], **settings)
        for scaling in here:
            block = scaling.block or scaling.consumers[0].rpartition(".")[0]
            name, caught = scaling.consumers[0].rpartition(".")[0], []
            hooks = [
                model.get_submodule(m).register_forward_pre_hook(
                    lambda _, *call, caught=caught: caught.append(call), with_kwargs=True
                )
                for m in dict.fromkeys((block, name))
            ]
            model(x, use_cache=False)
            [hook.remove() for hook in hooks]
            mean = caught[-1][0][0].abs().mean((0, 1))
            errors = []
            for i in range(20):
                factors = (mean ** (i / 20)).clamp(min=1e-4)
                factors = factors / (factors.max() * factors.min()).sqrt()
                outputs = []
                for changed in (False, True):
                    twin = copy.deepcopy(model)
                    for consumer in scaling.consumers if changed else ():
                        weight = twin.get_parameter(consumer)
                        weight.copy_(plain_rounding(weight * factors, bits, size) / factors)
                    args, kwargs = caught[0]
                    with running(x, torch.device("cpu")):
                        output = twin.get_submodule(block)(*args, **kwargs)
                    output = output[0] if isinstance(output, tuple) else output
                    outputs.append(output.float())
                errors.append((float((outputs[0] - outputs[1]).square().sum()), factors))
            best, expected = min(errors, key=lambda pair: pair[0])
            found = search_scales(network, scaling, seen, options)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
            assert best <= errors[0][0]
            moved += best < 0.8 * errors[0][0]
    assert moved >= 6


def test_rounding_with_scales_is_that_of_the_scaled_weight():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, generator=generator)
    factors = torch.rand(5, generator=generator) + 0.5
    scaled = (weight * factors.view(1, 5, 1, 1)).view(6, 45)
    expected = plain_rounding(scaled, 4, 8).view_as(weight) / factors.view(1, 5, 1, 1)
    found = rounded_with(weight, factors, 4, AWQ(group=8))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [None, 16, 20])
def test_ranges_are_the_best_of_the_candidates(group):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(10, 48, generator=generator) ** 3
    mixing = torch.randn(48, 48, generator=generator)
    columns = mixing @ torch.randn(48, 60, generator=generator)
    size = group or 48
    found = join_groups(clipped(matrix, columns[None], 3, AWQ(group=group)), 10, 48)
    narrower = 0
    for row in range(10):
        for first in range(0, 48, size):
            part, x = matrix[row, first : first + size], columns[first : first + size]
            errors = []
            for i in range(10):
                inside = part.clamp(
                    -(1 - i / 20) * part.abs().max(), (1 - i / 20) * part.abs().max()
                )
                wrong = plain_rounding(inside[None], 3, size)[0] - part
                errors.append((float((wrong @ x).square().sum()), inside))
            best, expected = min(errors, key=lambda pair: pair[0])
            torch.testing.assert_close(found[row, first : first + size], expected)
            narrower += best < errors[0][0]
    assert narrower > 5


def test_groups_of_a_convolution_are_clipped_by_their_own_inputs():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(12, 9, generator=generator) ** 3
    columns = torch.randn(4, 9, 50, generator=generator)
    found = clipped(matrix, columns, 3, AWQ())
    parts = [clipped(matrix[3 * i : 3 * i + 3], columns[i : i + 1], 3, AWQ()) for i in range(4)]
    assert torch.equal(found, torch.cat(parts))


@pytest.mark.parametrize("group", [None, 16])
def test_large_channels_cost_less_than_with_rounding_to_nearest(group, tmp_path):
    model, x = with_large_channels(llama()), tokens(16)
    kept = copy.deepcopy(model.state_dict())
    packed = quantize(model, x, group=group)
    plain = jlcm.quantize(
        model, "rtn", bits=3, options=RTN(range="min_max", group=group), progress=False
    )
    new = torch.randint(64, (16, 16), generator=torch.Generator().manual_seed(9))
    assert distance(packed, model, new) < 0.6 * distance(plain, model, new)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert jlcm.footprint(packed).alpha_layers == jlcm.footprint(plain).alpha_layers
    for held in uniform(packed).values():
        groups = 1 if group is None else held.shape[1] // group
        assert held.sizes()["scales"] == 2 * held.rows * groups + packed_bytes(
            held.rows * groups, 3
        )
    norms = dict(packed.named_modules())["model.layers.0.input_layernorm"]
    assert not torch.allclose(norms.weight, kept["model.layers.0.input_layernorm.weight"])
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again = jlcm.load(path, model=copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(again(x).logits, packed(x).logits)
    assert jlcm.save(again, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_each_part_helps_and_queries_are_not_clipped():
    model, x = with_large_channels(llama()), tokens(16)
    errors = {
        (scale, clip): distance(quantize(model, x, scale=scale, clip=clip), model, tokens(16))
        for scale in (True, False)
        for clip in (True, False)
    }
    assert errors[True, True] < errors[False, True] and errors[True, False] < errors[False, False]
    packed = quantize(model, x, scale=False)
    for name, held in uniform(packed).items():
        whole = min_max(model.get_parameter(name), 3).stored
        same = torch.equal(held.scales, whole(held.unpack_codes(), held.shape, held.dtype).scales)
        assert same == any(part in name for part in ("q_proj", "k_proj"))


def test_networks_for_images_are_scaled_where_they_can_be(networks):
    for name in ("cnn", "vit"):
        model, x = networks[name]
        inputs = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(0))
        packed = quantize(model, inputs)
        plain = jlcm.quantize(model, "rtn", bits=3, options=RTN(range="min_max"), progress=False)
        assert distance(packed, model, x) < distance(plain, model, x)
    assert "nothing is scaled: no operation before a layer can take its scales" in (
        packed.compression.notes
    )


def test_attention_takes_its_scales_from_the_norm_before():
    model = build(Normed)
    with torch.no_grad():
        model.third.weight[::4] *= 20
    x = torch.randn(32, 6, 16, generator=torch.Generator().manual_seed(0))
    packed = quantize(model, x)
    (noted,) = [note for note in packed.compression.notes if "are not scaled" in note]
    assert noted.startswith("4 of 7 weights")
    assert not torch.allclose(packed.third.weight, model.third.weight)
    assert torch.allclose(packed.second.weight, model.second.weight.half().float())


def test_what_has_no_place_for_scales_is_noted_once():
    model, x = llama(2), tokens()
    packed = quantize(model, x)
    (noted,) = [note for note in packed.compression.notes if "are not scaled" in note]
    assert noted.startswith("3 of 15 weights")  # o_proj twice, and the head
    assert not any("batch norms" in note for note in packed.compression.notes)
    assert any("128 columns" in note for note in packed.compression.notes)
    assert not any("128 columns" in note for note in quantize(model, x, group=8).compression.notes)


def test_ends_in_eight_bits_are_scaled_along():
    model = nn.Sequential(nn.LayerNorm(24), build(nn.Linear, in_features=24, out_features=16),
                          nn.ReLU(), build(nn.Linear, in_features=16, out_features=16), nn.ReLU(),
                          build(nn.Linear, in_features=16, out_features=10)).eval()  # fmt: skip
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 24)
    packed = quantize(model, x, bits=8, first_last="int8")
    assert len(uniform(packed)) == 1
    assert distance(packed, model, x) < 0.02


def test_runs_are_reproducible_and_inputs_that_never_differ_from_zero_do_no_harm():
    model, x = llama(), tokens()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
        model.model.layers[1].mlp.up_proj.weight[5] = 0
    first, second = (quantize(model, x) for _ in range(2))
    pairs = zip(first.buffers(), second.buffers(), strict=True)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [{"group": 0}, {"symmetric": 1}, {"scale": 0}, {"clip": "no"}, {"clip_tokens": 0},
     {"positions": 0}, {"forward_batch": 0}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(Invalid, match=next(iter(options))):
        AWQ(**options)

"""LLM.int8(): what is stored, and what is not simulated."""

import copy

import pytest
import torch
from conftest import build
from torch import nn

import jlcm
from jlcm.layers import stored_tensors
from jlcm.packed import StoredWeight


def quantize(model: nn.Module, **options) -> nn.Module:
    return jlcm.quantize(model, "llm_int8", progress=False, **options)


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
def test_rows_are_rounded_to_127_steps_of_their_largest_magnitude(networks, name, tmp_path):
    model, x = networks[name]
    packed = quantize(model, alpha=5.33)
    weights = {n: s for n, s in stored_tensors(packed) if isinstance(s, StoredWeight)}
    plain = jlcm.quantize(model, "rtn", progress=False)  # folds the same norms
    assert weights.keys() == {n for n, s in stored_tensors(plain) if isinstance(s, StoredWeight)}
    for held in weights.values():
        rows, columns = held.rows, held.count // held.rows
        assert held.bits == 8
        assert sum(held.sizes().values()) == rows * columns + 2 * rows
        assert held.relative_error < 0.02
        largest = held().view(rows, -1).abs().amax(1)
        step = held.scales.float() / 128
        torch.testing.assert_close(largest, 127 * step)
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    assert torch.equal(jlcm.load(path, model=copy.deepcopy(model))(x), packed(x))


def test_codes_are_those_of_the_paper_s_formula():
    layer = build(nn.Linear, in_features=40, out_features=12)
    packed = quantize(nn.Sequential(layer))
    weight = layer.weight.detach()
    largest = weight.abs().amax(1, keepdim=True)
    expected = (127 * weight / largest).round()
    found = packed[0].packed["weight"].unpack_codes().view(12, 40).float() - 128
    assert (found - expected).abs().max() <= 1  # scales are rounded to float16
    assert (found == expected).float().mean() > 0.95
    assert (packed[0].weight - expected * largest / 127).abs().max() < 0.01 * largest.max()


def test_bits_that_it_does_not_have_are_noted():
    layer = nn.Sequential(build(nn.Linear, in_features=40, out_features=12))
    for options, noted in (({"alpha": 5.33}, True), ({"bits": 4}, True), ({"alpha": 2.0}, False)):
        packed = quantize(layer, **options)
        notes = packed.compression.notes
        assert any("8 bits, whatever alpha" in note for note in notes) == noted
        assert any("unrounded" in note for note in notes)
        assert jlcm.footprint(packed).alpha_layers < 2

"""SQuant: errors of kernels and rows cancel, with the fewest and cheapest flips."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import jlcm
from jlcm.methods.grid import as_rows, min_max
from jlcm.methods.rtn import RTN
from jlcm.methods.squant import SQuant, round_balanced
from jlcm.quantize import quantize

TOP = 15
SLACK = 1e-3  # sums of float32


def positions(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Positions of weights that no flip takes out of the range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) * (TOP - 4) + 2


def sums(codes: Tensor, position: Tensor, size: int) -> Tensor:
    return (codes - position).view(len(codes), -1, size).sum(2).abs()


@pytest.mark.parametrize("size", [3, 9, 25])
@pytest.mark.parametrize("kernels", [1, 2, 64])
def test_errors_of_kernels_and_rows_cancel(size, kernels):
    position = positions(40, size * kernels, size)
    codes = round_balanced(position, TOP, size)
    nearest = position.round()
    assert torch.equal(codes, codes.round())
    assert ((codes - nearest).abs() <= 1).all() and ((codes - position).abs() < 1).all()
    assert (sums(codes, position, codes.shape[1]) <= 0.5 + SLACK).all()
    by_kernel = sums(codes, position, size)
    # What a kernel gives up for its row takes it from at most 1/2 to at most 1.
    assert (by_kernel <= 1 + SLACK).all()
    moved = (by_kernel > 0.5 + SLACK).sum(1)
    assert (moved <= (kernels + 1) // 2).all()
    if kernels == 1:
        assert not moved.any()
    elif kernels == 64:
        assert sums(nearest, position, size).amax() > 1 and moved.any()
    flips = codes != nearest
    squared = (codes - position).square().sum(), (nearest - position).square().sum()
    assert squared[1] <= squared[0] <= 2 * squared[1]
    assert flips.float().mean() < 0.25


@pytest.mark.parametrize("columns", [1, 2, 7, 300])
def test_rows_without_kernels(columns):
    position = positions(30, columns)
    codes = round_balanced(position, TOP, 1)
    assert (sums(codes, position, columns) <= 0.5 + SLACK).all()
    assert ((codes - position.round()).abs() <= 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_fewest_and_cheapest_flips_of_tiny_kernels(seed):
    """Every way to round 6 weights up or down, one after another."""
    position = positions(20, 6, seed)
    codes = round_balanced(position, TOP, 6)
    for row, chosen in zip(position.double(), codes.double(), strict=True):
        nearest = row.round()
        best = None
        for sides in itertools.product((0, 1), repeat=6):
            candidate = row.floor() + torch.tensor(sides, dtype=row.dtype)
            error = candidate - row
            if error.sum().abs() <= 0.5:
                found = int((candidate != nearest).sum()), float(error.square().sum())
                best = found if best is None else min(best, found)
        assert int((chosen != nearest).sum()) == best[0]
        assert float((chosen - row).square().sum()) == pytest.approx(best[1], abs=1e-4)


def slow_channel_stage(position: Tensor, size: int) -> Tensor:
    """The two stages of one row, kernel by kernel and flip by flip."""
    codes = position.round()
    offers = []
    for start in range(0, len(position), size):
        error = (codes - position)[start : start + size]
        total = float(error.sum())
        sign = 1 if total > 0 else -1
        able = [i for i in range(size) if error[i] * sign > 0]
        able.sort(key=lambda i, e=error: -abs(float(e[i])))
        count = round(abs(total))
        for i in able[:count]:
            codes[start + i] -= sign
        rest = total - sign * count
        offer = able[count - 1] if count >= abs(total) else able[count]
        offers.append((rest, start + offer))
    total = sum(rest for rest, _ in offers)
    sign = 1 if total > 0 else -1
    able = sorted((o for o in offers if o[0] * sign > 0), key=lambda o: -abs(o[0]))
    for _, place in able[: round(abs(total))]:
        codes[place] -= sign
    return codes


def test_stages_agree_with_a_loop():
    position = positions(25, 9 * 20, 3)
    codes = round_balanced(position, TOP, 9)
    expected = torch.stack([slow_channel_stage(row, 9) for row in position])
    assert torch.equal(codes, expected)


def test_codes_stay_in_range():
    """Weights at and beyond both ends, in rows that would need many flips."""
    ends = torch.tensor([-0.6, -0.4, 0.4, TOP - 0.4, TOP + 0.4, TOP + 0.6])
    place = torch.randint(0, 6, (50, 36), generator=torch.Generator().manual_seed(0))
    for position in (ends[place], ends[:1].expand(4, 36), ends[3:4].expand(4, 36).contiguous()):
        position = position.contiguous()
        for size in (1, 9):
            codes = round_balanced(position, TOP, size)
            nearest = position.round().clamp(0, TOP)
            assert codes.min() >= 0 and codes.max() <= TOP
            assert ((codes - nearest).abs() <= 1).all()
            # Kernels that lack flips may leave a row with more, but no kernel gets worse by one.
            whole = 36 if size == 1 else size
            allowed = sums(nearest, position, whole).clamp(min=1)
            assert (sums(codes, position, whole) <= allowed + SLACK).all()
    exact = torch.arange(16.0).repeat(2, 1)
    assert torch.equal(round_balanced(exact, TOP, 4), exact)


def test_rows_of_zeros():
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    nn.init.zeros_(model[0].weight[:2])
    assert not quantize(model, "squant", progress=False)[0].weight[:2].any()


class Parts(nn.Module):
    """Layers that do not follow each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_layers_of_all_kinds(bits):
    torch.manual_seed(0)
    layers = {
        "conv": (nn.Conv2d(6, 8, 3), 9),
        "depthwise": (nn.Conv2d(8, 8, 5, groups=8), 25),
        "grouped": (nn.Conv1d(8, 4, 3, groups=2), 3),
        "pointwise": (nn.Conv2d(4, 16, 1), 1),
        "linear": (nn.Linear(16, 5), 1),
    }
    model = Parts()
    for name, (layer, _) in layers.items():
        model.add_module(name, layer)
    packed = quantize(model, "squant", bits=bits, progress=False)
    assert packed.compression.notes == []
    for name, (layer, size) in layers.items():
        matrix = as_rows(layer.weight)
        grid = min_max(matrix, bits)
        stored = packed.get_submodule(name).packed["weight"]
        codes, position = stored.unpack_codes().view(matrix.shape).float(), grid.position(matrix)
        assert torch.equal(codes, round_balanced(position, 2**bits - 1, size))
        assert ((codes - grid.codes(matrix)).abs() <= 1).all()
        assert torch.equal(stored().view(matrix.shape), grid.values(codes))
        if bits >= 3:  # else most weights are at an end of the range
            assert (sums(codes, position, matrix.shape[1]) <= 0.5 + SLACK).all()
            assert size == 1 or (sums(codes, position, size) <= 1 + SLACK).all()


def test_mean_of_outputs_is_kept():
    """Inputs with a common mean: the error of the outputs is what SQuant makes small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 16, 3)).eval()
    x = torch.rand(4, 32, 6, 6) * 0.2 + 1
    error = {}
    for method, options in (("rtn", RTN(range="min_max")), ("squant", SQuant())):
        packed = quantize(model, method, bits=4, options=options, progress=False)
        error[method] = float((packed(x) - model(x)).detach().norm())
    assert error["squant"] < 0.5 * error["rtn"]


def test_without_the_kernel_stage():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    packed = quantize(model, "squant", bits=4, options=SQuant(kernels=False), progress=False)
    matrix = as_rows(model[0].weight)
    codes = round_balanced(min_max(matrix, 4).position(matrix), 15, 1)
    assert torch.equal(packed[0].packed["weight"].unpack_codes().view(8, 72).float(), codes)
    with pytest.raises(jlcm.config.Invalid, match="kernels='yes' must be true or false"):
        SQuant(kernels="yes")


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
@pytest.mark.parametrize("first_last", ["same", "int8"])
def test_eight_bits_keep_the_output(networks, tmp_path, name, first_last):
    model, x = networks[name]
    packed = quantize(model, "squant", bits=8, first_last=first_last, progress=False)
    expected = model(x)
    assert (packed(x) - expected).norm() <= 0.02 * expected.norm()
    idle = [note for note in packed.compression.notes if "kernel stage is idle" in note]
    # The transformer's only kernels belong to its first layer.
    assert len(idle) == (name == "mlp" or (name == "vit" and first_last == "int8"))
    again = jlcm.load(jlcm.save(packed, tmp_path / "m"), model=networks[name][0])
    assert torch.equal(again(x), packed(x))


def test_bytes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    count = jlcm.footprint(quantize(model, "squant", bits=4, progress=False))
    assert count.codes == (8 * 27 + 32) // 2
    assert count.scales == (8 + 4) * 2 + (8 + 4) // 2  # float16 scales, zero points of 4 bits
    assert count.other == 2 * (8 + 4)

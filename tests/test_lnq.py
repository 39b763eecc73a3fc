"""LNQ: bytes, layouts, widths, and the layer error against a plain implementation."""

import copy

import pytest
import torch
from conftest import build
from torch import Tensor, nn

import jlcm
from jlcm.budget import HALF
from jlcm.config import Invalid
from jlcm.layers import HalfTensor, stored_tensors
from jlcm.methods.lnq import LNQ, kmeans_codebooks
from jlcm.methods.network import Network
from jlcm.packed import PackedWeight


class Small(nn.Module):
    """Convolutions with and without a norm after them, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.norm(self.stem(x)).relu()).relu()
        return self.head(self.point(x).relu().mean((2, 3)))


def network() -> nn.Module:
    return build(Small).requires_grad_(False)


def images(count: int = 80, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, (8, 8), mode="bilinear") + 0.2 * fine


def quantize(model: nn.Module, inputs: Tensor | None = None, **changes) -> nn.Module:
    options = {name: changes.pop(name) for name in list(changes) if hasattr(LNQ, name)}
    inputs = images() if inputs is None else inputs
    return jlcm.quantize(
        model, "lnq", options=LNQ(**options), calibration=inputs, progress=False, **changes
    )


def weights_of(packed: nn.Module) -> dict[str, PackedWeight]:
    return {n: held for n, held in stored_tensors(packed) if isinstance(held, PackedWeight)}


def vectors_of(packed: nn.Module) -> dict[str, Tensor]:
    return {n: h.values for n, h in stored_tensors(packed) if isinstance(h, HalfTensor)}


def nbytes(packed: nn.Module) -> int:
    return sum(sum(held.sizes().values()) for held in weights_of(packed).values())


def count(packed: nn.Module) -> int:
    return sum(held.count for held in weights_of(packed).values())


def start_of(model: nn.Module, bits: int, alpha: float = 5.33, **options) -> dict:
    """The k-means start of all weights, and the network with its notes."""
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    given = Network(model, weights, dict.fromkeys(weights, bits), alpha, progress=False)
    return kmeans_codebooks(given, LNQ(**options)), given


def linear_problem() -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = build(nn.Linear, in_features=32, out_features=24, bias=False)
    mixing = torch.randn(32, 32, generator=generator)
    return layer, torch.randn(400, 32, generator=generator) @ mixing


def error(weight: Tensor, layer: nn.Linear, x: Tensor) -> float:
    """(w - w~)^T H (w - w~), summed over rows, relative to w^T H w."""
    original = layer.weight.detach()
    wrong, right = (
        (w.double() @ x.double().T).square().sum() for w in (weight - original, original)
    )
    return float(wrong / right)


def plain_lnq(row: Tensor, gram: Tensor, codes: Tensor, k: int, rounds: int, sweeps: int) -> Tensor:
    """LNQ of one row as the paper writes it: least squares, then one code after the other."""
    for _ in range(rounds):
        chosen = nn.functional.one_hot(codes, k).double()
        square, product = chosen.T @ gram @ chosen, chosen.T @ gram @ row
        codebook = torch.linalg.lstsq(square[None], product[None, :, None]).solution.view(-1)
        for _ in range(sweeps):
            for i in range(len(row)):
                rest = codebook[codes] - row
                rest[i] = 0
                best = row[i] - gram[i] @ rest / gram[i, i]
                codes[i] = (codebook - best).abs().argmin()
    return codebook[codes]


@pytest.mark.parametrize("layout", ["groups", "per_row"])
@pytest.mark.parametrize("bits", [2, 3])
def test_layer_error_is_below_that_of_kmeans(layout, bits):
    layer, x = linear_problem()
    start, _ = start_of(nn.Sequential(layer), bits, layout=layout)
    packed = quantize(nn.Sequential(layer), x, layout=layout, bits=bits)
    found = weights_of(packed)["0.weight"]
    assert found.codebooks.shape == start["0.weight"].codebooks.shape
    assert packed.learning[0].kept == "learned"
    before, after = (error(held(), layer, x) for held in (start["0.weight"], found))
    assert after < 0.7 * before


def test_rows_are_as_good_as_by_a_plain_implementation():
    layer, x = linear_problem()
    start, _ = start_of(nn.Sequential(layer), 2, layout="per_row")
    found = weights_of(quantize(nn.Sequential(layer), x, layout="per_row", bits=2))["0.weight"]
    gram = x.double().T @ x.double() / len(x)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(32).double()
    codes = start["0.weight"].unpack_codes().view(24, 32).long()
    rows = [
        plain_lnq(row.double(), gram, code, 4, rounds=3, sweeps=4)
        for row, code in zip(layer.weight.detach(), codes, strict=True)
    ]
    assert error(found(), layer, x) < 1.1 * error(torch.stack(rows), layer, x)


@pytest.mark.parametrize("alpha", [4.0, 5.33, 7.5])
def test_groups_stay_within_the_budget_and_never_worsen_a_layer(alpha, tmp_path):
    model = network()
    packed = quantize(model, alpha=alpha)
    assert nbytes(packed) <= HALF * count(packed) / alpha < 1.05 * nbytes(packed)
    assert nbytes(packed) == jlcm.footprint(packed).codes + jlcm.footprint(packed).codebooks
    assert len(packed.learning) == 4
    assert all(result.after <= result.before for result in packed.learning)
    assert sum(result.kept == "learned" for result in packed.learning) >= 3
    for held in weights_of(packed).values():
        assert held.codebooks.shape[1] <= 2**held.bits and held.scales is held.order is None
        assert (held.codebooks.diff(dim=1) >= 0).all()
    fewer = {n for n, w in weights_of(packed).items() if w.bits < int(16 / alpha)}
    noted = {note.split(":")[0] for note in packed.compression.notes if "-bit codes" in note}
    assert fewer == noted and (alpha > 4 or fewer)
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again, x = jlcm.load(path, model=copy.deepcopy(model)), images(8, 9)
    assert torch.equal(again(x), packed(x))
    assert jlcm.save(again, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_outputs_are_nearer_than_from_kmeans_and_vectors_stay():
    model, new = network(), images(200, 9)
    start = quantize(model, rounds=1, sweeps=1, damping=1e6)  # a ridge that leaves H no say
    packed = quantize(model)
    errors = [float((m(new) - model(new)).square().mean()) for m in (start, packed)]
    assert errors[1] < 0.8 * errors[0]
    before, after = (vectors_of(m) for m in (start, packed))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(after["deep.bias"], model.deep.bias.half())


def test_rows_have_a_codebook_each():
    packed = quantize(network(), layout="per_row")
    for held in weights_of(packed).values():
        assert held.codebooks.shape == (held.rows, 8) and held.bits == 3
    assert nbytes(packed) > HALF * count(packed) / 5.33
    notes = packed.compression.notes
    assert any("one codebook for each row" in note for note in notes)
    assert not any("groups" in note for note in notes)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_widths_that_are_asked_for_win(bits):
    packed = quantize(network(), bits=bits)
    assert all(held.bits == bits for held in weights_of(packed).values())
    budget = HALF * count(packed) / 5.33
    books = [held.codebooks.shape[0] for held in weights_of(packed).values()]
    if bits < 3:
        assert nbytes(packed) <= budget < 1.05 * nbytes(packed) and min(books) > 1
    else:
        assert nbytes(packed) > budget and max(books) == 1
        assert any("one codebook for each weight" in note for note in packed.compression.notes)


def test_start_is_kmeans_of_flat_groups():
    stored, given = start_of(network(), 3)
    notes = given.notes
    assert len(notes) == len(set(notes)) >= 6 and any("batch norm" in note for note in notes)
    for name, held in stored.items():
        flat = given.weights[name].reshape(-1, 1)
        books = held.codebooks.float()
        index = held.codebook_index()
        own = books[0] if index is None else books[index]
        nearest = (flat - own).abs().amin(1)
        torch.testing.assert_close((flat[:, 0] - held().view(-1)).abs(), nearest, atol=1e-3, rtol=0)


def test_seeded_runs_are_identical_and_ends_may_have_eight_bits():
    model = network()
    kept = copy.deepcopy(model.state_dict())
    first, second = (quantize(model, first_last="int8", seed=2) for _ in range(2))
    assert [held.bits == 8 for held in weights_of(first).values()] == [True, False, False, True]
    pairs = zip(first.buffers(), second.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())
    ends = nn.Sequential(copy.deepcopy(model.head))
    alone = quantize(ends, torch.randn(60, 32), first_last="int8")
    assert [held.bits for held in weights_of(alone).values()] == [8]


def test_transformers_are_learned(vit):
    inputs = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    packed = quantize(vit, inputs)
    assert sum(result.kept == "learned" for result in packed.learning) >= 8
    assert not any("batch norm" in note for note in packed.compression.notes)


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "rows"},
        {"rounds": 0},
        {"sweeps": 0},
        {"damping": -0.1},
        {"positions": 0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(Invalid, match=next(iter(options))):
        LNQ(**options)

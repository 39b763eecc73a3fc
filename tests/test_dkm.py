"""DKM: networks that are trained through soft k-means."""

import copy

import pytest
import torch
from conftest import build
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import jlcm
from jlcm.config import Invalid
from jlcm.layers import stored_tensors
from jlcm.learning.distill import Distill, distill
from jlcm.learning.forward import divergence
from jlcm.learning.trainable import trainable_copy
from jlcm.methods.dkm import DKM, DkmWeight, one_codebook
from jlcm.methods.network import Network
from jlcm.packed import PackedWeight

FAST = {"epochs": 3, "batch_size": 16, "lr": 1e-2, "precision": "fp32"}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small network that has learned to tell stripes of different angles apart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(96, 6),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        x, y = stripes(64, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(0, 6, (count,), generator=generator)
    turn = angle[:, None, None] * torch.pi / 6
    place = torch.arange(8.0)
    wave = (place[:, None] * turn.sin() + place * turn.cos()) * 1.5
    wave = (wave + 6.3 * torch.rand(count, 1, 1, generator=generator)).sin()
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    return wave[:, None] + 0.5 * noise, angle


def quantize(model: nn.Module, inputs: Tensor | None = None, **changes) -> nn.Module:
    options = {name: changes.pop(name) for name in list(changes) if hasattr(DKM, name)}
    return jlcm.quantize(
        model,
        "dkm",
        options=DKM(**{**FAST, **options}),
        calibration=stripes(160, 1000)[0] if inputs is None else inputs,
        progress=False,
        **changes,
    )


def weights_of(packed: nn.Module) -> dict[str, PackedWeight]:
    return {n: held for n, held in stored_tensors(packed) if isinstance(held, PackedWeight)}


def state(packed: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name} {part}": tensor.clone()
        for name, held in stored_tensors(packed)
        for part, tensor in held.named_buffers()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("bits", [2, 3])
def test_training_beats_the_kmeans_start_at_equal_bytes(trained, bits, tmp_path):
    start = quantize(trained, bits=bits, epochs=0)
    packed = quantize(trained, bits=bits, epochs=6)
    (result,) = packed.learning
    assert result.final_loss < 0.7 * result.initial_loss and result.moved_codes > 0
    new = stripes(500, 2000)[0]
    before, after = (float(divergence(model(new), trained(new))) for model in (start, packed))
    assert after < 0.7 * before
    assert {k: (t.shape, t.dtype) for k, t in state(start).items()} == {
        k: (t.shape, t.dtype) for k, t in state(packed).items()
    }
    for held in weights_of(packed).values():
        assert held.codebooks.shape[0] == 1 and held.codebooks.shape[1] <= 2**bits
        assert held.bits == bits and (held.codebooks.diff(dim=1) >= 0).all()
    path = jlcm.save(packed, tmp_path / "m.safetensors")
    again = jlcm.load(path, model=copy.deepcopy(trained))
    assert torch.equal(again(new), packed(new)) and same(state(again), state(packed))


def test_reported_losses_are_those_of_the_hard_network(trained):
    inputs = stripes(100, 3)[0]
    held = inputs[9::10]  # every tenth selects the epoch
    (result,) = (packed := quantize(trained, inputs, bits=2)).learning
    start = quantize(trained, inputs, bits=2, epochs=0)
    for model, loss in ((start, result.initial_loss), (packed, result.final_loss)):
        assert float(divergence(model(held), trained(held))) == pytest.approx(loss, rel=1e-4)


def test_start_is_kept_when_nothing_improves(trained):
    packed = quantize(trained, bits=4, lr=0.9, lr_vectors=0.9, epochs=1)
    assert packed.learning[0].best_epoch == 0
    assert same(state(packed), state(quantize(trained, bits=4, epochs=0)))


def test_seeds_decide_and_the_model_is_left_alone(trained):
    kept = copy.deepcopy(trained.state_dict())
    first, second, other = (quantize(trained, bits=2, seed=seed) for seed in (3, 3, 4))
    assert same(state(first), state(second)) and not same(state(first), state(other))
    assert same(kept, trained.state_dict())


def test_ends_in_eight_bits_stay(trained):
    packed = quantize(trained, bits=2, first_last="int8")
    start = quantize(trained, bits=2, first_last="int8", epochs=0)
    held = weights_of(packed)
    assert [w.bits for w in held.values()] == [8, 2, 2, 8]
    before = {name: w() for name, w in weights_of(start).items()}
    moved = {name for name, w in held.items() if not torch.equal(w(), before[name])}
    assert moved == {"3.weight", "6.weight"}


def test_untrained_copy_at_low_temperature_is_the_hard_network(trained):
    packed = quantize(trained, bits=3, epochs=0)

    def stand_in(stored: PackedWeight, original: Tensor | None) -> DkmWeight:
        made = DkmWeight(stored, original, DKM())
        made.temperature = 1e-6
        return made

    twin, trainables = trainable_copy(packed, trained, codes=True, stand_in=stand_in)
    for name, (trainable, stored) in trainables.items():
        torch.testing.assert_close(trainable(), stored(), rtol=1e-3, atol=1e-3)
        if isinstance(trainable, DkmWeight):
            assert torch.equal(trainable.weights, trained.get_parameter(name).reshape(-1))
        before = stored().clone()
        trainable.write(stored)
        torch.testing.assert_close(stored(), before, rtol=1e-3, atol=1e-3)
    x = stripes(8, 0)[0]
    torch.testing.assert_close(twin(x), packed(x), rtol=1e-2, atol=1e-2)


def test_shared_and_constant_weights_and_bf16():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.second.weight = self.first.weight
            self.flat = nn.Linear(12, 4)
            nn.init.zeros_(self.flat.weight[:2])
            self.head = nn.Linear(4, 5)
            nn.init.constant_(self.head.weight, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.flat(self.second(self.first(x).relu()).relu()))

    torch.manual_seed(0)
    packed = quantize(
        Tied().eval().requires_grad_(False), torch.randn(40, 12), bits=2, precision="bf16"
    )
    assert packed.first.packed["weight"] is packed.second.packed["weight"]
    assert all(tensor.isfinite().all() for tensor in state(packed).values())


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
def test_networks_of_all_kinds(networks, name):
    model, x = networks[name]
    inputs = torch.randn(20, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    packed = quantize(model, inputs, bits=3, epochs=1)
    (result,) = packed.learning
    assert result.final_loss <= result.initial_loss
    assert len(packed.compression.notes) == len(set(packed.compression.notes)) == 5
    assert packed.compression.options["temperature"] == (0.1, 0.003)


def test_one_kmeans_codebook_for_each_weight():
    weight = nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
    network = Network(nn.Module(), {"w": weight}, {"w": 2}, 7.5, progress=False)
    stored = one_codebook(network, DKM())["w"]
    assert stored.codebooks.shape == (1, 4) and stored.scales is None and stored.order is None
    nearest = (weight.view(-1, 1) - stored.codebooks[0].float()).abs().argmin(1)
    assert torch.equal(stored.unpack_codes().long(), nearest)


def test_a_folder_is_refused(trained, tmp_path):
    packed = quantize(trained, bits=2, epochs=0)
    inputs, stand_in = stripes(20, 0)[0], lambda stored, original: None
    options = {"options": Distill(epochs=1), "stand_in": stand_in, "progress": False}
    with pytest.raises(ValueError, match="stand_in"):
        distill(packed, trained, inputs, folder=tmp_path, **options)
    before = {name: held() for name, held in weights_of(packed).items()}
    distill(packed, trained, inputs, **options)  # biases and norms alone
    assert all(torch.equal(before[name], held()) for name, held in weights_of(packed).items())


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"temperature": (0.1, 0.0)},
        {"temperature": (0.1,)},
        {"epochs": -1},
        {"lr": 1.0},
        {"precision": "fp8"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(Invalid, match=next(iter(options))):
        DKM(**options)
    with pytest.raises(Invalid, match="calibration"):
        jlcm.quantize(build(nn.Linear, in_features=2, out_features=2), "dkm")

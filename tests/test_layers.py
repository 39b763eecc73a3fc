"""Modules that decode when they run: same function, no decoded weight left behind."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from jlcm.budget import Allocation
from jlcm.config import Encoding, Init
from jlcm.encode import encode
from jlcm.layers import (
    Constant,
    HalfTensor,
    affine_of,
    is_static_norm,
    store,
    store_norm,
    stored_tensors,
    to_half,
)
from jlcm.packed import PackedWeight


def pack(weight: Tensor) -> PackedWeight:
    rows = weight.shape[0]
    plan = Allocation(
        rows=rows, columns=weight.numel() // rows, bits=3, nbytes=weight.numel() // 2 + 64
    )
    return encode(weight, plan, Encoding(), Init(method="kmeans"))


def stored_and_plain(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module with packed weights, and one of the original class holding the decoded values."""
    module = module.eval()
    plain = copy.deepcopy(module)
    stored = {
        name: pack(p) if p.dim() > 1 and min(p.shape) > 1 else HalfTensor(to_half(p, name), p.dtype)
        for name, p in module.named_parameters(recurse=False)
    }
    with torch.no_grad():
        for name, value in stored.items():
            getattr(plain, name).copy_(value())
    store(module, stored)
    return module, plain


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (rand(3, 12),)),
    "no bias": (lambda: nn.Linear(12, 7, bias=False), (rand(3, 12),)),
    "bilinear": (lambda: nn.Bilinear(4, 5, 6), (rand(3, 4), rand(3, 5))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (rand(2, 4, 9),)),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
        (rand(2, 4, 8, 8),),
    ),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, dilation=2), (rand(2, 8, 8, 8),)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (rand(2, 8, 8, 8),)),
    "pointwise": (lambda: nn.Conv2d(8, 5, 1), (rand(2, 8, 3, 3),)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (rand(1, 2, 4, 4, 4),)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (rand(2, 4, 5, 5),)),
    "embedding": (lambda: nn.Embedding(20, 6, padding_idx=0), (torch.tensor([[0, 3, 19]]),)),
    "max norm": (lambda: nn.Embedding(20, 6, max_norm=1.0), (torch.tensor([[0, 3, 19]]),)),
    "layer norm": (lambda: nn.LayerNorm(6), (rand(3, 6),)),
    "lstm": (lambda: nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True), (rand(2, 4, 6),)),
    "gru cell": (lambda: nn.GRUCell(6, 5), (rand(2, 6),)),
    "prelu": (lambda: nn.PReLU(6), (rand(2, 6),)),
}


def first(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_output_equals_the_original_class_with_decoded_weights(layer):
    make, inputs = LAYERS[layer]
    module, plain = stored_and_plain(make())
    assert isinstance(module, type(plain)) and not list(module.parameters())
    expected = first(plain(*inputs))
    assert torch.equal(first(module(*inputs)), expected)
    with torch.inference_mode():
        assert torch.equal(first(module(*inputs)), expected)
    with torch.no_grad():
        assert torch.equal(first(module(*inputs)), expected)
    assert torch.equal(first(copy.deepcopy(module)(*inputs)), expected)


@pytest.mark.parametrize("layer", [n for n in LAYERS if n not in ("embedding", "max norm")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_as_the_original_class(layer, dtype):
    make, inputs = LAYERS[layer]
    module, plain = stored_and_plain(make())
    module, plain = module.to(dtype), plain.to(dtype)
    inputs = [x.to(dtype) for x in inputs]
    output, expected = first(module(*inputs)), first(plain(*inputs))
    # Some kernels round the last bit of float64 by where in memory their inputs lie.
    torch.testing.assert_close(output, expected, rtol=4e-15, atol=4e-15)


@pytest.mark.parametrize("fast_path", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_multihead_attention(same, fast_path):
    options = {} if same else {"kdim": 10, "vdim": 6}
    module = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    module.out_proj, plain_projection = stored_and_plain(module.out_proj)
    module, plain = stored_and_plain(module)
    plain.out_proj = plain_projection
    q, k, v = rand(2, 5, 8), rand(2, 7, 8 if same else 10), rand(2, 7, 8 if same else 6)
    context = torch.inference_mode() if fast_path else torch.enable_grad()
    with context:
        output, weights = module(*((q, q, q) if same else (q, k, v)))
        expected, expected_weights = plain(*((q, q, q) if same else (q, k, v)))
    assert (output - expected).abs().max() <= 1e-6
    assert (weights - expected_weights).abs().max() <= 1e-6


class Spy(nn.Linear):
    """Remembers weakly which weight it ran with, and whether it was the same all along."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = weakref.ref(self.weight)
        self.same = self.weight is self.weight
        return nn.functional.linear(x, self.weight, self.bias)


def test_decodes_once_a_forward_and_keeps_nothing():
    module, _ = stored_and_plain(Spy(16, 16))
    alive = torch.Size((16, 16))
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            module(rand(2, 16))
        gc.collect()
        assert module.same and module.seen() is None
        left = [t for t in vars(module).values() if isinstance(t, Tensor) and t.shape == alive]
        assert not left
    assert module.weight is not module.weight


def test_nothing_is_kept_when_the_forward_fails():
    module, _ = stored_and_plain(Spy(16, 16))
    with pytest.raises(RuntimeError):
        module(rand(2, 3))
    gc.collect()
    assert module.seen() is None and module.weight is not module.weight


def test_one_layer_at_a_time():
    live: set[int] = set()
    most = []

    class Watch(PackedWeight):
        def forward(self) -> Tensor:
            weight = super().forward()
            live.add(id(self))
            weakref.finalize(weight, live.discard, id(self))
            most.append(len(live))
            return weight

    layers = [stored_and_plain(nn.Linear(16, 16))[0] for _ in range(5)]
    for layer in layers:
        layer.packed["weight"].__class__ = Watch
    with torch.inference_mode():
        nn.Sequential(*layers)(rand(2, 16))
    assert len(most) == 5 and max(most) == 1


def test_gradients_reach_the_inputs():
    module, plain = stored_and_plain(nn.Linear(6, 4))
    x, y = (rand(2, 6).requires_grad_() for _ in range(2))
    module(x).sum().backward()
    plain(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_state_dict_holds_stored_parts_only():
    module, _ = stored_and_plain(nn.Conv2d(4, 6, 3))
    assert set(module.state_dict()) == {
        "packed.weight.codes",
        "packed.weight.codebooks",
        "packed.weight.scales",
        "packed.bias.values",
    }


def test_shared_tensors_are_listed_for_each_module_and_shared_modules_once():
    weight = pack(rand(8, 8))
    one, two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    store(one, {"weight": weight})
    store(two, {"weight": weight})
    model = nn.ModuleDict({"a": one, "b": two, "c": one})
    assert dict(stored_tensors(model)) == {"a.weight": weight, "b.weight": weight}


class Scaled(nn.Sequential):
    """A container with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.ReLU())
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Listed(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return self[-1](x) * self.gain * len(self)


@pytest.mark.parametrize("container", [Scaled, Listed])
def test_containers_keep_their_items(container):
    module = container()
    length, items = len(module), list(module)
    expected = module(rand(2, 6))
    store(module, {"gain": HalfTensor(module.gain.detach().half())})
    assert torch.equal(module(rand(2, 6)), expected)
    assert len(module) == length and list(module) == items
    assert module[-1] is items[-1]


def test_scalars_survive_moves_and_casts():
    half = HalfTensor(torch.tensor(2.5).half())
    module = nn.Sequential(half).to("cpu").double()
    assert module[0]().dtype == torch.float64 and module[0]().shape == () and module[0]() == 2.5
    assert half.values.dtype == torch.float16


def test_16_bit_and_integer_tensors_are_kept():
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.complex64):
        values = torch.tensor([1, 2, 100]).to(dtype)
        half = to_half(values, "t")
        assert half.dtype == dtype and half.data_ptr() != values.data_ptr()
        assert torch.equal(
            HalfTensor(half, dtype).half()(), values.to(HalfTensor(half, dtype).half().dtype)
        )


def test_values_beyond_float16_are_refused_by_name():
    with pytest.raises(ValueError, match="'stem.bias' has values beyond 65504"):
        to_half(torch.tensor([1.0, 7e4]), "stem.bias")


@pytest.mark.parametrize("kind", ["method", "submodule", "attribute"])
def test_an_own_attribute_named_packed_is_refused(kind):
    class Method(nn.Linear):
        def packed(self) -> None:
            """Occupy the name."""

    module = Method(2, 2) if kind == "method" else nn.Linear(2, 2)
    if kind == "submodule":
        module.add_module("packed", nn.ReLU())
    elif kind == "attribute":
        module.__dict__["packed"] = 3
    with pytest.raises(ValueError, match="already has an attribute 'packed'"):
        store(module, {"bias": HalfTensor(torch.zeros(2).half())})
    assert "bias" in module._parameters


def test_constant_costs_nothing():
    constant = Constant(0.25, 5).half()
    assert constant().tolist() == [0.25] * 5 and constant().dtype == torch.float16
    assert sum(b.numel() for b in constant.buffers()) == 0


NORMS = {
    "2d": (lambda: nn.BatchNorm2d(6), (rand(4, 6, 3, 3),)),
    "1d": (lambda: nn.BatchNorm1d(6, eps=1e-3), (rand(4, 6),)),
    "without affine": (lambda: nn.BatchNorm2d(6, affine=False), (rand(4, 6, 3, 3),)),
    "synchronised": (lambda: nn.SyncBatchNorm(6), (rand(4, 6, 3, 3),)),
}


def trained(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(6, generator=generator))
        norm.running_var.copy_(torch.rand(6, generator=generator) * 3 + 0.1)
        if norm.affine:
            norm.weight.copy_(torch.randn(6, generator=generator))
            norm.bias.copy_(torch.randn(6, generator=generator))
    return norm.eval()


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_batch_norm_as_two_vectors(kind, dtype):
    make, (x,) = NORMS[kind]
    x = x.to(dtype)
    norm = trained(make()).to(dtype)
    expected = norm(x)
    scale, shift = affine_of(norm)
    assert is_static_norm(norm) and scale.dtype == shift.dtype == torch.float32
    store_norm(norm, (scale.half(), shift.half()), dtype=dtype)
    output = norm(x)
    assert output.dtype == dtype
    # Half a unit in the last place of float16 for scale and shift, and the rounding of the dtype.
    view = (1, -1) + (1,) * (x.dim() - 2)
    bound = scale.abs().view(view) * x.float().abs() + shift.abs().view(view)
    bound = bound * (2**-11 + 2 * torch.finfo(dtype).eps + 1e-6)
    assert ((output.float() - expected.float()).abs() <= bound + 1e-6).all()
    stored = sum(b.numel() * b.element_size() for b in norm.buffers())
    assert stored == 2 * 2 * 6 and norm.num_batches_tracked is None


def test_folded_batch_norm_is_the_identity():
    norm = trained(nn.BatchNorm2d(6))
    store_norm(norm, None)
    x = rand(4, 6, 3, 3)
    assert (norm(x) - x).abs().max() <= 1e-6
    assert sum(b.numel() for b in norm.buffers()) == 0


@pytest.mark.parametrize(
    "module", [nn.BatchNorm2d(3, track_running_stats=False), nn.LayerNorm(3), nn.InstanceNorm2d(3)]
)
def test_norms_of_the_batch_are_not_affine_maps(module):
    assert not is_static_norm(module)

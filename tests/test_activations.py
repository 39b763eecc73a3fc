"""Peak memory of activations: by hand on small networks, analytic against executed and measured."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import jlcm
from experiments.machine import peak_rss_bytes
from jlcm.activations import activation_footprint, measured_activation_peak
from jlcm.compress import reference_bytes

HALF, FLOAT = 2, 4  # bytes


def peaks(model, inputs, **options):
    """Values alive at the peak: each freed after its last use, and when Python frees it."""
    found = activation_footprint(model, inputs, **options)
    return found.peak_bytes / HALF, found.eager_peak_bytes / HALF


class Calls(nn.Module):
    """A network whose forward is given, with two layers of width 10."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self._forward = forward

    def forward(self, *args):
        return self._forward(self, *args)


def test_chain_needs_input_and_output_of_its_widest_layer():
    chain = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30), nn.Linear(30, 5))
    # Batch 2: 40 + 60 values around the second layer; PyTorch's caller keeps the 20 of the input.
    assert peaks(chain, torch.zeros(2, 10)) == (100, 120)
    assert peaks(chain, torch.zeros(6, 10)) == (300, 360)


def residual(self, x):
    return x + self.second(self.first(x).relu())


def test_skip_keeps_its_input_alive():
    chain = Calls(lambda self, x: self.second(self.first(x).relu()))
    # Without the skip a layer and its output, with it the input as well.
    assert peaks(chain, torch.zeros(1, 10))[0] == 20
    found = activation_footprint(Calls(residual), torch.zeros(1, 10))
    assert (found.peak_bytes, found.eager_peak_bytes) == (30 * HALF, 30 * HALF)
    assert found.operation == "aten.relu"
    assert [t.operation for t in found.alive] == ["input", "aten.linear", "aten.relu"]
    assert [t.module for t in found.alive] == ["", "first", ""]
    assert sum(t.nbytes for t in found.alive) == found.peak_bytes


def test_operation_in_place_makes_nothing():
    def forward(self, x):
        return x + self.second(functional.relu_(self.first(x)))

    # Now the peak is at the second layer: input, its input and its output.
    found = activation_footprint(Calls(forward), torch.zeros(1, 10))
    assert (found.peak_bytes, found.operation) == (30 * HALF, "second aten.linear")
    in_place, apart = (
        nn.Sequential(nn.Linear(10, 30), nn.ReLU(inplace=i), nn.Linear(30, 10))
        for i in (True, False)
    )
    assert peaks(in_place, torch.zeros(1, 10)) == (40, 50)
    assert peaks(apart, torch.zeros(1, 10)) == (60, 70)


def test_views_share_a_storage():
    def forward(self, x):
        y = self.first(x)
        parts = [y.view(2, 5), y[:, :5], y.t(), y.expand(4, 10), y.unsqueeze(0)]
        return self.second(y), len(parts)

    assert peaks(Calls(forward), torch.zeros(1, 10)) == (20, 30)
    copied = Calls(lambda self, x: self.first(x)[:, ::2].contiguous())
    # Input and output of the layer, then the output and a copy of half of it.
    assert peaks(copied, torch.zeros(1, 10)) == (20, 25)


def test_storage_lives_as_long_as_its_last_view():
    def forward(self, x):
        view = self.first(x).view(5, 2)
        y = self.second(x)
        return y.view(5, 2) + view

    # x, first and second; then first, second and the sum.
    assert peaks(Calls(forward), torch.zeros(1, 10)) == (30, 40)


def test_reused_and_unused_inputs():
    reused = Calls(lambda self, x: self.second(self.first(x)) + x)
    assert peaks(reused, torch.zeros(1, 10)) == (30, 30)
    unused = Calls(lambda self, x, other: self.first(x))
    found = activation_footprint(unused, (torch.zeros(1, 10), torch.zeros(7, 10)))
    assert (found.peak_bytes, found.eager_peak_bytes) == (20 * HALF, 90 * HALF)


def test_output_is_kept_to_the_end():
    def forward(self, x):
        y = self.first(x)
        return [y, self.second(torch.cat([y, y]))]

    # At the concatenation: y and 20 values; then y, 20 values and 20 more.
    assert peaks(Calls(forward), torch.zeros(1, 10))[0] == 50


def test_what_the_network_keeps_stays_alive():
    def forward(self, x):
        self.cache = self.first(x)  # for instance keys and values
        return self.second(x)

    assert peaks(Calls(forward), torch.zeros(1, 10))[0] == 30


def test_keyword_arguments_integers_and_dtypes():
    embed = nn.Embedding(50, 16)
    found = activation_footprint(embed, {"input": torch.zeros(3, dtype=torch.long)})
    assert found.peak_bytes == 3 * 8 + 3 * 16 * HALF
    assert found.weight_bytes == 50 * 16 * HALF
    found = activation_footprint(embed, torch.zeros(3, dtype=torch.long), dtype=None)
    assert found.weight_bytes == 50 * 16 * FLOAT and found.alive[-1].dtype == torch.float32


def test_weights_are_counted_once_and_counters_not(cnn):
    tied = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    tied[1].weight = tied[0].weight
    assert activation_footprint(tied, torch.zeros(1, 10)).weight_bytes == 120 * HALF
    assert activation_footprint(cnn, torch.zeros(1, 3, 8, 8)).weight_bytes == reference_bytes(cnn)


def test_network_is_left_as_it_was(cnn):
    model = nn.Sequential(cnn, nn.Dropout(0.5)).train()
    cnn.eval()
    before = {n: (t.dtype, t.device) for n, t in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    activation_footprint(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="Sequential cannot run"):
        activation_footprint(model, torch.zeros(1, 5, 8, 8))
    assert {n: (t.dtype, t.device) for n, t in model.state_dict().items()} == before
    assert (model.training, cnn.training, model[1].training) == (True, False, True)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_resnet18_by_hand():
    from torchvision.models import resnet18

    with torch.device("meta"):
        model, images = resnet18(), torch.zeros(1, 3, 224, 224)
    found = activation_footprint(model, images)
    # The first convolution and its norm: 64 maps of 112 x 112 each, ReLU is in place. A block of
    # layer1 has four maps of 64 x 56 x 56 at most, a quarter of one of these.
    maps = 64 * 112 * 112 * HALF
    assert found.peak_bytes == 2 * maps
    assert found.eager_peak_bytes == 2 * maps + images.numel() * HALF
    assert found.operation == "bn1 aten.batch_norm"
    assert [(t.module, t.shape) for t in found.alive] == [
        ("conv1", (1, 64, 112, 112)),
        ("bn1", (1, 64, 112, 112)),
    ]
    assert found.weight_bytes == (11_689_512 + 2 * 4_800) * HALF  # running statistics


@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
def test_meta_and_cpu_agree_at_any_batch_size(name, networks):
    model, inputs = networks[name]
    found = activation_footprint(model, inputs, dtype=None)
    assert found == activation_footprint(model, inputs, dtype=None, device="cpu")
    assert found == activation_footprint(model.to("meta"), inputs.to("meta"), dtype=None)
    doubled = activation_footprint(model, torch.cat([inputs, inputs]), dtype=None)
    assert doubled.weight_bytes == found.weight_bytes
    growth = doubled.peak_bytes / found.peak_bytes
    assert growth == pytest.approx(2, rel=0.02)  # what does not depend on the batch is tiny


def test_measured_peak_is_the_eager_peak_where_operations_need_no_workspace(networks):
    model, inputs = networks["mlp"]
    expected = activation_footprint(model, inputs, dtype=None).eager_peak_bytes
    assert measured_activation_peak(model, inputs) == expected
    model = Calls(residual)
    # Storages of a size that PyTorch's allocator does not round.
    expected = activation_footprint(model, torch.zeros(16, 10), dtype=None).eager_peak_bytes
    assert measured_activation_peak(model, torch.zeros(16, 10)) == expected == 3 * 160 * FLOAT


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_measured_peak_is_not_below_the_eager_peak(name, networks):
    model, inputs = networks[name]
    inputs = torch.cat([inputs] * 8)
    expected = activation_footprint(model, inputs, dtype=None).eager_peak_bytes
    assert expected <= measured_activation_peak(model, inputs) < 3 * expected


@pytest.mark.gpu
def test_measured_peak_on_a_gpu(networks):
    model, inputs = networks["cnn"]
    model, inputs = model.cuda(), torch.cat([inputs] * 64).cuda()
    expected = activation_footprint(model, inputs, dtype=None).eager_peak_bytes
    assert measured_activation_peak(model, inputs) >= expected


class LooksAtValues(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_network_that_looks_at_values_needs_them():
    with pytest.raises(ValueError, match='LooksAtValues cannot run without.*device="cpu"'):
        activation_footprint(LooksAtValues(), torch.ones(4))
    found = activation_footprint(LooksAtValues(), torch.ones(4), dtype=None, device="cpu")
    assert found.peak_bytes == 8 * FLOAT


def test_packed_network_counts_the_weights_that_it_decodes(packed):
    inputs = torch.zeros(1, 12)
    found = activation_footprint(packed, inputs, dtype=None, device="cpu")
    assert found.weight_bytes == jlcm.footprint(packed).payload
    assert found.peak_bytes >= 12 * 16 * FLOAT  # the first layer, decoded


class Block(nn.Module):
    """Llama's block without rotations and attention, which do not matter for the peak."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 32, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def test_network_of_the_size_of_llama_7b_needs_no_memory():
    width, hidden, tokens, words = 4096, 11008, 128, 32_000
    before = peak_rss_bytes()
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Embedding(words, width),
            *(Block(width, hidden) for _ in range(32)),
            nn.RMSNorm(width),
            nn.Linear(width, words, bias=False),
        )
        text = torch.zeros(1, tokens, dtype=torch.long)
    found = activation_footprint(model, text)
    assert found.weight_bytes == HALF * 6_738_415_616  # Llama 7B's parameters
    # The gated product, its two factors, and the stream that skips them.
    assert found.peak_bytes == HALF * tokens * (3 * hidden + width)
    assert peak_rss_bytes() - before < 5e8


def test_llama_7b_itself():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    with torch.device("meta"):
        config = transformers.LlamaConfig(**sizes, num_attention_heads=32, vocab_size=32_000)
        model = transformers.LlamaForCausalLM(config)
        text = torch.zeros(1, 1, dtype=torch.long)
    found = activation_footprint(model, {"input_ids": text})
    frequencies = 2 * 64  # of the rotary embedding, buffers
    assert found.weight_bytes - HALF * 6_738_415_616 in (0, frequencies, 2 * frequencies)
    cache = 32 * 2 * 4096 * HALF  # keys and values of one token are an output
    assert cache < found.peak_bytes < 2 * cache

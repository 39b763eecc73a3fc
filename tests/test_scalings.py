"""Where factors of channels can go: what is found, and that the function stays."""

import copy

import pytest
import torch
from conftest import build
from torch import Tensor, nn

from jlcm.fold import fold_batch_norms
from jlcm.methods.observe import observe, stages
from jlcm.methods.scalings import Scaling, find_scalings, fold


def llama(heads: int = 4, kind: str = "Llama", **changes) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=heads, head_dim=8, max_position_embeddings=64,
        **changes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases as training leaves them
                    parameter.copy_(torch.randn(parameter.shape).exp())
    return model.requires_grad_(False)


def tokens(count: int = 8, length: int = 16) -> Tensor:
    return torch.randint(64, (count, length), generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """Layer norms before layers, one that a skip connection reads too, and pairs of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.value, self.up = (nn.Linear(16, 16) for _ in range(3))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.third, self.down, self.other = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.relu, self.gelu = nn.ReLU(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.query(y).sigmoid() * self.value(y)
        y = self.second(x)
        x = y + self.down(self.relu(self.up(y)))
        y = self.third(x)
        x = x + self.attention(y, y, y)[0]
        return self.other(self.gelu(self.down(x)))


class Plain(nn.Module):
    """Pairs of convolutions, with and without something between them that allows no factors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3)
        self.deep, self.c = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 16, 1)
        self.d, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(self.a(x)).relu()).relu()
        x = self.c(self.deep(x).relu()).sigmoid()
        return self.head(self.pool(self.d(x).relu()).flatten(1))


def of_layer(prefix: str, *, values: bool) -> list[Scaling]:
    inner, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    weights = tuple(f"{inner}.{part}_proj.weight" for part in "qkv")
    feed = f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"
    found = [Scaling(f"{prefix}.input_layernorm", weights, inner)]
    found += [Scaling(f"{inner}.v_proj", (f"{inner}.o_proj.weight",))] if values else []
    return [
        *found,
        Scaling(f"{prefix}.post_attention_layernorm", feed, mlp),
        Scaling(f"{mlp}.up_proj", (f"{mlp}.down_proj.weight",)),
    ]


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
def test_decoder_layers_are_known_by_their_names(kind, heads):
    found = find_scalings(llama(heads, kind), {}, tokens())
    layers = [of_layer(f"model.layers.{i}", values=heads == 4) for i in range(2)]
    assert found == layers[0] + layers[1]


def test_a_norm_that_adds_one_to_its_weight_takes_no_factors():
    found = find_scalings(llama(kind="Gemma"), {}, tokens())
    assert {s.producer.rpartition(".")[2] for s in found} == {"v_proj", "up_proj"}


def test_norms_behind_the_attention_do_not_feed_the_mlp():
    found = find_scalings(llama(kind="Olmo2"), {}, tokens())
    assert found and not any("norm" in scaling.producer for scaling in found)


def test_what_else_reads_a_channel_forbids_factors():
    model, x = build(Normed), torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    found = find_scalings(model, {}, x)
    assert found == [
        Scaling("first", ("query.weight", "value.weight")),
        Scaling("third", ("attention.in_proj_weight",)),
    ]


def test_convolutions_are_found_behind_what_treats_channels_alike():
    model, x = build(Plain), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fold_batch_norms(model)
    norms = {"a": (torch.zeros(8), torch.ones(8))}
    found = find_scalings(model, norms, x)
    assert found == [
        Scaling("a", ("b.weight",)),
        Scaling("deep", ("c.weight",)),
        Scaling("d", ("head.weight",)),
    ]


def test_tensors_that_others_share_take_no_factors():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    found = find_scalings(model, {}, tokens())
    assert not any("mlp" in name for s in found for name in (s.producer, *s.consumers))


@pytest.mark.parametrize("name", ["llama", "biased", "normed", "plain"])
def test_folding_leaves_the_function_as_it_is(name):
    generator = torch.Generator().manual_seed(0)
    if name in ("llama", "biased"):
        model, x = llama(attention_bias=name == "biased", mlp_bias=name == "biased"), tokens()
    elif name == "normed":
        model, x = build(Normed), torch.randn(4, 6, 16, generator=generator)
    else:
        model, x = build(Plain), torch.randn(4, 3, 8, 8, generator=generator)
        fold_batch_norms(model)
    changed = copy.deepcopy(model)
    scalings = find_scalings(model, {"a": (torch.zeros(8), torch.ones(8))}, x)
    assert scalings
    for scaling in scalings:
        channels = changed.get_parameter(scaling.consumers[0]).shape[1]
        fold(changed, scaling, torch.randn(channels, generator=generator).exp())
        for weight in scaling.consumers:
            assert not torch.allclose(changed.get_parameter(weight), model.get_parameter(weight))
    with torch.no_grad():
        before, after = (getattr(m(x), "logits", m(x)) for m in (model, changed))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("shape", [(6, 16), (7, 16)])
def test_walking_layer_by_layer_sees_what_the_whole_network_sees(shape):
    model, x = llama(2), tokens(*shape)
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    expected: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
            lambda _, args, name=name: expected[name].append(args[0].flatten(0, 1))
        )
    with torch.no_grad():
        model(x)
    inputs = {name: torch.cat(parts) for name, parts in expected.items()}
    batches, seen = list(x.split(4)), {}
    options = {"grams": set(names[:3]), "positions": 16, "kept": 20}
    for stage in stages(model, [[name] for name in names], batches, 4):
        blocks = {"model.layers.1.mlp"} & {
            n.rpartition(".")[0].rpartition(".")[0] for n in stage.names
        }
        found = observe(model, stage, batches, blocks=blocks, **options)
        seen |= found.inputs
        assert [len(calls) for calls in found.calls.values()] == [2] * len(blocks)
    assert seen.keys() == set(names)
    for name, held in seen.items():
        assert held.count == len(inputs[name]) == x.numel()
        torch.testing.assert_close(held.size[0], inputs[name].abs().mean(0))
        assert held.kept.shape == (1, inputs[name].shape[1], 20)
        assert (held.gram is not None) == (name in names[:3])
        if held.gram is not None:
            torch.testing.assert_close(held.gram[0], inputs[name].T @ inputs[name] / x.numel())

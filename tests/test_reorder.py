"""Permuting every group leaves the function unchanged, and the groups are the expected ones."""

import jlcm  # noqa: F401  (first: makes torchvision importable next to a CPU-only torch)

# isort: split
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn

from jlcm.reorder import Member, PermutationGroup, ReorderError, permutation_groups, permute


def randomised(model, seed=0):
    """Float64, evaluation mode, no zero scales or trivial statistics that could hide an error."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            if tensor.ndim > 1:
                std = (1.5 / tensor[0].numel()) ** 0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
            elif name.endswith(("bias", "running_mean")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.4)
    return model


def run(model, inputs):
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return getattr(output, "logits", output)


def relative_change(before, after):
    return ((after - before).norm() / before.norm()).item()


def check(model, inputs):
    """Permute every group at random and return the groups."""
    model = randomised(model)
    groups = permutation_groups(model, inputs)
    before = run(model, inputs)
    state = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    for group in groups:
        order = torch.randperm(group.size, generator=generator)
        permute(model, group, order)
        rows = state[group.producer].narrow(0, group.start, group.size)
        moved = model.state_dict()[group.producer].narrow(0, group.start, group.size)
        # As sets of values: a producer's columns may follow an earlier group.
        torch.testing.assert_close(
            moved.flatten(1).sort(1).values, rows[order].flatten(1).sort(1).values, rtol=0, atol=0
        )
    assert relative_change(before, run(model, inputs)) <= 1e-8
    return groups


def image(size=64):
    return torch.randn(
        1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


def producers(groups):
    return {group.producer for group in groups}


def names_of(groups, producer):
    (group,) = [group for group in groups if group.producer == producer]
    return {(m.name, m.dim, m.start, m.span) for m in group.members}


def test_resnet18_groups_are_the_first_convolutions_of_the_blocks():
    groups = check(tv.resnet18(), image())
    expected = {f"layer{i}.{j}.conv1.weight" for i in range(1, 5) for j in range(2)}
    assert producers(groups) == expected
    assert names_of(groups, "layer2.0.conv1.weight") == {
        ("layer2.0.conv1.weight", 0, 0, 1),
        ("layer2.0.bn1.weight", 0, 0, 1),
        ("layer2.0.bn1.bias", 0, 0, 1),
        ("layer2.0.bn1.running_mean", 0, 0, 1),
        ("layer2.0.bn1.running_var", 0, 0, 1),
        ("layer2.0.conv2.weight", 1, 0, 1),
    }


def test_resnet50_groups():
    groups = check(tv.resnet50(), image())
    inner = {n for n in producers(groups) if n.endswith(("conv1.weight", "conv2.weight"))}
    assert len(inner) == 2 * 16 + 1  # and the stem, which feeds no identity skip connection
    assert producers(groups) == inner
    assert "fc.weight" not in producers(groups)


def test_mobilenet_v2_expansions_pass_through_depthwise():
    groups = check(tv.mobilenet_v2(), image())
    for i in range(2, 18):
        assert f"features.{i}.conv.0.0.weight" in producers(groups)
    members = names_of(groups, "features.5.conv.0.0.weight")
    assert ("features.5.conv.1.0.weight", 0, 0, 1) in members  # depthwise
    assert ("features.5.conv.2.weight", 1, 0, 1) in members  # projection
    # Projections that end in a sum keep their place.
    assert "features.5.conv.2.weight" not in producers(groups)


def test_efficientnet_squeeze_excitation_is_part_of_the_group():
    model = tv.efficientnet_b0()
    groups = check(model, image())
    block = "features.4.1.block"
    (group,) = [g for g in groups if any(m.name == f"{block}.0.0.weight" for m in g.members)]
    members = {(m.name, m.dim) for m in group.members}
    assert (f"{block}.2.fc1.weight", 1) in members  # reads the channels
    assert (f"{block}.2.fc2.weight", 0) in members and (f"{block}.2.fc2.bias", 0) in members
    assert (f"{block}.3.0.weight", 1) in members
    state = model.state_dict()
    rows = [m.name for m in group.members if m.dim == 0 and state[m.name].ndim > 1]
    assert state[group.producer].numel() == max(state[name].numel() for name in rows)
    assert f"{block}.2.fc1.weight" in producers(groups)  # hidden units of the squeeze


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
def test_timm_convolutional_networks(name):
    groups = check(timm.create_model(name), image())
    assert len(groups) >= 12
    assert not {n for n in producers(groups) if "classifier" in n or "head.fc" in n}


@pytest.mark.parametrize("build", [tv.regnet_x_400mf, tv.regnet_y_400mf])
def test_grouped_convolutions_are_permuted_within_their_groups(build):
    model = build()
    groups = check(model, image())
    name = "trunk_output.block1.block1-0.f.b.0.weight"
    conv = model.get_submodule(name.removesuffix(".weight"))
    part = conv.out_channels // conv.groups
    found = [(group.start, group.size) for group in groups if group.producer == name]
    assert found == [(i * part, part) for i in range(conv.groups)]
    # Its input channels are shared out to groups of two-dimensional blocks: left alone.
    assert name.replace(".b.0.", ".a.0.") not in producers(groups)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tv.densenet121, tv.resnext50_32x4d, tv.convnext_tiny])
def test_larger_networks(build):
    assert check(build(), image())


def test_concatenation_shifts_the_consumers_columns():
    model = tv.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8, num_classes=5)
    groups = check(model, image(32))
    assert len(groups) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    members = names_of(groups, "features.denseblock1.denselayer1.conv2.weight")
    assert ("features.denseblock1.denselayer2.conv1.weight", 1, 8, 1) in members
    assert ("features.transition1.norm.running_var", 0, 8, 1) in members


def test_flatten_moves_whole_blocks_of_columns():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(6 * 49, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )
    groups = check(model, image(32))
    assert producers(groups) == {"0.weight", "2.weight", "8.weight"}
    assert ("8.weight", 1, 0, 49) in names_of(groups, "2.weight")


def test_torchvision_vision_transformer():
    model = tv.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=64,
        num_classes=7,
    )
    groups = check(model, image(32))
    assert len(groups) == 2 * (1 + 4)
    block = "encoder.layers.encoder_layer_1"
    heads = [g for g in groups if g.producer == f"{block}.self_attention.in_proj_weight"]
    assert [(g.start, g.size) for g in heads] == [(96 + 12 * i, 12) for i in range(4)]
    assert set(heads[2].members) == {
        Member(name=f"{block}.self_attention.in_proj_weight", dim=0, start=120),
        Member(name=f"{block}.self_attention.in_proj_bias", dim=0, start=120),
        Member(name=f"{block}.self_attention.out_proj.weight", dim=1, start=24),
    }
    assert f"{block}.mlp.0.weight" in producers(groups)


def test_timm_vision_transformer():
    groups = check(timm.create_model("deit_tiny_patch16_224", depth=2, img_size=64), image())
    assert len(groups) == 2 * (1 + 3)
    assert {g.start for g in groups if g.producer == "blocks.0.attn.qkv.weight"} == {384, 448, 512}


class GroupedQueryAttention(nn.Module):
    def __init__(self, width, heads, kv_heads):
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class GatedMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Decoder(nn.Module):
    def __init__(self, width=32, heads=8, kv_heads=2, layers=2):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.attention = nn.ModuleList(
            GroupedQueryAttention(width, heads, kv_heads) for _ in range(layers)
        )
        self.mlp = nn.ModuleList(GatedMLP(width, 48) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers))
        self.head = nn.Linear(width, 50, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x)


def test_decoder_with_gated_mlp_and_grouped_queries():
    groups = check(Decoder(), torch.arange(9)[None])
    assert len(groups) == 2 * (1 + 2)
    assert names_of(groups, "mlp.1.gate_proj.weight") == {
        ("mlp.1.gate_proj.weight", 0, 0, 1),
        ("mlp.1.up_proj.weight", 0, 0, 1),
        ("mlp.1.down_proj.weight", 1, 0, 1),
    }
    heads = [g for g in groups if g.producer == "attention.0.v_proj.weight"]
    assert [(g.start, g.size) for g in heads] == [(0, 4), (4, 4)]
    columns = [m.start for m in heads[1].members if m.name == "attention.0.o_proj.weight"]
    assert columns == [16, 20, 24, 28]


def test_tied_embedding_keeps_its_place():
    model = Decoder()
    model.head.weight = model.embed.weight
    assert len(check(model, torch.arange(9)[None])) == 6


def test_transformers_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=100,
    )
    groups = check(transformers.LlamaForCausalLM(config), {"input_ids": torch.arange(9)[None]})
    assert len(groups) == 2 * (1 + 2)


def test_multihead_attention_with_separate_projections_and_value_bias():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(
                24, 3, kdim=10, vdim=12, add_bias_kv=True, batch_first=True
            )

        def forward(self, q, k, v):
            return self.attn(q, k, v)[0]

    model = randomised(Cross())
    generator = torch.Generator().manual_seed(4)
    inputs = {
        key: torch.randn(1, 5, width, generator=generator, dtype=torch.float64)
        for key, width in {"q": 24, "k": 10, "v": 12}.items()
    }
    groups = check(model, inputs)
    assert [(g.producer, g.start, g.size) for g in groups] == [
        ("attn.v_proj_weight", start, 8) for start in (0, 8, 16)
    ]


class FusedGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.proj = nn.Linear(8, 24)
        self.out = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x.flatten(2).transpose(1, 2))
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return self.head(x + self.out(hidden * F.gelu(gate)))


def test_fused_gated_projection_moves_both_halves():
    groups = check(FusedGate(), image(8))
    assert producers(groups) == {"proj.weight"}
    (group,) = groups
    assert group.size == 12
    starts = sorted(m.start for m in group.members if m.name == "proj.weight")
    assert starts == [0, 12]


class Functional(nn.Module):
    """Each forward function treats the channels of `first` unequally in a way only it knows."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.third(self.second(self.function(self.first(x), x)).relu())


@pytest.mark.parametrize(
    "function",
    [
        lambda y, x: y.cumsum(1),
        lambda y, x: y + x.repeat(1, 4, 1, 1),
        lambda y, x: y * torch.arange(12.0)[:, None, None],
        lambda y, x: y.flip(1),
        lambda y, x: F.group_norm(y, 3),
        lambda y, x: y.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2),
    ],
    ids=["cumsum", "input", "constant", "flip", "group_norm", "shuffle"],
)
def test_position_dependent_operations_are_never_permuted(function):
    groups = check(Functional(function), image(8))
    assert "first.weight" not in producers(groups)


def test_permuting_only_the_producer_changes_the_output():
    model, x = randomised(tv.mobilenet_v2()), image()
    before = run(model, x)
    for group in permutation_groups(model, x)[::5]:
        broken = copy.deepcopy(model)
        own = tuple(m for m in group.members if m.name == group.producer)
        partial = PermutationGroup(
            producer=group.producer, start=group.start, size=group.size, members=own
        )
        permute(broken, partial, torch.arange(group.size).flip(0))
        assert relative_change(before, run(broken, x)) > 1e-3


@pytest.mark.parametrize("build", [tv.mobilenet_v2, Decoder])
def test_the_model_is_not_modified(build):
    model = build().train()
    frozen = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(model.parameters())]
    next(model.children()).eval()
    training = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    calls = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    state = copy.deepcopy(model.state_dict())
    inputs = torch.arange(5)[None] if build is Decoder else image(32).float()
    with torch.no_grad():
        assert permutation_groups(model, inputs)
    handle.remove()
    assert not calls
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == training
    assert [type(module) for module in model.modules()] == classes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_groups_do_not_depend_on_the_global_random_state_nor_change_it():
    model, x = tv.mobilenet_v2(), image(32).float()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = permutation_groups(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert permutation_groups(model, x) == first


def test_half_precision_model_is_analysed():
    assert len(permutation_groups(tv.resnet18().bfloat16(), image(32).bfloat16())) == 8


def test_models_that_cannot_be_analysed_raise():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            raise IndexError("no such token")

    with pytest.raises(ReorderError, match="Broken.*no such token"):
        permutation_groups(Broken(), torch.zeros(1, 4))
    with pytest.raises(ReorderError, match="no tensor that depends on its weights"):
        permutation_groups(nn.Identity(), torch.zeros(1, 4))


def test_permute_moves_old_channel_order_i_to_i():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(12, 2))
    group = PermutationGroup(
        producer="0.weight",
        start=1,
        size=3,
        members=(
            Member(name="0.weight", dim=0, start=1),
            Member(name="1.weight", dim=1, start=2, span=3),
        ),
    )
    rows, columns = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    permute(model, group, torch.tensor([2, 0, 1]))
    assert torch.equal(model[0].weight, rows[[0, 3, 1, 2]])
    assert torch.equal(model[1].weight, columns[:, [0, 1, 8, 9, 10, 2, 3, 4, 5, 6, 7, 11]])


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.tensor([0, 1]), "shape"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), "int64"),
        (torch.tensor([0, 1, 1]), "not a permutation"),
    ],
)
def test_permute_rejects_wrong_orders(order, message):
    model = nn.Sequential(nn.Linear(2, 3))
    group = PermutationGroup(
        producer="0.weight", start=0, size=3, members=(Member(name="0.weight", dim=0),)
    )
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        permute(model, group, order)
    assert torch.equal(model[0].weight, before)


def test_permute_rejects_members_that_do_not_fit_before_moving_any():
    model = nn.Sequential(nn.Linear(2, 3))
    members = (Member(name="0.weight", dim=0), Member(name="0.bias", dim=0, start=1))
    group = PermutationGroup(producer="0.weight", start=0, size=3, members=members)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"0.bias of shape \(3,\) has no entries 1..4"):
        permute(model, group, torch.tensor([2, 1, 0]))
    assert torch.equal(model[0].weight, before)

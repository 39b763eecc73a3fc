import copy
import gc
import weakref

import pytest
import torch

import jlcm
from jlcm.decoder import decoder_groups, decoder_layers, recorded_layers, skipped_layers
from jlcm.learning.calibration import Calibration
from jlcm.learning.decoder import DecoderCalibration
from jlcm.learning.forward import precision
from jlcm.learning.objective import Moments, quadratic
from jlcm.learning.options import Learn
from jlcm.learning.sequential import learn_layers
from jlcm.reorder import permute
from jlcm.select import select
from jlcm.sensitivity import (
    _clustered,
    estimate_distortions,
    fisher_information,
    position_weights,
)

transformers = pytest.importorskip("transformers")

OPTIONS = {
    "forward_batch": 4,
    "memory": 2**30,
    "positions": 8,
    "held_out": 0.25,
    "seed": 0,
    "device": torch.device("cpu"),
}


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    config = transformers.LlamaConfig(**sizes | changes)
    return transformers.LlamaForCausalLM(config).eval()


def without_head(module, name):
    return name != "lm_head" and jlcm.linear_and_convolution(module, name)


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (10, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def networks():
    reference = tiny_llama()
    return jlcm.compress(reference, alpha=5, filter_fn=without_head, progress=False), reference


def test_finds_the_decoder_layers_of_several_architectures():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    assert decoder_layers(tiny_llama()) == "model.layers"
    assert decoder_layers(transformers.GPT2LMHeadModel(config)) == "transformer.h"
    assert decoder_layers(torch.nn.Sequential(torch.nn.Linear(2, 2))) is None


def every_pair(calibration):
    return {
        layer.name: [tuple(map(torch.clone, pair)) for *pair, _ in calibration.pairs(index)]
        for index, layer in enumerate(calibration.layers)
    }


@pytest.mark.parametrize("memory", [2**30, 0])
@pytest.mark.parametrize("head", [False, True])
def test_sees_what_whole_forwards_see(tokens, memory, head):
    """The same inputs and outputs as two whole networks that are stopped at each layer."""
    reference = tiny_llama()
    chosen = jlcm.linear_and_convolution if head else without_head
    packed = jlcm.compress(reference, alpha=5, filter_fn=chosen, progress=False)
    whole = every_pair(Calibration(packed, reference, tokens, **OPTIONS))
    options = OPTIONS | {"memory": memory}
    calibration = DecoderCalibration(packed, reference, tokens, **options)
    found = every_pair(calibration)
    assert list(found) == list(whole) and len(found) == 3 * 7 + head
    assert not calibration.skipped
    for name, pairs in found.items():
        for ours, theirs in zip(pairs, whole[name], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_later_layers_see_what_was_learned_before(tokens, networks):
    packed, reference = networks
    calibration = DecoderCalibration(packed, reference, tokens, **OPTIONS)
    places = {layer.name: index for index, layer in enumerate(calibration.layers)}
    inputs, *_ = next(calibration.pairs(places["model.layers.0.self_attn.q_proj.weight"]))
    before, *_ = next(
        DecoderCalibration(packed, reference, tokens, **OPTIONS).pairs(
            places["model.layers.0.mlp.down_proj.weight"]
        )
    )
    packed.model.layers[0].self_attn.v_proj.packed["weight"].codebooks.mul_(2)
    after, *_ = next(calibration.pairs(places["model.layers.0.mlp.down_proj.weight"]))
    assert inputs.shape[2] == 32
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("kind", ["lnq", "proximal"])
def test_learning_lowers_the_divergence(tokens, kind):
    reference = tiny_llama()
    packed = jlcm.compress(reference, alpha=7.5, filter_fn=without_head, progress=False)
    many = torch.randint(0, 64, (256, 32), generator=torch.Generator().manual_seed(2))

    def divergence():
        target = reference(tokens).logits.log_softmax(-1)
        output = packed(tokens).logits.log_softmax(-1)
        return (target.exp() * (target - output)).sum(-1).mean().item()

    # On every processor in the same precision.
    options = jlcm.Learn(kind=kind, iterations=30, precision="fp32")
    with torch.no_grad():
        before = divergence()
        results = learn_layers(packed, reference, many, options=options, progress=False)
        after = divergence()
    assert len(results) == 21 and not any(result.note for result in results)
    assert after < 0.7 * before


def test_goes_on_after_a_stop_with_the_same_result(tokens, tmp_path, monkeypatch):
    reference = tiny_llama()
    packed = jlcm.compress(reference, alpha=5, filter_fn=without_head, progress=False)
    whole, stopped = copy.deepcopy(packed), copy.deepcopy(packed)
    learn_layers(whole, reference, tokens, progress=False)
    seen = []

    def stop(result):
        seen.append(result)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_layers(stopped, reference, tokens, progress=False, folder=tmp_path, on_result=stop)
    results = learn_layers(packed, reference, tokens, progress=False, folder=tmp_path)
    assert sum(result.restored for result in results) == 9
    for (name, ours), (_, theirs) in zip(
        packed.named_buffers(), whole.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_an_embedding_that_is_packed_is_left_as_it_was(tokens):
    reference = tiny_llama(tie_word_embeddings=True)
    packed = jlcm.compress(
        reference,
        alpha=5,
        filter_fn=jlcm.with_embeddings,
        progress=False,
        learn=jlcm.Learn(),
        calibration=tokens,
    )
    notes = {result.name: result.note for result in packed.learning if result.note}
    assert notes["model.embed_tokens.weight"] == "an embedding is no matrix product"
    assert packed.lm_head.packed["weight"] is packed.model.embed_tokens.packed["weight"]


def test_orders_move_inside_decoder_layers(tokens):
    model = tiny_llama()
    groups = decoder_groups(model, tokens[:1, :4])
    assert len(groups) == 3 * (2 + 1)  # each layer has two heads of values and one MLP
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for group in groups:
        permute(shuffled, group, torch.randperm(group.size, generator=generator))
    moved = {member.name for group in groups for member in group.members}
    with torch.no_grad():
        torch.testing.assert_close(
            shuffled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4
        )
    weights = dict(model.named_parameters())
    for name, weight in shuffled.named_parameters():
        assert torch.equal(weight, weights[name]) == (name not in moved)


def test_compression_uses_these_orders(tokens):
    model = tiny_llama()
    options = {"alpha": 5, "filter_fn": without_head, "progress": False}
    packed = jlcm.compress(model, example_inputs=tokens[:1], reorder="propagated", **options)
    plain = jlcm.compress(model, reorder="none", **options)
    assert not packed.compression.notes
    codes = "model.layers.0.mlp.up_proj.packed.weight.codes"
    assert not torch.equal(dict(packed.named_buffers())[codes], dict(plain.named_buffers())[codes])


def test_bf16_forwards_see_nearly_the_same(tokens, networks):
    packed, reference = networks
    exact, narrow = (
        every_pair(DecoderCalibration(packed, reference, tokens, precision=name, **OPTIONS))
        for name in ("fp32", "bf16")
    )
    for name, pairs in exact.items():
        for ours, theirs in zip(pairs, narrow[name], strict=True):
            for a, b in zip(ours[:2], theirs[:2], strict=True):
                assert b.dtype == a.dtype and 0 <= (a - b).norm() / a.norm() < 0.05, name


@torch.no_grad()
def test_forwards_from_a_decoder_layer_on_are_the_same(tokens):
    model = tiny_llama()
    with recorded_layers(model) as states:
        model(tokens)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        model.get_parameter(name).mul_(2)
        changed = model(tokens).logits
        with skipped_layers(model, states, name):
            assert torch.equal(model(tokens).logits, changed)
        model.get_parameter(name).div_(2)


def test_predicted_divergence_of_a_token_is_the_measured_one(tokens):
    """Where errors are small, half the Fisher information weighs them; for a token, not a text."""
    model = tiny_llama()
    many = torch.randint(0, 64, (64, 32), generator=torch.Generator().manual_seed(2))
    weights = select(model, without_head)
    fisher = fisher_information(model, weights, many, progress=False)
    harm = estimate_distortions(
        model, weights, many, fisher, most_bits=5, learned=False, progress=False
    )
    with torch.no_grad():
        target = model(many).logits.log_softmax(-1)
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"):
            coded = copy.deepcopy(model)
            weight = coded.get_parameter(name)
            weight.copy_(_clustered(weight, fisher[name], 5))
            output = coded(many).logits.log_softmax(-1)
            measured = (target.exp() * (target - output)).sum(-1).mean().item()
            assert 0.5 < harm[name][4] / measured < 2


def test_positions_count_by_the_squared_gradient_of_the_likelihood(tokens):
    model, name = tiny_llama(), "model.layers.1.mlp.down_proj"
    found = position_weights(model, [name, "model.norm"], list(tokens.split(4)), progress=False)
    assert list(found) == [name] and all(p.requires_grad for p in model.parameters())
    generator, squares = torch.Generator().manual_seed(0), []
    for x in tokens.split(1):
        kept = []
        hook = model.get_submodule(name).register_forward_hook(lambda *a, k=kept: k.append(a[2]))
        with precision("auto", torch.device("cpu")):
            logits = model(x).logits[0].float()
        hook.remove()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        (slope,) = torch.autograd.grad(logits.log_softmax(-1).gather(1, labels).sum(), kept)
        squares.append(slope[0].float().square().mean(-1))
    squares = torch.stack(squares)
    squares = squares.clamp(max=squares.flatten().sort().values[-1 - round(0.001 * 120)])
    torch.testing.assert_close(found[name], squares / squares.mean())


def test_outputs_of_watched_layers_go_at_once(tokens):
    """Memory would grow with the text if they waited for the garbage collector."""
    model, outputs = tiny_llama(), []
    mlp = model.model.layers[1].mlp
    mlp.act_fn.register_forward_pre_hook(lambda _, args: outputs.append(weakref.ref(args[0])))
    gc.disable()
    try:
        position_weights(model, ["model.layers.1.mlp.gate_proj"], [tokens], progress=False)
        assert len(outputs) == len(tokens) and not any(output() is not None for output in outputs)
    finally:
        gc.enable()


def test_what_a_position_counts_is_how_often_it_appears():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, size, 6, generator=generator) for size in (5, 3))
    counts = torch.tensor([1, 3, 0, 2, 1, 1])
    weighted, repeated = (Moments.zeros(2, 3, 5, torch.device("cpu")) for _ in range(2))
    for part in (slice(0, 4), slice(4, 6)):
        weighted.add(x[..., part], y[..., part], counts[part].float())
    repeated.add(x.repeat_interleave(counts, -1), y.repeat_interleave(counts, -1))
    ours, theirs = (quadratic(moments, centred=True) for moments in (weighted, repeated))
    for field in ("gram", "cross", "energy", "inputs", "outputs"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field))
    assert weighted.count == repeated.count == 8


def test_learning_serves_the_positions_that_count(tokens, networks, tmp_path):
    """Each layer is fitted to its weighted objective, which even weights serve less well."""
    packed, reference = networks
    many = torch.randint(0, 64, (64, 24), generator=torch.Generator().manual_seed(2))
    results = {}
    for weighting in ("fisher", "even", "auto"):
        learned = copy.deepcopy(packed)
        options = Learn(weighting=weighting, damping=(0.01,), correction=0.0)
        results[weighting] = learn_layers(
            learned, reference, many, options=options, progress=False, folder=tmp_path
        )
        stored = dict(jlcm.layers.stored_tensors(learned))
        results[weighting] = stored["model.layers.0.self_attn.q_proj.weight"]()
    assert torch.equal(results["fisher"], results["auto"])
    name = "model.layers.0.self_attn.q_proj"
    counts = position_weights(reference, [name], [many], progress=False)[name].flatten()
    with torch.no_grad():
        x = (
            reference.model.layers[0]
            .input_layernorm(reference.model.embed_tokens(many))
            .flatten(0, 1)
        )
    original = reference.get_parameter(f"{name}.weight")

    def error(weight):
        return ((x @ (weight - original).T).square().sum(-1) * counts).mean().item()

    assert error(results["fisher"]) < error(results["even"])
    with pytest.raises(ValueError, match="no mirror images"):
        Learn(weighting="fisher", flip=True)

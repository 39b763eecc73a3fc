"""Pipelines of diffusers: recorded calls, learning, packed pipelines."""

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402, I001
from tiny_diffusion import PROMPTS, pixart, stable_diffusion, stable_diffusion_xl  # noqa: E402

import jlcm  # noqa: E402  # before the others: torchvision may need its help
from jlcm.layers import stored_tensors  # noqa: E402
from jlcm.packed import StoredWeight  # noqa: E402

SIZES = {"height": 16, "width": 16, "use_resolution_binning": False, "clean_caption": False}
PIPELINES = {
    "stable_diffusion": (stable_diffusion, {}),
    "stable_diffusion_xl": (stable_diffusion_xl, {}),
    "pixart": (pixart, SIZES),
}


def record(pipeline, network, prompts=PROMPTS, **options) -> Tensor:
    given = {"steps": 4, "guidance_scale": 3.0, "batch_size": 4, "progress": False, **options}
    return jlcm.record_calls(pipeline, network, prompts, **given)


def compress(network, **options) -> nn.Module:
    given = {"alpha": 4.0, "init": "random", "filter_fn": jlcm.layers_of(), "progress": False}
    return jlcm.compress(network, **{**given, **options})


def images(pipeline, prompts=PROMPTS[:2], **options):
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": noise, **options}
    return pipeline(prompt=list(prompts), output_type="pt", **given).images


@pytest.fixture(scope="module")
def pipeline():
    return stable_diffusion()


@pytest.fixture(scope="module")
def network(pipeline):
    return jlcm.pipeline_network(pipeline)


@pytest.fixture(scope="module")
def calls(pipeline, network):
    return record(pipeline, network, PROMPTS * 8)


@pytest.fixture(scope="module")
def packed(network):
    return compress(network)


def error(one: nn.Module, other: nn.Module, calls: Tensor) -> float:
    with torch.no_grad():
        return float((one(calls) - other(calls)).square().sum(1).mean())


# Recorded calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_recorded_calls_give_what_the_pipeline_computed(name):
    make, options = PIPELINES[name]
    pipeline = make()
    network = jlcm.pipeline_network(pipeline)
    denoiser = "transformer" if name == "pixart" else "unet"
    computed: dict[str, list[Tensor]] = {denoiser: [], "decoder": []}
    hooks = [
        module.register_forward_hook(lambda _, args, output, n=n: computed[n].append(output))
        for n, module in (
            (denoiser, getattr(pipeline, denoiser)),
            ("decoder", pipeline.vae.decoder),
        )
    ]
    calls = record(pipeline, network, batch_size=len(PROMPTS), **options)
    generated = {n: list(found) for n, found in computed.items()}
    with torch.no_grad():
        outputs = dict(network.run(calls))
    for hook in hooks:
        hook.remove()
    steps = torch.stack([o[0] for o in generated[denoiser][:4]])  # (steps, 2 * prompts, ...)
    found = [  # some step computed it for this prompt, with or without the prompt
        (steps[:, [i, i + len(PROMPTS)]] - o).abs().amax((2, 3, 4)).min()
        for i, o in enumerate(outputs[denoiser][0])
    ]
    assert max(found) < 2e-5
    torch.testing.assert_close(outputs["vae"][0], generated["decoder"][0], atol=1e-5, rtol=1e-5)


def test_errors_are_relative_to_the_variance_of_the_original(network, calls):
    format_ = network.format
    with torch.no_grad():
        outputs, raw = network(calls), dict(network.run(calls))
    start = 0
    for name, call in format_.calls.items():
        part = raw[name][call.outputs[0]].flatten(1)
        mine = outputs[:, start : start + part.shape[1]]
        start += part.shape[1]
        change = 0.1 * part.std()
        expected = torch.tensor(0.01)  # (0.1 standard deviations)^2, whatever the size
        found = (change * call.scales[0]) ** 2 * part.shape[1]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        torch.testing.assert_close(mine, part * call.scales[0])
    assert start == outputs.shape[1]


def test_weights_scale_the_squared_errors(pipeline, network, packed):
    one, other = copy.copy(network), copy.copy(network)
    calls = record(pipeline, one)
    assert torch.equal(calls, record(pipeline, other, weights={"unet": 4.0, "vae": 0.0}))
    scales = {n: (c.scales, other.format.calls[n].scales) for n, c in one.format.calls.items()}
    assert scales["unet"][1][0] == pytest.approx(2 * scales["unet"][0][0])
    assert scales["vae"][1] == () and scales["text_encoder"][0] == scales["text_encoder"][1]
    assert other(calls).shape[1] == one(calls).shape[1] - 3 * 16 * 16


def test_samples_are_spread_over_timesteps_and_guidance(pipeline, network):
    own = copy.copy(network)
    calls = record(pipeline, own, PROMPTS * 4, steps=6)
    unet = own.format.calls["unet"]
    start = own.format.calls["text_encoder"].leaves[0].size + unet.leaves[0].size
    times = calls[:, start]
    tokens = calls[:, :20]
    empty = tokens[:, 1] == 53  # the end follows the start
    assert int(empty.sum()) == 12  # half of 24 without the prompt
    for without in (True, False):  # 12 samples over 6 timesteps: two of each
        counts = times[empty == without].unique(return_counts=True)[1]
        assert counts.tolist() == [2] * 6


def test_calls_do_not_depend_on_the_batch(pipeline, network):
    one, other = copy.copy(network), copy.copy(network)
    calls = [record(pipeline, n, batch_size=b) for n, b in ((one, 6), (other, 2))]
    torch.testing.assert_close(*calls, atol=1e-4, rtol=1e-4)
    assert one.format.links == other.format.links


def test_the_denoiser_gets_what_the_text_encoder_returns_now(network, calls):
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.text_encoder.get_parameter(
            "text_model.final_layer_norm.bias"
            if hasattr(changed.text_encoder, "text_model")
            else "final_layer_norm.bias"
        ).add_(0.5)
    before, after = dict(network.run(calls)), dict(changed.run(calls))
    assert not torch.equal(before["unet"][0], after["unet"][0])
    assert torch.equal(before["vae"][0], after["vae"][0])


def test_joined_states_of_two_text_encoders_are_followed():
    pipeline = stable_diffusion_xl()
    network = jlcm.pipeline_network(pipeline)
    calls = record(pipeline, network)
    joined, pooled = network.format.links
    assert [name for name, _ in joined.parts] == ["text_encoder", "text_encoder_2"]
    assert [name for name, _ in pooled.parts] == ["text_encoder_2"]
    # Without a prompt XL gives the denoiser zeros, which no encoder returned.
    assert calls[:, -2:].sum().item() == len(PROMPTS)
    assert torch.equal(calls[:, -2], calls[:, -1])


def test_without_guidance_all_calls_have_the_prompt(pipeline, network):
    own = copy.copy(network)
    calls = record(pipeline, own, guidance_scale=1.0)
    assert not (calls[:, 1] == 53).any()


def test_the_pipeline_is_as_it_was(pipeline, network):
    before = images(pipeline)
    record(pipeline, copy.copy(network))
    assert torch.equal(images(pipeline), before)
    assert "forward" not in vars(pipeline.unet) and "decode" not in vars(pipeline.vae)


def test_recording_refuses_what_it_cannot_use(pipeline, network):
    for prompts in ([], "a fox", [1]):
        with pytest.raises(ValueError, match="list of texts"):
            record(pipeline, network, prompts)
    with pytest.raises(ValueError, match="weights name clip: choose among text_encoder, unet, vae"):
        record(pipeline, network, weights={"clip": 1.0})
    with pytest.raises(ValueError, match="not all be 0"):
        record(pipeline, network, weights=dict.fromkeys(("text_encoder", "unet", "vae"), 0.0))
    with pytest.raises(ValueError, match="no component prior with weights: choose among"):
        jlcm.pipeline_network(pipeline, ["prior"])
    fresh = jlcm.pipeline_network(pipeline)
    with pytest.raises(ValueError, match="call jlcm.record_calls first"):
        fresh(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="are expected, not \\(2, 3\\)"):
        network(torch.zeros(2, 3))


# Compression -------------------------------------------------------------------------------------


def chosen(network: nn.Module, *components: str) -> set[str]:
    filter_fn = jlcm.layers_of(*components)
    return {name for name, module in network.named_modules() if filter_fn(module, name)}


def test_layers_of_components(network):
    everything = chosen(network)
    assert {name.split(".")[0] for name in everything} == {"text_encoder", "unet", "vae"}
    assert "vae.post_quant_conv" in everything and "vae.quant_conv" not in everything
    assert not any(name.startswith("vae.encoder") for name in everything)
    assert chosen(network, "text_encoder", "unet", "vae") == everything
    assert chosen(network, "unet.mid_block") < chosen(network, "unet") < everything
    assert any(name.startswith("vae.encoder.") for name in chosen(network, "vae.encoder"))
    embeddings = jlcm.layers_of("text_encoder", filter_fn=jlcm.with_embeddings)
    more = {name for name, module in network.named_modules() if embeddings(module, name)}
    assert len(more - chosen(network, "text_encoder")) == 2  # tokens and positions


@pytest.mark.parametrize("method", ["rtn", "dfq", "squant", "powerquant", "redpp"])
def test_data_free_methods(network, calls, method):
    packed = jlcm.quantize(
        network, method, bits=4, filter_fn=jlcm.layers_of("vae", "text_encoder"), progress=False
    )
    kinds = {n.split(".")[0] for n, s in stored_tensors(packed) if isinstance(s, StoredWeight)}
    assert kinds == {"text_encoder", "vae"}
    assert 0 < error(packed, network, calls) < 0.5
    notes = [note for note in packed.compression.notes if "cannot trace" in note]
    assert len(notes) == (method == "dfq")


def test_wider_codes_are_better(network, calls):
    options = {"filter_fn": jlcm.layers_of("text_encoder", "vae"), "progress": False}
    models = [jlcm.quantize(network, "rtn", bits=bits, **options) for bits in (2, 4, 8)]
    errors = [error(model, network, calls[:16]) for model in models]
    assert errors == sorted(errors, reverse=True) and errors[0] > 100 * errors[-1]


def test_learning_lowers_the_error_on_other_prompts(pipeline, network, calls):
    options = {"alpha": 6.0, "init": "kmeans", "filter_fn": jlcm.layers_of("unet.mid_block", "vae")}
    other = copy.copy(network)
    unseen = record(pipeline, other, ["a blue door", "seven birds", "rain"], seed=5)
    other.format = network.format
    plain = compress(network, **options)
    learned = compress(network, calibration=calls, learn=jlcm.Learn(kind="lnq"), **options)
    before, after = (error(model, network, unseen) for model in (plain, learned))
    assert after < 0.7 * before
    kept = {result.kept for result in learned.learning}
    assert "learned" in kept and not any(
        result.note.startswith("it ") for result in learned.learning
    )
    distilled = compress(
        network, calibration=calls, distill=jlcm.Distill(epochs=3, lr=2e-3), **options
    )
    result = distilled.learning[-1]
    assert result.final_loss < result.initial_loss
    assert jlcm.footprint(distilled).payload == jlcm.footprint(plain).payload


def test_allocation_keeps_the_bytes(network, calls):
    options = {"filter_fn": jlcm.layers_of("text_encoder", "vae"), "init": "kmeans"}
    even = compress(network, **options)
    shared = compress(network, allocation="auto", calibration=calls[:16], **options)
    assert jlcm.footprint(shared).alpha_layers >= 4
    assert error(shared, network, calls) < error(even, network, calls)


def test_repeated_forwards_run_the_changed_component_alone(network, calls):
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in (("unet", network.unet), ("text_encoder", network.text_encoder),
                             ("vae", network.vae.decoder))
    ]  # fmt: skip
    with torch.no_grad():
        with network.recorded() as states:
            expected = network(calls[:4])
        for component, runs in (("vae", ["vae"]), ("text_encoder", ["text_encoder", "unet"])):
            ran.clear()
            with network.repeating(states, component):
                assert torch.equal(network(calls[:4]), expected)
            assert ran == runs
        ran.clear()
        network(calls[:4])
    assert ran == ["text_encoder", "unet", "vae"]
    for hook in hooks:
        hook.remove()


# Packed pipelines --------------------------------------------------------------------------------


def decoded(packed: nn.Module, pipeline):
    """A copy of the pipeline whose ordinary weights are the decoded ones."""
    plain = stable_diffusion()
    with torch.no_grad():
        for name, stored in stored_tensors(packed):
            component, _, tensor = name.partition(".")
            getattr(plain, component).get_parameter(tensor).copy_(stored())
    return plain


def test_packed_pipeline_gives_the_images_of_its_weights(pipeline, packed):
    ours, plain = jlcm.packed_pipeline(packed, pipeline), decoded(packed, pipeline)
    assert not list(ours.unet.parameters())
    original = images(pipeline)
    assert torch.equal(images(ours), images(plain))
    assert not torch.equal(images(ours), original)
    assert torch.equal(images(pipeline), original)  # it keeps its own components
    options = {"negative_prompt": ["blurred"] * 2, "num_images_per_prompt": 2}
    noise = [torch.Generator().manual_seed(i) for i in range(4)]
    again = [torch.Generator().manual_seed(i) for i in range(4)]
    many = images(ours, generator=noise, **options)
    assert len(many) == 4
    assert torch.equal(many, images(plain, generator=again, **options))


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "EulerDiscreteScheduler",
                                       "DPMSolverMultistepScheduler"])  # fmt: skip
def test_other_schedulers(pipeline, packed, scheduler):
    ours, plain = jlcm.packed_pipeline(packed, pipeline), decoded(packed, pipeline)
    for each in (ours, plain):
        each.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    assert torch.equal(images(ours), images(plain))


def test_packed_components_say_what_diffusers_asks(pipeline, packed):
    ours = jlcm.packed_pipeline(packed, pipeline)
    assert ours.dtype == torch.float32 and ours.device.type == "cpu"
    assert ours.unet.config == pipeline.unet.config
    for name, component in packed.components.items():
        original = getattr(pipeline, name)
        assert isinstance(component, type(original))
        assert type(component).__name__ == type(original).__name__
        assert ours.config[name] == pipeline.config[name]
    with pytest.raises(ValueError, match="save_pipeline"):
        ours.unet.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="a part of a packed model"):
        ours.text_encoder.save_pretrained("nowhere")


def test_pipeline_computes_in_16_bits(pipeline, packed):
    ours = jlcm.packed_pipeline(copy.deepcopy(packed), pipeline)
    expected, codes = images(ours), packed.unet.conv_in.packed["weight"].codes
    ours.to(torch.bfloat16)
    assert ours.unet.dtype == ours.text_encoder.dtype == ours.vae.dtype == torch.bfloat16
    found = images(ours)
    assert found.dtype == torch.bfloat16
    assert float((found - expected).square().mean()) < 1e-3
    assert torch.equal(ours.unet.conv_in.packed["weight"].codes, codes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pipeline_on_a_gpu(pipeline, packed, dtype):
    ours = jlcm.packed_pipeline(copy.deepcopy(packed), pipeline)
    expected = images(ours)
    ours.to("cuda", dtype)
    assert ours.device.type == "cuda" and ours.dtype == dtype
    assert float((images(ours).float().cpu() - expected).square().mean()) < 1e-3

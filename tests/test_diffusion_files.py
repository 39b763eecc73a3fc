"""Packed pipelines of diffusers on disk: files, folders, and what is refused."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402, I001
import transformers  # noqa: E402
from test_diffusion import PIPELINES, compress, images, record  # noqa: E402
from tiny_diffusion import PROMPTS, stable_diffusion, stable_diffusion_xl, tokenizer  # noqa: E402

import jlcm  # noqa: E402  # before the others: torchvision may need its help
from jlcm.architecture import Architecture  # noqa: E402
from jlcm.checkpoint import CheckpointError  # noqa: E402


@pytest.fixture(scope="module")
def pipeline():
    return stable_diffusion()


@pytest.fixture(scope="module")
def packed(pipeline):
    return compress(jlcm.pipeline_network(pipeline))


@pytest.fixture(scope="module")
def folder(pipeline, packed, tmp_path_factory) -> Path:
    return jlcm.save_pipeline(packed, pipeline, tmp_path_factory.mktemp("packed"))


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = dict(one.named_buffers()), dict(other.named_buffers())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", PIPELINES)
def test_reload_is_bit_exact(name, tmp_path):
    make, options = PIPELINES[name]
    pipeline = make()
    network = jlcm.pipeline_network(pipeline)
    calls = record(pipeline, network, **options)
    packed = compress(network)
    ours = jlcm.packed_pipeline(packed, pipeline)
    expected = images(ours, **options)

    path = jlcm.save(packed, tmp_path / "packed.safetensors")
    again = jlcm.load(path)
    assert same(again, packed) and jlcm.save(again, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    again.format = packed.format
    with torch.no_grad():
        assert torch.equal(again(calls), packed(calls))

    base = make()
    assert jlcm.load(path, into=base) is base
    assert torch.equal(images(base, **options), expected)

    loaded = jlcm.load_pipeline(jlcm.save_pipeline(packed, pipeline, tmp_path / "folder"))
    assert type(loaded) is type(pipeline)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images(loaded, **options), expected)


def test_folder_has_no_other_weights(folder, packed):
    weights = [p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")]
    assert weights == ["jlcm.safetensors"] and not list(folder.rglob("*.bin"))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    size = jlcm.footprint(folder / "jlcm.safetensors")
    assert size.payload == jlcm.footprint(packed).payload
    original = sum(p.numel() for p in stable_diffusion().unet.parameters())
    assert size.reference_total > 2 * original


def test_a_loaded_pipeline_is_saved_again(folder, tmp_path):
    loaded = jlcm.load_pipeline(folder)
    network = jlcm.load(folder / "jlcm.safetensors")
    again = jlcm.save_pipeline(network, loaded, tmp_path / "again")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {p.relative_to(again).as_posix() for p in again.rglob("*") if p.is_file()}
    weights_and_models = {n for n in names if n.endswith(("/config.json", ".safetensors"))}
    for name in weights_and_models:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_components_that_the_network_lacks_are_saved_as_they_are(pipeline, tmp_path):
    packed = compress(jlcm.pipeline_network(pipeline, ["unet"]))
    folder = jlcm.save_pipeline(packed, pipeline, tmp_path)
    loaded = jlcm.load_pipeline(folder)
    loaded.set_progress_bar_config(disable=True)
    assert list(loaded.vae.parameters()) and not list(loaded.unet.parameters())
    assert torch.equal(images(loaded), images(jlcm.packed_pipeline(packed, pipeline)))


def test_safety_checker_is_stored_too(tmp_path):
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(
        text_config={**tiny, "num_attention_heads": 2, "vocab_size": 60},
        vision_config={**tiny, "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    pipeline = stable_diffusion()
    processor = transformers.CLIPImageProcessor(size=16, crop_size=16)
    checker = StableDiffusionSafetyChecker(config).eval()
    pipeline.register_modules(safety_checker=checker, feature_extractor=processor)
    packed = compress(jlcm.pipeline_network(pipeline))
    loaded = jlcm.load_pipeline(jlcm.save_pipeline(packed, pipeline, tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert not list(loaded.safety_checker.parameters())
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    result = loaded(prompt=PROMPTS[:2], num_inference_steps=2, generator=noise, output_type="pt")
    assert len(result.nsfw_content_detected) == 2


def test_dtype_of_a_loaded_pipeline(folder):
    loaded = jlcm.load_pipeline(folder, dtype=torch.bfloat16)
    assert loaded.dtype == loaded.unet.dtype == loaded.text_encoder.dtype == torch.bfloat16
    base = stable_diffusion().to(torch.bfloat16)
    jlcm.load(folder / "jlcm.safetensors", into=base, dtype=torch.bfloat16)
    assert base.unet.dtype == torch.bfloat16


@pytest.mark.parametrize("lost", ["model_index.json", "jlcm.safetensors"])
def test_incomplete_folder(copied, lost):
    (copied / lost).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {lost}"):
        jlcm.load_pipeline(copied)


def test_folder_without_a_scheduler_or_tokenizer(copied):
    shutil.rmtree(copied / "scheduler")
    with pytest.raises(CheckpointError, match="cannot make its pipeline"):
        jlcm.load_pipeline(copied)


def test_damaged_weights(copied):
    content = bytearray((copied / "jlcm.safetensors").read_bytes())
    content[-100] ^= 1
    (copied / "jlcm.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its blake2b"):
        jlcm.load_pipeline(copied)


def test_other_pipelines_are_refused_and_stay_as_they_were(packed, tmp_path):
    path = jlcm.save(packed, tmp_path / "packed.safetensors")
    other = stable_diffusion_xl()
    before = dict(other.components)
    with pytest.raises(CheckpointError, match="does not fit|has shape|no layer"):
        jlcm.load(path, into=other)
    assert all(other.components[name] is before[name] for name in before)
    wider = stable_diffusion()
    wider.register_modules(vae=diffusers.AutoencoderTiny())
    with pytest.raises(
        CheckpointError, match="its vae is a AutoencoderKL, that of .* AutoencoderTi"
    ):
        jlcm.load(path, into=wider)
    small = jlcm.compress(nn.Sequential(nn.Linear(8, 8)), alpha=4, init="random", progress=False)
    with pytest.raises(CheckpointError, match="names no components of a pipeline"):
        jlcm.load(jlcm.save(small, tmp_path / "small.safetensors"), into=other)


def test_saving_refuses_what_cannot_be_loaded(pipeline, packed, tmp_path):
    with pytest.raises(ValueError, match="that jlcm.compress returned"):
        jlcm.save_pipeline(jlcm.pipeline_network(pipeline), pipeline, tmp_path)
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        jlcm.save_pipeline(packed, pipeline, taken)
    with pytest.raises(CheckpointError, match="call jlcm.load_pipeline"):
        jlcm.load(jlcm.save_pipeline(packed, pipeline, tmp_path / "folder"))


def test_components_of_other_classes_need_the_network(tmp_path):
    class Own(diffusers.AutoencoderKL):
        pass

    pipeline = stable_diffusion()
    pipeline.vae = Own(block_out_channels=(4,), norm_num_groups=4)
    network = jlcm.pipeline_network(pipeline, ["vae"])
    packed = compress(network)
    with pytest.raises(ValueError, match="of other classes"):
        jlcm.save_pipeline(packed, pipeline, tmp_path)
    path = jlcm.save(packed, tmp_path / "vae.safetensors")
    assert same(jlcm.load(path, model=jlcm.pipeline_network(pipeline, ["vae"])), packed)


@pytest.mark.parametrize(
    ("builder", "arguments"),
    [
        ("diffusers:StableDiffusionPipeline", {"components": {"a": {"builder": "os:system"}}}),
        ("diffusers:UNet2DConditionModel", {"components": {}}),
        ("diffusers:DDIMScheduler", {"config": {}}),
        ("diffusers.utils:load_image", {"config": {}}),
        ("diffusers.pipelines.pipeline_utils:DiffusionPipeline", {"config": {}}),
    ],
)
def test_files_build_nothing_but_models_of_diffusers(builder, arguments):
    with pytest.raises(ValueError, match="is not in|is no"):
        Architecture(builder=builder, arguments=arguments).build()


@pytest.mark.gpu
def test_shapes_of_stable_diffusion_on_a_gpu(tmp_path):
    """Random weights of the true sizes: bytes, seconds, peak memory."""
    device = torch.device("cuda")
    text = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with device:
        pipeline = diffusers.StableDiffusionPipeline(
            unet=diffusers.UNet2DConditionModel(
                sample_size=64, cross_attention_dim=768, attention_head_dim=8
            ),
            vae=diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            text_encoder=transformers.CLIPTextModel(text),
            tokenizer=tokenizer(77),
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    assert parameters == 859_520_964
    began = time.perf_counter()
    packed = jlcm.quantize(
        jlcm.pipeline_network(pipeline), "rtn", alpha=4, filter_fn=jlcm.layers_of(), progress=False
    )
    print(f"rounded in {time.perf_counter() - began:.0f} s")
    ours = jlcm.packed_pipeline(packed, pipeline)
    folder = jlcm.save_pipeline(packed, ours, tmp_path)
    size = jlcm.footprint(folder / "jlcm.safetensors")
    assert size.alpha_layers > 3.9
    del pipeline, packed, ours
    torch.cuda.empty_cache()
    loaded = jlcm.load_pipeline(folder, device=device, dtype=torch.float16)
    loaded.set_progress_bar_config(disable=True)
    resident = torch.cuda.memory_allocated()
    assert resident < 1.02 * size.payload
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    image = images(loaded, PROMPTS[:1])
    torch.cuda.synchronize()
    print(
        f"{size.payload} bytes, {resident} resident, {torch.cuda.max_memory_allocated()} at the "
        f"peak, {time.perf_counter() - began:.1f} s an image"
    )
    assert image.shape == (1, 3, 512, 512) and image.isfinite().all()

"""Scores of pictures against computations by hand, with the project's small pipeline."""

import json
import math

import pytest
import torch
from PIL import Image

from experiments.config import DiffusionModelConfig
from experiments.data import coloured_digits
from experiments.models.tiny_diffusion import load_judge

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from experiments.evaluate import diffusion as evaluate  # noqa: E402
from experiments.models.diffusion import load_clip, load_pipeline  # noqa: E402

TINY = DiffusionModelConfig(source="tiny_sd", name="tiny_sd")


@pytest.fixture(scope="module")
def prompts():
    _, captions = coloured_digits.split_captions()
    return [coloured_digits.prompt(c, i) for i, c in enumerate(captions[:20])]


@pytest.fixture(scope="module")
def captions():
    return coloured_digits.split_captions()[1][:20]


@pytest.fixture(scope="module")
def drawn(captions):
    """Two drawings of each caption."""
    pixels, labels = coloured_digits.grey_digits("test")
    twice = [c for c in captions for _ in range(2)]
    found = coloured_digits.draw(twice, pixels, labels, torch.Generator().manual_seed(0))
    return (255 * found).round().to(torch.uint8)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(TINY)


@pytest.fixture(scope="module")
def clip():
    return load_clip(TINY)


def make(pipeline, prompts, **options):
    given = {"noise_seeds": 2, "batch_size": 16, "num_inference_steps": 20, "guidance_scale": 3.0}
    return evaluate.generate(pipeline, prompts, **(given | options))


def test_clip_score_is_the_cosine_per_prompt(clip, drawn, prompts):
    model, processor = clip
    found = evaluate.ClipScore(model, processor)(drawn, prompts)
    with torch.no_grad():
        pixels = (drawn.float() / 255 - 0.5) / 0.5
        images = model.get_image_features(pixel_values=pixels).pooler_output
        ids = processor.tokenizer(prompts, padding=True, return_tensors="pt")
        texts = model.get_text_features(**ids).pooler_output.repeat_interleave(2, dim=0)
    cosine = 100 * torch.nn.functional.cosine_similarity(images, texts)
    torch.testing.assert_close(found, cosine.view(20, 2).mean(1).double(), atol=1e-3, rtol=0)


def test_clip_score_of_matching_pictures_is_high_and_of_others_is_not_clamped(clip, drawn, prompts):
    score = evaluate.ClipScore(*clip)
    result = evaluate.clip_scores(score, drawn, prompts)
    assert result["clip_score"] > 70 > 30 > result["clip_score_shuffled"]
    assert 0 < result["clip_score_standard_error"] < 5
    wrong = torch.stack([score(drawn.roll(2 * k, 0), prompts) for k in range(1, 20)])
    assert wrong.min() < 0


def test_long_prompts_are_cut_for_the_clip(clip, drawn):
    score = evaluate.ClipScore(*clip)
    long = " ".join(["red"] * 100)
    assert score(drawn[:2], [long]).isfinite().all()


def test_psnr_of_a_known_error():
    original = torch.full((4, 3, 8, 8), 100, dtype=torch.uint8)
    assert evaluate.psnr(original + 5, original) == pytest.approx(20 * math.log10(255 / 5))
    one = original.clone()
    one[0] += 10  # mean squared error 25: of all pictures together
    assert evaluate.psnr(one, original) == pytest.approx(20 * math.log10(255 / 5))
    assert evaluate.psnr(original, original) == math.inf


def test_perceptual_distance_grows_with_the_error(pipeline, drawn):
    encoder = pipeline.vae.encoder
    assert evaluate.perceptual_distance(encoder, drawn, drawn) == 0
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        evaluate.perceptual_distance(
            encoder, (drawn + size * noise).clamp(0, 255).to(torch.uint8), drawn
        )
        for size in (2, 8, 32)
    ]
    assert 0 < distances[0] < distances[1] < distances[2] < 4
    assert not encoder.down_blocks[0]._forward_hooks


def test_generated_digits_are_the_right_ones(pipeline, clip, prompts, captions):
    pictures = make(pipeline, prompts)
    result = evaluate.judged(load_judge(), pictures, captions)
    assert result["digit_accuracy"] >= 95 and result["caption_accuracy"] >= 70
    result = evaluate.clip_scores(evaluate.ClipScore(*clip), pictures, prompts)
    assert result["clip_score"] > 75 > 30 > result["clip_score_shuffled"]


def test_the_judge_knows_handwriting_that_nobody_was_trained_on(drawn, captions):
    found = evaluate.judged(load_judge(), drawn, captions)
    assert found["digit_accuracy"] >= 90
    others = captions[1:] + captions[:1]  # another digit each
    assert evaluate.judged(load_judge(), drawn, others)["digit_accuracy"] <= 10


def test_noise_depends_on_prompt_and_seed_alone(pipeline, prompts):
    few = {"num_inference_steps": 4}
    pictures = make(pipeline, prompts[:3], **few)
    assert torch.equal(pictures, make(pipeline, prompts[:3], **few))
    alone = make(pipeline, prompts[:3], batch_size=1, **few)
    assert (pictures.int() - alone.int()).abs().max() <= 1
    first = make(pipeline, prompts[:3], noise_seeds=1, **few)
    assert (pictures[::2].int() - first.int()).abs().max() <= 1
    assert not torch.equal(pictures[0], pictures[1])


def test_rows_of_pictures_keep_their_prompts(tmp_path, drawn):
    evaluate.picture_rows(tmp_path / "a.png", [drawn[:3], drawn[3:6]], ["a", "b", "c"])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (96, 64) and json.loads(picture.text["prompts"]) == ["a", "b", "c"]
        assert picture.getpixel((32, 0)) == tuple(drawn[1, :, 0, 0].tolist())
    large = torch.zeros(1, 3, 256, 512, dtype=torch.uint8)
    evaluate.picture_rows(tmp_path / "b.png", [large, large], ["a"])
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size == (128, 128)

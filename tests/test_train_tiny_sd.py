"""The training of the small pipeline: resumable, seeded, and complete in diffusers' format."""

import pytest
import torch
from safetensors.torch import load_file

from experiments.config import DiffusionModelConfig
from experiments.models import tiny_diffusion
from experiments.models.tiny_diffusion import build_tokenizer, load_judge

pytest.importorskip("diffusers")

from experiments.models.diffusion import load_clip, load_pipeline  # noqa: E402
from scripts import train_tiny_sd  # noqa: E402


@pytest.fixture
def short(monkeypatch):
    """Two steps on few pictures."""
    monkeypatch.setattr(train_tiny_sd, "_PICTURES", 256)
    small = {name: (2, 8, rate) for name, (_, _, rate) in train_tiny_sd.STAGES.items()}
    monkeypatch.setattr(train_tiny_sd, "STAGES", small)


def test_stages_are_kept_and_the_result_is_a_pipeline(short, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "tiny", []
    fit = train_tiny_sd._fit_judge
    monkeypatch.setattr(train_tiny_sd, "_fit_judge", stop)
    with pytest.raises(SystemExit, match="interrupted"):
        train_tiny_sd.main([f"--out={out}"])
    assert not out.exists() and len(list((tmp_path / "tiny.stages").iterdir())) == 4
    with pytest.raises(SystemExit, match="of another training"):
        train_tiny_sd.main([f"--out={out}", "--seed=1"])
    for name in ("_fit_text", "_fit_clip", "_fit_vae", "_fit_unet"):
        monkeypatch.setattr(train_tiny_sd, name, lambda *_, **__: calls.append(1))
    monkeypatch.setattr(train_tiny_sd, "_fit_judge", fit)
    train_tiny_sd.main([f"--out={out}"])
    assert out.exists() and not calls and not (tmp_path / "tiny.stages").exists()
    model = DiffusionModelConfig(
        source="diffusers", name=str(out), clip=str(out / tiny_diffusion.CLIP)
    )
    pipeline, (clip, _) = load_pipeline(model), load_clip(model)
    (image,) = pipeline(prompt=["a red two"], num_inference_steps=2, output_type="pt").images
    assert image.shape == (3, 32, 32) and image.isfinite().all()
    own = clip.text_model.state_dict()
    for name, value in pipeline.text_encoder.state_dict().items():
        assert torch.equal(value, own[name])
    assert load_judge(out)(image[None])[0].shape == (1, 10)


def stop(*_, **__):
    raise KeyboardInterrupt


def test_equal_seeds_give_equal_weights(short, tmp_path):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_tiny_sd.main([f"--out={tmp_path / name}", f"--seed={seed}"])
        files.append(load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert not all(torch.equal(files[0][k], files[2][k]) for k in files[0])


def test_every_word_of_a_caption_is_one_token():
    from experiments.data.coloured_digits import TEMPLATES, prompt, split_captions

    tokenizer = build_tokenizer()
    train, _ = split_captions()
    for template in range(len(TEMPLATES)):
        for caption in train[:50]:
            text = prompt(caption, template)
            words = text.replace(",", " ,").split()
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == [f"{word}</w>" for word in words]
            assert len(ids) <= tiny_diffusion.LENGTH
    assert tokenizer.decode(tokenizer("Über 7 Häuser!")["input_ids"], skip_special_tokens=True)

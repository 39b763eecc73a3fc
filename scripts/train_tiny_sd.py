"""Train the small text-to-image pipeline that the default experiments on diffusion models use.

python scripts/train_tiny_sd.py --out tiny_sd

It draws scikit-learn's digits in colours, with captions, and trains in turn a text encoder, an
autoencoder, a denoiser, a CLIP and a classifier that judges pictures: about 25 minutes on one core.
After an interruption the same command goes on after the last finished stage. The result is a folder
in diffusers' format, the published one is `experiments/models/tiny_sd`.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from experiments.cache import load_state, replacing_folder, save_state
from experiments.data.coloured_digits import (
    CLASSES,
    TEMPLATES,
    Caption,
    draw,
    grey_digits,
    prompt,
    split_captions,
)
from experiments.models import tiny_diffusion
from experiments.models.digits import one_cycle
from experiments.overrides import one_line
from jlcm.learning.forward import computes_bf16

_VERSION = 1  # change it whenever the training below changes: kept stages are then refused
#: Steps, batch size and peak learning rate of each stage.
STAGES = {
    "text": (400, 64, 1e-3),
    "clip": (2400, 128, 2e-3),
    "vae": (1200, 32, 3e-3),
    "unet": (3000, 64, 2e-3),
    "judge": (1500, 64, 2e-3),
}
_UNCONDITIONAL = 0.1  # part of the captions that the denoiser sees empty
_PICTURES = 12_800  # that the denoiser learns from
_AVERAGE = 0.998  # of the denoiser's weights, exponential


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every stage that is not finished, then write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    options = parser.parse_args(arguments)
    if not options.scale > 0 or options.seed < 0:
        parser.error("--scale must be above 0 and --seed at least 0")
    if options.out.exists():
        print(f"{options.out} is finished already")
        return
    kept = options.out.with_name(f"{options.out.name}.stages")
    try:
        train(options.out, kept, seed=options.seed, scale=options.scale)
    except (ValueError, OSError) as error:
        sys.exit(one_line(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on after the last finished stage")
    shutil.rmtree(kept)


def train(out: Path, kept: Path, *, seed: int, scale: float) -> None:
    """Train the networks one after the other, and write them as a folder.

    Args:
        out: the folder.
        kept: folder of the weights of finished stages.
        seed: of everything.
        scale: of the number of steps.

    Raises:
        ValueError: the kept stages are of another training.
        OSError: a file cannot be written.
    """
    settings = {"version": str(_VERSION), "seed": str(seed), "scale": str(scale)}
    build_clip, tokenizer = tiny_diffusion.build_clip, tiny_diffusion.build_tokenizer()

    def stage(name: str, build: Callable[[], nn.Module], fit: Callable, *needed) -> nn.Module:
        """Build a network and train it, unless its weights are there."""
        path = kept / f"{name}.safetensors"
        steps, batch, rate = STAGES[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build()
            if not path.exists():
                start = time.process_time()
                steps = max(2, round(scale * steps))
                fit(module, *needed, steps=steps, batch=batch, rate=rate, seed=seed)
                state = {k: v.half() if v.is_floating_point() else v for k, v in
                         module.state_dict().items()}  # fmt: skip
                save_state(path, state, settings)
                print(f"{name}: {steps} steps, {time.process_time() - start:.0f} s", flush=True)
        state, metadata = load_state(path)
        if metadata != settings:
            raise ValueError(f"{kept} is of another training ({metadata}): delete it")
        module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in
                                state.items()})  # fmt: skip
        return module.eval().requires_grad_(False)

    text = stage("text", lambda: build_clip(tokenizer).text_model, _fit_text, tokenizer)
    vae = stage("vae", tiny_diffusion.build_vae, _fit_vae)
    _set_scaling(vae, seed)
    unet = stage("unet", tiny_diffusion.build_unet, _fit_unet, text, vae, tokenizer)
    clip = stage("clip", lambda: build_clip(tokenizer), _fit_clip, text, tokenizer)
    judge = stage("judge", tiny_diffusion.Judge, _fit_judge)
    with replacing_folder(out) as folder:
        tiny_diffusion.save(folder, clip=clip, vae=vae, unet=unet, judge=judge, tokenizer=tokenizer)


def _fit_text(text, tokenizer, **options) -> None:
    """Read captions: name digit, colour, background and stroke from the end token's state."""
    heads = nn.Linear(text.config.hidden_size, sum(CLASSES))

    def loss(captions: list[Caption], pictures: Tensor, generator: torch.Generator) -> Tensor:
        ids = _token_ids(tokenizer, _written(captions, generator))
        return _naming_loss(heads(text(ids).pooler_output), captions)

    _fit(nn.ModuleList([text, heads]), loss, "text", **options)


def _fit_clip(clip, text, tokenizer, *, steps: int, **options) -> None:
    """Contrastive learning of a picture's encoder (Radford et al., 2021) beside a finished text's.

    Digits are hard to see for a small transformer, and contrast alone takes several times as long
    to teach them. So it learns to name what the captions say, first on its own.
    """
    clip.text_model.load_state_dict(text.state_dict())
    clip.text_model.requires_grad_(False)
    heads = nn.Linear(clip.config.projection_dim, sum(CLASSES))

    def naming(captions: list[Caption], pictures: Tensor, generator: torch.Generator) -> Tensor:
        found = clip.get_image_features(pixel_values=pictures * 2 - 1).pooler_output
        return _naming_loss(heads(found), captions)

    def contrast(captions: list[Caption], pictures: Tensor, generator: torch.Generator) -> Tensor:
        images = clip.get_image_features(pixel_values=pictures * 2 - 1).pooler_output
        ids = _token_ids(tokenizer, _written(captions, generator))
        texts = clip.get_text_features(input_ids=ids).pooler_output
        images, texts = (functional.normalize(x.float(), dim=1) for x in (images, texts))
        logits = clip.logit_scale.exp() * images @ texts.T
        values = torch.tensor(captions)
        same = (values[:, None] == values).all(2).float()  # equal captions of a batch all are right
        targets = same / same.sum(1, keepdim=True)
        both = (functional.cross_entropy(x, targets) for x in (logits, logits.T))
        return sum(both) / 2 + _naming_loss(heads(clip.logit_scale.exp() * images), captions)

    both = nn.ModuleList([clip, heads])
    _fit(both, naming, "clip", steps=round(0.7 * steps), **options)
    _fit(both, contrast, "clip", alike=True, steps=max(1, round(0.3 * steps)), **options)


def _written(captions: list[Caption], generator: torch.Generator) -> list[str]:
    """Captions in words, each by a random template."""
    templates = torch.randint(len(TEMPLATES), (len(captions),), generator=generator)
    return list(map(prompt, captions, templates.tolist()))


def _naming_loss(logits: Tensor, captions: list[Caption]) -> Tensor:
    """Cross-entropy of the four properties; digits count twice, as they are the hardest."""
    parts = zip(logits.float().split(CLASSES, dim=1), torch.tensor(captions).T, strict=True)
    digit, *others = (functional.cross_entropy(*part) for part in parts)
    return 2 * digit + sum(others)


def _fit_vae(vae, **options) -> None:
    """Reconstruction with a slight pull towards normal latents (Rombach et al., 2022)."""

    def loss(captions: list[Caption], pictures: Tensor, generator: torch.Generator) -> Tensor:
        latents = vae.encode(pictures * 2 - 1).latent_dist
        found = vae.decode(latents.sample(generator)).sample.float()
        error = found - (pictures * 2 - 1)
        return error.abs().mean() + error.square().mean() + 1e-4 * latents.kl().float().mean() / 256

    _fit(vae, loss, "vae", **options)


def _set_scaling(vae, seed: int) -> None:
    """Set the factor that gives latents unit variance."""
    with torch.inference_mode():
        *_, pictures = next(_batches(256, seed))
        latents = vae.encode(pictures * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


def _fit_unet(unet, text, vae, tokenizer, *, batch: int, seed: int, **options) -> None:
    """Predict the noise of noisy latents (Ho et al., 2020), now and then without the caption."""
    scheduler = tiny_diffusion.build_scheduler()
    signal = scheduler.alphas_cumprod.sqrt().view(-1, 1, 1, 1)
    noise_part = (1 - scheduler.alphas_cumprod).sqrt().view(-1, 1, 1, 1)
    means, spreads, ids = [], [], []
    with torch.inference_mode():
        batches = _batches(256, seed + 1)
        for _ in tqdm(range(_PICTURES // 256), "latents", disable=None):
            captions, generator, pictures = next(batches)
            latents = vae.encode(pictures * 2 - 1).latent_dist
            means.append(latents.mean * vae.config.scaling_factor)
            spreads.append(latents.std * vae.config.scaling_factor)
            ids.append(_token_ids(tokenizer, _written(captions, generator)))
        means, spreads, ids = map(torch.cat, (means, spreads, ids))
        texts = torch.cat([text(x).last_hidden_state for x in ids.split(256)])
        empty = text(_token_ids(tokenizer, [""])).last_hidden_state
    means, spreads, texts, empty = (x.clone() for x in (means, spreads, texts, empty))

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(means), (batch,), generator=generator)
        noise, spread = torch.randn(2, batch, *means.shape[1:], generator=generator)
        steps = torch.randint(len(signal), (batch,), generator=generator)
        latents = means[chosen] + spreads[chosen] * spread
        noisy = signal[steps] * latents + noise_part[steps] * noise
        dropped = torch.rand(batch, 1, 1, generator=generator) < _UNCONDITIONAL
        told = torch.where(dropped, empty, texts[chosen])
        return functional.mse_loss(unet(noisy, steps, told).sample.float(), noise)

    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(_AVERAGE)
    )
    generator = torch.Generator().manual_seed(seed)
    _optimise(
        unet,
        (loss(generator) for _ in range(options["steps"])),
        "unet",
        after=lambda: average.update_parameters(unet),
        **options,
    )
    unet.load_state_dict(average.module.state_dict())


def _fit_judge(judge, **options) -> None:
    """Classification of all combinations, those held out, too."""

    def loss(captions: list[Caption], pictures: Tensor, generator: torch.Generator) -> Tensor:
        targets = torch.tensor(captions).T
        return sum(
            functional.cross_entropy(logits.float(), target)
            for logits, target in zip(judge(pictures), targets, strict=True)
        ) / len(CLASSES)

    _fit(judge, loss, "judge", **options)


def _fit(module, loss, name: str, *, batch: int, seed: int, alike: bool = False, **options) -> None:
    """Train on freshly drawn pictures, in bfloat16 where the processor computes in it."""
    kind = {"held_out": name == "judge", "alike": alike}

    def losses() -> Iterator[Tensor]:
        for captions, generator, pictures in _batches(batch, seed, **kind):
            with torch.autocast("cpu", torch.bfloat16, enabled=computes_bf16(torch.device("cpu"))):
                value = loss(captions, pictures, generator)
            yield value

    _optimise(module, losses(), name, **options)


def _optimise(
    module: nn.Module,
    losses: Iterator[Tensor],
    name: str,
    *,
    steps: int,
    rate: float,
    after: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with a warm-up and a cosine, gradients clipped.

    Raises:
        ValueError: a gradient is not finite.
    """
    module.train()
    betas = (0.9, 0.98) if name == "clip" else (0.9, 0.999)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=betas, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle(step, steps, warm_up=0.05)
    )
    recent = None
    with tqdm(total=steps, desc=name, disable=None) as bar:
        for step in range(steps):
            value = next(losses)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            if not torch.isfinite(nn.utils.clip_grad_norm_(module.parameters(), 1.0)):
                raise ValueError(f"training {name} diverged in step {step}")
            optimizer.step()
            schedule.step()
            after()
            recent = value.item() if recent is None else 0.95 * recent + 0.05 * value.item()
            bar.update()
            if (step + 1) % max(1, steps // 8) == 0:
                tqdm.write(f"{name}: step {step + 1} of {steps}, loss {recent:.4f}")


def _batches(
    size: int, seed: int, *, held_out: bool = False, alike: bool = False
) -> Iterator[tuple[list[Caption], torch.Generator, Tensor]]:
    """Random captions with a generator for more random numbers, and their pictures.

    Args:
        size: captions of a batch.
        seed: of everything random.
        held_out: draw the captions for the evaluation, too.
        alike: a batch holds all captions of a few colours and backgrounds, since otherwise these
            alone tell its pictures apart, and nobody needs to look at the digit.
    """
    generator = torch.Generator().manual_seed(seed)
    captions, others = split_captions()
    captions = captions + others if held_out else captions
    groups: dict[tuple[int, int], list[Caption]] = {}
    for caption in captions:
        groups.setdefault((caption.colour, caption.background), []).append(caption)
    pixels, labels = grey_digits("train")
    while True:
        chosen = torch.randint(len(captions), (size,), generator=generator).tolist()
        batch = [captions[i] for i in chosen]
        if alike:
            colours = dict.fromkeys((c.colour, c.background) for c in batch)
            batch = [c for pair in colours for c in groups[pair]][:size]
        yield batch, generator, draw(batch, pixels, labels, generator)


def _token_ids(tokenizer, texts: list[str]) -> Tensor:
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, **options)["input_ids"]


if __name__ == "__main__":
    main()

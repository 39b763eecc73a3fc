"""Pictures of text-to-image pipelines: made from fixed noise, scored, compared with the original's.

CLIP scores say how well pictures fit their prompts (Hessel et al., CLIPScore, 2021). PSNR and the
perceptual distance compare a picture with the one that the original pipeline makes of the same
prompt and noise; they need no CLIP and show much smaller differences.
"""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

from experiments.data.coloured_digits import Caption
from experiments.models.tiny_diffusion import Judge
from jlcm.files import replacing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import CLIPModel, CLIPProcessor

#: First seed of the noise, so that calibration sees none of it.
_FIRST_SEED = 1000
_PRIME = 1_000_003
_LARGEST = 128  # pixels of pictures that are kept to be looked at
_BATCH = 64  # pictures at a time through the networks that judge them


@torch.no_grad()
def generate(
    pipeline: "DiffusionPipeline",
    prompts: Sequence[str],
    *,
    noise_seeds: int,
    batch_size: int,
    description: str = "pictures",
    **options: Any,
) -> Tensor:
    """Make pictures. The noise depends on the prompt's position and the seed alone.

    Args:
        pipeline: on any device.
        prompts: what the pictures show.
        noise_seeds: pictures of each prompt.
        batch_size: pictures at a time.
        description: for the progress bar.
        options: of the call of the pipeline.

    Returns:
        uint8 (prompts * noise_seeds, 3, height, width) on the CPU, those of a prompt together.

    Raises:
        ValueError: pictures have pixels that are no numbers.
    """
    wanted = [(i, seed) for i in range(len(prompts)) for seed in range(noise_seeds)]
    pictures = []
    with tqdm(total=len(wanted), desc=description, unit="picture", leave=False) as bar:
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            found = pipeline(
                prompt=[prompts[i] for i, _ in batch],
                generator=[
                    torch.Generator().manual_seed((_FIRST_SEED + seed) * _PRIME + i)
                    for i, seed in batch
                ],
                output_type="pt",
                **options,
            ).images
            if not found.isfinite().all():
                raise ValueError("the pipeline's pictures contain NaN or Inf")
            pictures.append((found.float() * 255).round().to(torch.uint8).cpu())
            bar.update(len(batch))
    return torch.cat(pictures)


class ClipScore:
    """torchmetrics' CLIP score with a given CLIP, for each prompt and without its lower bound of 0.

    Attributes:
        metric: the `CLIPScore` of torchmetrics.
    """

    def __init__(self, clip: "CLIPModel", processor: "CLIPProcessor") -> None:
        """Wrap the CLIP for torchmetrics.

        Args:
            clip: in evaluation mode.
            processor: of its inputs. Prompts that are too long are cut and keep their end token.
        """
        from torchmetrics.multimodal import CLIPScore  # takes seconds to import

        longest = clip.config.text_config.max_position_embeddings

        def prepare(**inputs: Any) -> Any:
            cut = {"truncation": True, "max_length": longest} if "text" in inputs else {}
            return processor(**inputs, **cut)

        self.metric = CLIPScore(lambda: (_Features(clip), prepare))

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 times the cosine of picture and prompt, between -100 and 100.

        Args:
            pictures: uint8 (prompts * n, 3, height, width), n for each prompt.
            prompts: what they should show.

        Returns:
            Mean over the pictures of each prompt, float64 (prompts,).
        """
        scores = []
        each = len(pictures) // len(prompts)
        bar = tqdm(prompts, "CLIP", leave=False)
        for part, text in zip(pictures.split(each), bar, strict=True):
            self.metric.update(list(part), [text] * each)
            scores.append(float(self.metric.score / self.metric.n_samples))
            self.metric.reset()
        return torch.tensor(scores, dtype=torch.float64)


class _Features(nn.Module):
    """A CLIP whose feature functions return tensors, as those of transformers before 5 did."""

    def __init__(self, clip: "CLIPModel") -> None:
        super().__init__()
        self.clip, self.config = clip, clip.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return _tensor(self.clip.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _tensor(
            self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        )


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def clip_scores(score: ClipScore, pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """CLIP score of pictures with their prompts, and with those of other pictures.

    Args:
        score: the measure.
        pictures: as `ClipScore` takes them.
        prompts: what they should show.

    Returns:
        `clip_score`, its `_standard_error` over the prompts, and `clip_score_shuffled`, what
        pictures that have nothing to do with their prompts get.
    """
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    others = [prompts[i] for i in order]
    found = _mean("clip_score", score(pictures, prompts))
    return found | {"clip_score_shuffled": score(pictures, others).mean().item()}


@torch.no_grad()
def judged(judge: Judge, pictures: Tensor, captions: Sequence[Caption]) -> dict[str, float]:
    """What a classifier of coloured digits recognises.

    Args:
        judge: the classifier.
        pictures: uint8 (captions * n, 3, 32, 32), n for each caption.
        captions: what they should show.

    Returns:
        In percent, `digit_accuracy`, pictures with the right digit, its `_standard_error` over
        the captions, and `caption_accuracy`, pictures where colour, background and stroke are
        right, too.
    """
    found = []
    for part in pictures.split(_BATCH):
        found += judge.recognise(part.float() / 255)
    each = len(pictures) // len(captions)
    pairs = list(zip(found, (c for c in captions for _ in range(each)), strict=True))
    digits = torch.tensor([100.0 * (a.digit == b.digit) for a, b in pairs], dtype=torch.float64)
    right = sum(a == b for a, b in pairs)
    return _mean("digit_accuracy", digits.view(-1, each).mean(1)) | {
        "caption_accuracy": 100 * right / len(pairs)
    }


def psnr(pictures: Tensor, originals: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, of the mean squared error of all pictures together.

    Args:
        pictures: uint8.
        originals: of the same shape.

    Returns:
        20 log10(255 / root mean squared error); infinite for equal pictures.
    """
    parts = zip(pictures.split(_BATCH), originals.split(_BATCH), strict=True)
    error = sum((a.double() - b.double()).square().sum().item() for a, b in parts)
    return 10 * math.log10(255**2 * pictures.numel() / error) if error else math.inf


@torch.no_grad()
def perceptual_distance(encoder: nn.Module, pictures: Tensor, originals: Tensor) -> float:
    """Distance of features, as LPIPS has it but without its learned weights (Zhang et al., 2018).

    Args:
        encoder: of the original pipeline's VAE, a convolutional network with `down_blocks`.
        pictures: uint8 (count, 3, height, width).
        originals: of the same shape.

    Returns:
        Features of each block divided by their norm over the channels; the squared distance,
        mean over positions, pictures and blocks. Between 0 and 4.
    """
    features: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found = output if isinstance(output, Tensor) else output[0]
        features.append(nn.functional.normalize(found.float(), dim=1))

    like = next(encoder.parameters())
    total, count = 0.0, 0
    with ExitStack() as stack:
        for block in encoder.down_blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        size = max(1, _BATCH * 32**2 // pictures[0, 0].numel())
        for pair in zip(pictures.split(size), originals.split(size), strict=True):
            both = torch.cat(pair).to(like.device, like.dtype) / 127.5 - 1
            features.clear()
            encoder(both)
            halves = [x.chunk(2) for x in features]
            distances = [(a - b).square().sum(1).mean().item() for a, b in halves]
            total += len(pair[0]) * sum(distances) / len(distances)
            count += len(pair[0])
    return total / count


def picture_rows(path: Path, rows: Sequence[Tensor], prompts: Sequence[str]) -> None:
    """Write rows of pictures as a PNG file, atomically; large ones are scaled down.

    Args:
        path: of the file.
        rows: of each, uint8 (prompts, 3, height, width).
        prompts: kept as JSON in the file's text `prompts`.
    """
    image = torch.cat([row.permute(1, 2, 0, 3).flatten(2) for row in rows], 1)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    height, width = rows[0].shape[2:]
    if (scale := _LARGEST / max(height, width)) < 1:
        size = round(scale * width) * len(prompts), round(scale * height) * len(rows)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    notes = PngInfo()
    notes.add_text("prompts", json.dumps(list(prompts)))
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=notes)


def _mean(name: str, values: Tensor) -> dict[str, float | None]:
    """Mean, and its standard error where there are two values."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: values.mean().item(), f"{name}_standard_error": error}

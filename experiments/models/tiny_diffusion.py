"""A small text-to-image pipeline in diffusers' format, and the networks that judge its pictures.

All of it is trained by `scripts/train_tiny_sd.py` and published in the folder `tiny_sd`.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from experiments.cache import load_state, save_state
from experiments.data import coloured_digits
from experiments.data.coloured_digits import CLASSES, SIZE, Caption
from experiments.models.language import quiet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTokenizer

#: Where the trained networks are published: the pipeline, `clip` and `judge.safetensors` in it.
FOLDER = Path(__file__).with_name("tiny_sd")
JUDGE = "judge.safetensors"
CLIP = "clip"
#: Tokens of a prompt, start and end included.
LENGTH = 16
_WIDTH = 96  # of the text encoder, and of what the UNet's attention looks at


class Judge(nn.Module):
    """A small convolutional classifier of pictures of coloured digits, independent of the CLIP.

    It tells digit, colour, background and stroke apart.
    """

    def __init__(self) -> None:
        """Build it with random weights."""
        super().__init__()
        layers, channels = [], 3
        for width in (32, 64, 96):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1, stride=2),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Linear(96 * (SIZE // 8) ** 2, sum(CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of the four properties, in the order of `Caption`'s fields.

        Args:
            images: float32 (batch, 3, 32, 32) between 0 and 1.
        """
        return self.classifier(self.features(images * 2 - 1)).split(CLASSES, dim=1)

    @torch.inference_mode()
    def recognise(self, images: Tensor) -> list[Caption]:
        """What the judge sees in pictures (batch, 3, 32, 32)."""
        found = torch.stack([logits.argmax(1) for logits in self(images)], 1)
        return [Caption(*values) for values in found.tolist()]


def load_judge(folder: Path = FOLDER) -> Judge:
    """The trained judge, in evaluation mode.

    Raises:
        ValueError, OSError: its file is damaged or missing.
    """
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_state(folder / JUDGE)[0].items()})
    return judge.eval().requires_grad_(False)


def build_tokenizer() -> "CLIPTokenizer":
    """CLIP's tokenizer with a vocabulary in which every word of the captions is one token."""
    from transformers import CLIPTokenizer

    texts = " ".join(coloured_digits.TEMPLATES).replace("{", " ").replace("}", " ").split()
    words = {*texts, *coloured_digits.DIGITS, *coloured_digits.COLOURS, *coloured_digits.STROKES}
    merges = _merges(sorted(words))
    letters = _byte_letters()
    entries = letters + [f"{x}</w>" for x in letters] + ["".join(pair) for pair in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.json"
        vocabulary.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
        lines = Path(folder) / "merges.txt"
        lines.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding: merge the most frequent pair until every word is one symbol."""
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for symbols in split for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in split:
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def _byte_letters() -> list[str]:
    """The printable letter of each of the 256 bytes, as byte-level tokenizers write them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def build_clip(tokenizer: "CLIPTokenizer") -> "CLIPModel":
    """Encoders of text and pictures with random weights, about 0.55 million of them."""
    from transformers import CLIPConfig, CLIPModel

    size = {
        "hidden_size": _WIDTH,
        "intermediate_size": 4 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 64,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": SIZE, "patch_size": 8}
    return CLIPModel(
        CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=64)
    )


def build_vae() -> "AutoencoderKL":
    """An autoencoder with random weights, about 0.25 million: 8 x 8 latents of 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(24, 24, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def build_unet() -> "UNet2DConditionModel":
    """A denoiser with random weights, about 1.4 million of them."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(48, 72),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )


def build_scheduler() -> "DPMSolverMultistepScheduler":
    """Stable Diffusion's noise schedule, with a solver that needs few steps."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )


def save(
    folder: Path,
    *,
    clip: "CLIPModel",
    vae: "AutoencoderKL",
    unet: "UNet2DConditionModel",
    judge: Judge,
    tokenizer: "CLIPTokenizer",
) -> None:
    """Write the pipeline in diffusers' format at 16 bits, the CLIP and the judge in a folder.

    Args:
        folder: an existing one.
        clip: trained, its text encoder is the pipeline's; like all weights rounded to float16.
        vae: trained.
        unet: trained.
        judge: trained.
        tokenizer: of the captions.

    Raises:
        OSError: a file cannot be written.
    """
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPProcessor

    with quiet():
        pipeline = StableDiffusionPipeline(
            vae=vae.half(),
            text_encoder=clip.text_model.half(),
            tokenizer=tokenizer,
            unet=unet.half(),
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
        clip.half().save_pretrained(folder / CLIP)
        half = [0.5] * 3
        images = CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=half, image_std=half
        )
        CLIPProcessor(images, tokenizer).save_pretrained(folder / CLIP)
    save_state(folder / JUDGE, judge.half().state_dict(), {})

"""Text-to-image pipelines as subjects of runs: recorded calls, pictures and their scores."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import jlcm
from experiments.config import Config
from experiments.data.prompts import check_prompts, load_prompts
from experiments.evaluate.diffusion import (
    ClipScore,
    clip_scores,
    generate,
    judged,
    perceptual_distance,
    picture_rows,
    psnr,
)
from experiments.models.diffusion import check_diffusion_model, load_clip, load_pipeline
from experiments.models.tiny_diffusion import load_judge
from experiments.records import PICTURES
from experiments.subject import original_path
from jlcm.config import Invalid
from jlcm.files import replacing
from jlcm.locks import once

_SHOWN = 8  # prompts whose pictures are kept


def check_diffusion(config: Config) -> None:
    """Check options and files before anything is fetched.

    Raises:
        ValueError, OSError: naming the option.
    """
    check_diffusion_model(config.model)
    check_prompts(config.data, built_in=config.model.source == "tiny_sd")
    if config.encoding.first_last != "same":
        raise Invalid("encoding.first_last=int8 is a convention for networks of images")
    if config.learn.blocks is not None and config.method.name == "jlcm":
        raise Invalid("learn.blocks is not for pipelines: choose learn=lnq, distill or jlcm")


class DiffusionSubject:
    """A text-to-image pipeline and its prompts (`experiments.subject.Subject`)."""

    architecture = None  # the network has its own
    example_inputs = None

    def __init__(
        self, config: Config, identity: dict[str, Any], device: torch.device, folder: Path
    ) -> None:
        """Load the pipeline and find the prompts.

        Args:
            config: the whole configuration.
            identity: the part of it that decides the result.
            device: where pictures are made.
            folder: of the run; some pictures are kept in it.

        Raises:
            ValueError, OSError: for a pipeline or prompts that cannot be had.
        """
        built_in = config.model.source == "tiny_sd"
        self._prompts = load_prompts(config.data, built_in=built_in)
        self._pipeline = load_pipeline(config.model)
        self._config, self._device, self._folder = config, device, folder
        # Prompts and noise are the same for all seeds.
        everywhere = identity | {"seed": None}
        self._path = original_path(config, everywhere, ".safetensors", "diffusers", "transformers")
        self.module = jlcm.pipeline_network(self._pipeline)
        self.filter_fn = jlcm.layers_of(*(config.model.components or ()))
        if unknown := set(config.model.components or ()) - set(self.module.components):
            raise Invalid(
                f"model.components={', '.join(sorted(unknown))}: choose among "
                f"{', '.join(self.module.components)}"
            )

    def calibration(self) -> Tensor:
        """Calls of the pipeline's components for the calibration prompts, (samples, features).

        Raises:
            Invalid: (a ValueError) there are no prompts for it.
        """
        data, prompts = self._config.data, self._prompts.calibration
        if not prompts:
            raise Invalid(
                "all prompts are evaluated: set a smaller data.limit, or data.calibration_prompts"
            )
        calls = jlcm.record_calls(
            self._pipeline.to(self._device),
            self.module,
            prompts,
            per_prompt=-(-data.calibration_samples // len(prompts)),
            steps=data.steps,
            guidance_scale=data.guidance,
            seed=self._config.seed,
            batch_size=self._config.compute.batch_size,
            **self._size(),
        )
        return calls[: data.calibration_samples]

    def original(self) -> dict[str, Any]:
        """Scores of the original pipeline; its pictures are kept for all runs of a sweep."""
        with once(self._path, again=self._config.force) as missing:
            if missing:
                pictures = self._generate(self._pipeline.to(self._device), "original")
                results = json.dumps(self._scores(pictures))
                with replacing(self._path) as temporary:
                    save_file({"pictures": pictures}, temporary, {"results": results})
        with safe_open(self._path, "pt") as file:
            self._originals = file.get_tensor("pictures")
            return json.loads(file.metadata()["results"])

    def packed(self, module: nn.Module) -> dict[str, Any]:
        """Scores of the compressed pipeline and its pictures' distance from the original's."""
        pipeline = jlcm.packed_pipeline(module, self._pipeline.to(self._device))
        pictures = self._generate(pipeline, "packed")
        found = self._scores(pictures) | {"psnr": psnr(pictures, self._originals)}
        encoder = getattr(getattr(self._pipeline, "vae", None), "encoder", None)
        if hasattr(encoder, "down_blocks"):
            found["perceptual"] = perceptual_distance(encoder, pictures, self._originals)
        each = self._config.data.noise_seeds
        rows = [x[::each][:_SHOWN] for x in (self._originals, pictures)]
        picture_rows(self._folder / PICTURES, rows, self._prompts.evaluation[:_SHOWN])
        return found

    def _generate(self, pipeline: Any, description: str) -> Tensor:
        data = self._config.data
        return generate(
            pipeline,
            self._prompts.evaluation,
            noise_seeds=data.noise_seeds,
            batch_size=self._config.compute.batch_size,
            description=description,
            num_inference_steps=data.steps,
            guidance_scale=data.guidance,
            **self._size(),
        )

    def _size(self) -> dict[str, int]:
        size = self._config.data.size
        return {} if size is None else {"height": size, "width": size}

    def _scores(self, pictures: Tensor) -> dict[str, Any]:
        """What needs no original."""
        clip, processor = load_clip(self._config.model)
        score = ClipScore(clip.to(self._device), processor)
        prompts, captions = self._prompts.evaluation, self._prompts.captions
        found = {"samples": len(pictures), "prompts": len(prompts)}
        found |= clip_scores(score, pictures.to(self._device), prompts)
        if captions is not None:
            found |= judged(load_judge(), pictures, captions)
        return found

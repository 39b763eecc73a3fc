"""Pipelines of diffusers: one network for all components, packed pipelines, and their folders.

diffusers is imported by those who have a pipeline, never by `import jlcm`.
"""

import copy
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jlcm.architecture import Architecture
from jlcm.checkpoint import load, put_into, save
from jlcm.layers import WHEN_PACKED, computing_dtype, packed_subclass, stored_tensors
from jlcm.pipeline import PipelineNetwork, role
from jlcm.reading import CheckpointError
from jlcm.select import Filter, linear_and_convolution

#: Packed tensors of all components, in the folder of a packed pipeline.
WEIGHTS = "jlcm.safetensors"


def pipeline_network(pipeline: Any, components: Sequence[str] | None = None) -> PipelineNetwork:
    """The components of a pipeline as one network, for `jlcm.compress` and `jlcm.quantize`.

    Args:
        pipeline: a text-to-image pipeline of diffusers.
        components: names of those that the network has; None for all that have weights. Which
            weights are compressed is the choice of `filter_fn`, usually `jlcm.layers_of`; all
            others of the network are stored in 16 bits.

    Returns:
        The network. Its children are the pipeline's own modules, not copies.

    Raises:
        ValueError: the pipeline has no such component with weights.
    """
    modules = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
    names = list(modules) if components is None else list(components)
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(
            f"{type(pipeline).__name__} has no component {', '.join(unknown)} with weights: "
            f"choose among {', '.join(modules)}"
        )
    if not names:
        raise ValueError("at least one component is needed")
    network = PipelineNetwork({name: modules[name] for name in names})
    try:
        network.architecture = Architecture.of_pipeline(pipeline, names)
    except (TypeError, ValueError):
        pass  # a class of somebody else: jlcm.load must be given the network
    return network


def layers_of(*components: str, filter_fn: Filter = linear_and_convolution) -> Filter:
    """Choose the layers of some components of a pipeline's network, for `filter_fn`.

    Args:
        components: names of components ("unet") or of parts of them ("unet.up_blocks"); none for
            text encoders, denoiser and VAE. Of the VAE all but the encoder is meant, which
            text-to-image never runs; "vae.encoder" chooses that too.
        filter_fn: which of their layers.

    Returns:
        The filter.
    """

    def chosen(module: nn.Module, name: str) -> bool:
        component, part = (*name.split("."), "")[:2]
        named = [c for c in components if f"{name}.".startswith(f"{c}.")]
        if components and not named or not components and role(component) is None:
            return False
        unused = component == "vae" and part in ("encoder", "quant_conv")
        return (not unused or any("." in c for c in named)) and filter_fn(module, name)

    return chosen


def packed_pipeline(network: PipelineNetwork, pipeline: Any) -> Any:
    """A pipeline with the components of a packed network; the given one stays as it is.

    Args:
        network: of `jlcm.compress`, `jlcm.quantize` or `jlcm.load`.
        pipeline: the original; scheduler, tokenizers and components that the network lacks are
            shared with it.

    Returns:
        A pipeline of the same class.

    Raises:
        ValueError: the pipeline has no such components.
    """
    return put_into(copy.copy(pipeline), network)


def save_pipeline(network: PipelineNetwork, pipeline: Any, folder: str | os.PathLike) -> Path:
    """Write a packed pipeline to a folder that `jlcm.load_pipeline` reads.

    Args:
        network: packed, of `jlcm.pipeline_network`.
        pipeline: the original, or one with the packed components. Scheduler, tokenizers and
            configurations are taken from it, and as they are the components that the network lacks.
        folder: made if needed. Packed tensors go to jlcm.safetensors, which is written last.

    Returns:
        The folder.

    Raises:
        ValueError: the network is not compressed, has classes of somebody else, or is not of this
            pipeline.
        OSError: the folder is a file, or the disk has no room.
    """
    folder, architecture = Path(folder), getattr(network, "architecture", None)
    if not hasattr(network, "compression"):
        raise ValueError("only a network that jlcm.compress returned can be saved")
    if architecture is None:
        raise ValueError(
            "the network has components of other classes than diffusers' and transformers' own: "
            "save it with jlcm.save, and load it with jlcm.load(path, model=...)"
        )
    pipeline = packed_pipeline(network, pipeline)
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, a pipeline is saved to a folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)  # until it is there again, nothing can be loaded
    pipeline.save_config(folder)
    for name, component in pipeline.components.items():
        if name not in network.components:
            if hasattr(component, "save_pretrained"):
                component.save_pretrained(folder / name)
        elif hasattr(component, "save_config"):
            component.save_config(folder / name)
        else:
            component.config.save_pretrained(folder / name)
    save(network, folder / WEIGHTS)
    return folder


def load_pipeline(
    folder: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a packed pipeline without its original weights.

    Args:
        folder: written by `jlcm.save_pipeline`.
        device: where it runs.
        dtype: that it computes in; None for that of the saved network.

    Returns:
        The pipeline of diffusers, with packed components.

    Raises:
        CheckpointError: the folder is incomplete, damaged or of something else.
    """
    folder = Path(folder)
    for name in ("model_index.json", WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: lacks {name}, it is no whole folder of jlcm.save_pipeline"
            )
    network = load(folder / WEIGHTS, device=device, dtype=dtype)
    if not isinstance(network, PipelineNetwork):
        raise CheckpointError(f"{folder / WEIGHTS}: holds no pipeline's components")
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, **network.components
        )
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: cannot make its pipeline: {error}") from error
    for name, component in pipeline.components.items():
        if name not in network.components and isinstance(component, nn.Module):
            component.to(device, computing_dtype(network))
    return pipeline


class _Packed:
    """What a packed model does otherwise than diffusers' own class, which has parameters."""

    dtype = property(computing_dtype)
    device = property(lambda self: next(self.buffers()).device)

    def compute_in(self, dtype: torch.dtype) -> nn.Module:
        """Choose the dtype of the computation, in place; what diffusers keeps in float32 stays."""
        nn.Module.to(self, dtype)
        kept = set(self._keep_in_fp32_modules or ())
        for name, stored in stored_tensors(self):
            if kept & set(name.split(".")):
                stored.to(torch.float32)
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{type(self).__name__} is packed: save the whole pipeline with jlcm.save_pipeline"
        )


@cache
def _packed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return packed_subclass(_Packed, kind, ("from_pretrained", "from_config"))


def adapt(model: nn.Module) -> None:
    """Have packed models of diffusers work in pipelines, in place.

    Args:
        model: just packed; modules of others are left alone.
    """
    library = sys.modules.get("diffusers.models.modeling_utils")
    if library is not None:
        for module in model.modules():
            if isinstance(module, library.ModelMixin) and not isinstance(module, _Packed):
                module.__class__ = _packed_class(type(module))


WHEN_PACKED.append(adapt)

"""Packed models of transformers: `save_pretrained`, `from_pretrained`, `generate`.

Imported as soon as transformers' models are, so that `import jlcm` is all that is needed. Packed
tensors and their description are those of `jlcm.save`; only where they lie differs
(`docs/huggingface.md`).
"""

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from jlcm.architecture import Architecture
from jlcm.checkpoint import check_filled, describe, fill, plain_buffers
from jlcm.compress import Compression
from jlcm.layers import (
    STORE,
    WHEN_PACKED,
    HalfTensor,
    computing_dtype,
    packed_subclass,
    stored_tensors,
)
from jlcm.model_card import write_model_card
from jlcm.packed import StoredWeight
from jlcm.reading import (
    FORMAT_VERSION,
    METHOD,
    CheckpointError,
    check_version,
    damaged,
    digest,
    folder_names,
    read_shards,
)


@register_quantization_config(METHOD)
class JlcmConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed model.

    Attributes:
        quant_method: "jlcm".
        description: what the header of a packed file says, without the architecture.
    """

    def __init__(self, quant_method: str = METHOD, **description: Any) -> None:
        """Take the description as it lies in config.json.

        Raises:
            CheckpointError: if it is of another format version.
        """
        self.quant_method = quant_method
        check_version("quantization_config of config.json", description.get("format_version"))
        self.description = description

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {"quant_method": self.quant_method, **self.description}


@register_quantizer(METHOD)
class JlcmQuantizer(HfQuantizer):
    """Packs an empty model before transformers loads what it stores, and checks it afterwards."""

    requires_calibration = True
    #: Files that the model was loaded from, none for one that was just compressed.
    files: Sequence[str] = ()

    def __init__(self, quantization_config: JlcmConfig, **kwargs: Any) -> None:
        """Take the configuration.

        Raises:
            ValueError: if the weights in the folder are not packed.
        """
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "the folder holds no packed model, and jlcm does not compress while it loads: load "
                "the model without quantization_config, and pass it to jlcm.compress"
            )
        super().__init__(quantization_config, **kwargs)

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed models have no parameters."""
        return False

    def get_new_dtype(self, converter, param, dtype):
        """None: tensors are kept as they are stored."""
        return None

    def update_weight_conversions(self, weight_conversions, model=None):
        """Names in the folder become places in the packed model.

        Conversions of transformers are not applied: the folder has the model's own names.
        """
        return [_Renaming(self._places)]

    def get_state_dict_and_metadata(self, model):
        """What `save_pretrained` writes; the description goes into the model's config."""
        tensors, header = describe(model, derived_buffers=False)
        header["blake2b"] = digest(header, tensors)
        model.config.quantization_config = JlcmConfig(**header)
        names = folder_names(header)
        return {names.get(name, name): tensor for name, tensor in tensors.items()}, {}

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not checkpoint_files:
            raise ValueError("a packed model is loaded from files, not from a state dict")
        header, self.files = self.quantization_config.description, checkpoint_files
        dtype = model.config.dtype  # asked for
        with torch.device("cpu"):  # the caller builds on the meta device
            tensors = read_shards(checkpoint_files, header)
            empty = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
            try:
                fill(model, header, empty)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise self._misfit(model, error) from error
            model.compute_in(dtype)
        names = folder_names(header)
        tied = {name for name, described in header["tensors"].items() if "same_as" in described}
        places = _places(model, tied)
        self._places = {names.get(name, name): place for name, place in places.items()}
        for module in model.modules():
            if STORE in module._modules and not module._non_persistent_buffers_set:
                module._is_hf_initialized = True  # nothing is left to initialise
        # What is shared is expected, and loaded, once.
        whole, expected = model.state_dict, set(places.values())
        model.state_dict = lambda *args, **kwargs: {
            name: tensor for name, tensor in whole(*args, **kwargs).items() if name in expected
        }

    def _process_model_after_weight_loading(self, model, **kwargs):
        del model.state_dict
        header = dict(self.quantization_config.description)
        try:
            for name, described in header["tensors"].items():
                owner, _, attribute = name.rpartition(".")
                module = model.get_submodule(owner)
                if "same_as" in described and attribute in module._buffers:
                    module._buffers[attribute] = model.get_buffer(described["same_as"])
            check_filled(model)
            for module in model.modules():
                if isinstance(module, StoredWeight):
                    module.check()
            model.compression = Compression(**header["compression"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._misfit(model, error) from error
        checksum = header.pop("blake2b", None)
        if digest(header, describe(model, derived_buffers=False)[0]) != checksum:
            raise damaged(self._folder)
        return model

    @property
    def _folder(self) -> Path:
        return Path(self.files[0]).parent

    def _misfit(self, model: nn.Module, error: Exception) -> CheckpointError:
        saved = " or ".join(model.config.architectures or []) or "another class"
        return CheckpointError(
            f"{self._folder}: written by {saved}, does not fit {type(model).__name__}: {error}"
        )


class _Renaming(WeightRenaming):
    """Renames exactly the keys of a dictionary, and is not used when the model is saved."""

    __slots__ = ("names",)

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__("unused", "unused")
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.names.get(source_key, source_key), None


def _places(model: nn.Module, tied: set[str]) -> dict[str, str]:
    """Full name of the buffer that holds each tensor but the tied ones, by the tensor's name."""
    places = {name: name for name, _ in plain_buffers(model, derived=False) if name not in tied}
    for name, stored in stored_tensors(model):
        if name in tied:
            continue
        owner, _, attribute = name.rpartition(".")
        place = ".".join(part for part in (owner, STORE, attribute) if part)
        match stored:
            case StoredWeight():
                parts = [part for part, _ in stored.named_buffers()]
                places |= {f"{name}.{part}": f"{place}.{part}" for part in parts}
            case HalfTensor():
                places[name] = f"{place}.values"
    return places


class _Packed:
    """What a packed model does otherwise than transformers' own class, which has parameters."""

    dtype = property(computing_dtype)
    device = property(lambda self: next(self.buffers()).device)

    def compute_in(self, dtype: torch.dtype) -> nn.Module:
        """Choose the dtype that stored tensors are decoded to, as `from_pretrained` does, in place.

        Other buffers keep theirs (rotary frequencies are too coarse in 16 bits), and so do layers
        that transformers keeps in float32.
        """
        if dtype != self.dtype:
            exact = "|".join(self._get_dtype_plan(dtype))
            for name, stored in stored_tensors(self):
                kept = exact and re.search(rf"(^|\.)({exact})(\.|$)", name)
                stored.to(torch.float32 if kept else dtype)
        return self

    def half(self) -> nn.Module:
        return nn.Module.half(self)

    def float(self) -> nn.Module:
        return nn.Module.float(self)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: what is tied is stored once."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write config.json, the packed tensors, the generation config and a model card.

        Args:
            save_directory: folder, made if needed.
            is_main_process: whether this process writes.
            kwargs: of transformers' `save_pretrained`, without `variant`.

        Raises:
            ValueError: if the model is only a part of a compressed one, or for a variant.
            NotADirectoryError: if the folder is a file.
        """
        folder = Path(save_directory)
        if not isinstance(getattr(self, "compression", None), Compression):
            raise ValueError(
                f"{type(self).__name__} is a part of a packed model: save the whole, which "
                "jlcm.compress returned"
            )
        if kwargs.get("variant") is not None:
            raise ValueError("a packed model has no variants: save it to a folder of its own")
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file, a packed model is saved to a folder")
        # The names of the model, as its description has them, not those of other checkpoints.
        kwargs["save_original_format"] = False
        super().save_pretrained(folder, is_main_process, **kwargs)
        if is_main_process:
            # With or without shards: what was saved otherwise before would be loaded in its place.
            forms = [folder / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
            if all(form.is_file() for form in forms):
                min(forms, key=lambda form: form.stat().st_mtime_ns).unlink()
            loaded = bool(self.hf_quantizer.files)
            write_model_card(self, folder, None if loaded else self.config.name_or_path)


@cache
def _packed_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return packed_subclass(_Packed, kind, ("from_pretrained", "_from_config"))


def adapt(model: nn.Module) -> None:
    """Have a packed model of transformers work with `generate` and `save_pretrained`, in place.

    Args:
        model: just packed; of another network the models of transformers in it are adapted.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, _Packed):
            module.__class__ = _packed_class(type(module))
            module.all_tied_weights_keys = {}  # they are tied already
    if not isinstance(model, PreTrainedModel):
        return
    model._keys_to_ignore_on_save = None
    parts = (getattr(model.config, name, None) for name in model.config.sub_configs)
    for config in (model.config, *filter(None, parts)):  # as transformers loads them
        config.dtype = model.dtype
    model.hf_quantizer = JlcmQuantizer(JlcmConfig(format_version=FORMAT_VERSION))
    model.is_quantized, model.quantization_method = True, METHOD
    if not hasattr(model, "architecture"):
        try:
            model.architecture = Architecture.of_transformers(model)
        except (TypeError, ValueError):
            pass  # a class of somebody else: jlcm.load must be given the model


WHEN_PACKED.append(adapt)

"""Have transformers know packed models as soon as both libraries are imported.

Importing transformers' models takes longer than all of jlcm, and most have no use for them: jlcm
waits until somebody does. A version that is too old goes on without packed models.
"""

import importlib.metadata
import re
import sys
import warnings

from torch import nn

from jlcm.imports import when_imported
from jlcm.layers import WHEN_PACKED

#: First version that packed models are tested with.
OLDEST = (5, 18)
_MODELS = "transformers.modeling_utils"


def register_when_imported() -> None:
    """Call `register` once transformers' models are imported: at once, or later."""
    when_imported(_MODELS, register)


def register() -> None:
    """Import `jlcm.huggingface`, which registers; with an old transformers only warn."""
    installed = importlib.metadata.version("transformers")
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) >= OLDEST:
        importlib.import_module("jlcm.huggingface")
        return
    message = (
        f"packed models are saved and loaded with transformers {OLDEST[0]}.{OLDEST[1]} or newer, "
        f"version {installed} is installed: pip install -U transformers"
    )
    warnings.warn(message, stacklevel=2)

    def refuse(model: nn.Module) -> None:
        def save_pretrained(*args, **kwargs):
            raise ImportError(message)

        if isinstance(model, sys.modules[_MODELS].PreTrainedModel):
            model.save_pretrained = save_pretrained

    WHEN_PACKED.append(refuse)

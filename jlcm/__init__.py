"""Shrink the memory of trained networks with codebooks, and run them packed.

>>> import jlcm
>>> packed = jlcm.compress(model, alpha=7.5)           # doctest: +SKIP
>>> jlcm.save(packed, "model.safetensors")             # doctest: +SKIP
>>> jlcm.footprint("model.safetensors").alpha_total    # doctest: +SKIP
"""

from jlcm.torchvision_compat import declare_missing_operators

declare_missing_operators()  # before anything imports torchvision

from jlcm.activations import (  # noqa: E402
    ActivationFootprint,
    activation_footprint,
    measured_activation_peak,
)
from jlcm.architecture import Architecture  # noqa: E402
from jlcm.checkpoint import CheckpointError, load, save  # noqa: E402
from jlcm.compress import compress  # noqa: E402
from jlcm.config import Encoding, Init  # noqa: E402
from jlcm.diffusion import (  # noqa: E402
    layers_of,
    load_pipeline,
    packed_pipeline,
    pipeline_network,
    save_pipeline,
)
from jlcm.footprint import Footprint, footprint, resident_bytes  # noqa: E402
from jlcm.learning.blocks import Blocks  # noqa: E402
from jlcm.learning.distill import Distill  # noqa: E402
from jlcm.learning.options import Learn  # noqa: E402
from jlcm.quantize import quantize  # noqa: E402
from jlcm.recording import record_calls  # noqa: E402
from jlcm.select import linear_and_convolution, with_embeddings  # noqa: E402
from jlcm.transformers_compat import register_when_imported  # noqa: E402

register_when_imported()

__all__ = [
    "ActivationFootprint",
    "Architecture",
    "Blocks",
    "CheckpointError",
    "Distill",
    "Encoding",
    "Footprint",
    "Init",
    "Learn",
    "activation_footprint",
    "compress",
    "footprint",
    "layers_of",
    "linear_and_convolution",
    "load",
    "load_pipeline",
    "measured_activation_peak",
    "packed_pipeline",
    "pipeline_network",
    "quantize",
    "record_calls",
    "resident_bytes",
    "save",
    "save_pipeline",
    "with_embeddings",
]

"""Make torchvision importable next to a torch build that its binary extension was not made for.

The registry's torchvision is compiled against the CUDA build of torch. Next to a CPU-only torch
its extension does not load, and the import then fails with "operator torchvision::nms does not
exist", although models and transforms need none of its operators. Declaring the two operator
schemas that the import looks for is enough; calling them still raises.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
#: The declarations live as long as this object.
_library: torch.library.Library | None = None


def extension_loads() -> bool:
    """Whether torchvision's compiled operators can be loaded into this process."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    extensions = sorted(Path(spec.origin).parent.glob("_C*.*"))
    try:
        for extension in extensions:
            torch.ops.load_library(str(extension))
    except OSError:
        return False
    return bool(extensions)


def declare_missing_operators() -> bool:
    """Declare torchvision's `nms` and `qnms` where its extension cannot load.

    Returns:
        Whether anything was declared. With matching builds nothing is done.
    """
    global _library
    if _library is not None:
        return True
    if importlib.util.find_spec("torchvision") is None or extension_loads():
        return False
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    return True

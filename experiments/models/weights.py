"""Local weight files: safetensors state dicts for networks of torchvision and timm."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Read a safetensors state dict.

    Args:
        path: the file.

    Returns:
        The tensors; floating-point ones (float16, bfloat16, float32) as float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights {path} do not exist: set model.weights=FILE.safetensors")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights {path} are not a readable safetensors file ({error})") from error
    return {n: t.float() if t.is_floating_point() else t for n, t in state.items()}


def classifier_name(network: nn.Module) -> str:
    """Name the layer whose rows are the classes: the last linear layer or convolution.

    Args:
        network: a classifier of torchvision or timm, on any device.

    Returns:
        The layer's name.
    """
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return layers[-1]


def count_classes(network: nn.Module, state: dict[str, torch.Tensor], *, path: str) -> int:
    """Read a file's number of classes from the shape of its classifier.

    Args:
        network: the architecture with any number of classes.
        state: the file's tensors.
        path: the file, for messages.

    Returns:
        The number of classes.

    Raises:
        ValueError: the file lacks the classifier.
    """
    name = f"{classifier_name(network)}.weight"
    if name not in state:
        raise ValueError(
            f"weights {path} lack {name}: model.name must be the architecture of the file"
        )
    return state[name].shape[0]


def fit_folded_biases(
    network: nn.Module, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Move biases of convolutions into batch norms where the network's convolutions have none.

    Files with folded batch norms carry biases on convolutions. A convolution's bias b followed by
    batch norm is the same as a running mean smaller by b. A batch norm that the file leaves out is
    the identity, shifted by b.

    Args:
        network: the architecture that the file is for, on any device.
        state: the file's tensors.

    Returns:
        A state dict without those biases; tensors that need no change are shared.
    """
    state, convolution = dict(state), None
    # Networks of torchvision and timm register layers in the order in which they are applied.
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            convolution = name if module.bias is None else None
        elif isinstance(module, nn.BatchNorm2d) and convolution is not None:
            bias, convolution = state.pop(f"{convolution}.bias", None), None
            if bias is None:
                continue
            if f"{name}.running_mean" in state:
                state[f"{name}.running_mean"] = state[f"{name}.running_mean"] - bias
            elif not any(key.startswith(f"{name}.") for key in state):
                state[f"{name}.weight"] = torch.ones_like(bias)
                state[f"{name}.bias"] = bias
                state[f"{name}.running_mean"] = torch.zeros_like(bias)
                state[f"{name}.running_var"] = torch.full_like(bias, 1 - module.eps)
    return state


def load_weights(network: nn.Module, state: dict[str, torch.Tensor], *, path: str) -> None:
    """Load a file's tensors into a network; all of them must fit.

    Args:
        network: the network, on the CPU; written in place.
        state: the file's tensors.
        path: the file, for messages.

    Raises:
        ValueError: tensors are missing, left over, of another shape, or not finite.
    """
    state = fit_folded_biases(network, state)
    wanted = network.state_dict()
    # Counters of training steps matter to training only, and many files leave them out.
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in wanted]
    if missing or unexpected:
        raise ValueError(
            f"weights {path} do not fit the network: {_listed('missing', missing)}, "
            f"{_listed('unexpected', unexpected)}; model.name must be the architecture of the file"
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"weights {path}: {name} has shape {tuple(tensor.shape)}, "
                f"the network needs {tuple(wanted[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"weights {path}: {name} holds values that are not finite")
    network.load_state_dict(state, strict=False)


def _listed(word: str, names: list[str]) -> str:
    """Count names and show the first ones."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {word}" + (f" ({shown})" if names else "")

"""Memory of a network's weights and activations (Table 1)."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from experiments.config import FootprintConfig
from experiments.models import Network
from jlcm.activations import activation_footprint, measured_activation_peak
from jlcm.config import Invalid, check_choice

DTYPES = ("float16", "bfloat16", "float32")


def check_footprint(options: FootprintConfig) -> None:
    """Check the options of the measurement.

    Raises:
        Invalid: (a ValueError) for an unknown dtype, or no images.
    """
    check_choice("footprint.dtype", options.dtype, DTYPES)
    if options.batch_size < 1:
        raise Invalid(f"footprint.batch_size={options.batch_size} must be at least 1")


def measure_footprint(
    network: Network, options: FootprintConfig, devices: list[torch.device], notes: list[str]
) -> dict[str, Any]:
    """Count weights and activations, and measure the activations on each device.

    Args:
        network: the network; its weights' values do not matter.
        options: dtype and batch size.
        devices: where the peak is measured beside the analytic one.
        notes: gets a sentence for each device that does not compute in the dtype.

    Returns:
        What `docs/records.md` describes as `results.footprint`.
    """
    dtype, size = getattr(torch, options.dtype), network.preprocessing.crop
    images = torch.zeros(options.batch_size, 3, size, size)
    counted = count_footprint(network.module, images, options)
    measured = {}
    for device in devices:
        try:
            module = network.module.to(device, dtype)
            measured[device.type] = measured_activation_peak(module, images.to(device, dtype))
        except RuntimeError as error:
            measured[device.type] = None
            notes.append(
                f"{options.dtype} cannot be measured on {device.type}: {str(error).splitlines()[0]}"
            )
    return counted | {"image_size": size, "activation_peak_measured_bytes": measured}


def measure_language(module: nn.Module, length: int, options: FootprintConfig) -> dict[str, Any]:
    """Count weights and activations of a language model that reads so many tokens at once.

    Args:
        module: the model, on the meta device: it costs no memory whatever its size.
        length: of a sequence.
        options: dtype and batch size.

    Returns:
        What `docs/records.md` describes as `results.footprint`.
    """
    inputs = {
        "input_ids": torch.zeros(options.batch_size, length, dtype=torch.int64),
        # Whole, because transformers would look at the values of anything less.
        "attention_mask": torch.ones(options.batch_size, 1, length, length, dtype=torch.bool),
        "use_cache": False,
    }
    counted = count_footprint(module, inputs, options)
    return counted | {"tokens": length, "activation_peak_measured_bytes": {}}


def count_footprint(module: nn.Module, inputs: Any, options: FootprintConfig) -> dict[str, Any]:
    """Bytes of weights and of the activations at the peak, and what these are."""
    found = activation_footprint(module, inputs, dtype=getattr(torch, options.dtype))
    total = found.weight_bytes + found.peak_bytes
    return {
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "weight_bytes": found.weight_bytes,
        "activation_peak_bytes": found.peak_bytes,
        "activation_eager_peak_bytes": found.eager_peak_bytes,
        "total_bytes": total,
        "weights_percent": 100 * found.weight_bytes / total,
        "activations_percent": 100 * found.peak_bytes / total,
        "peak": {
            "operation": found.operation,
            "alive": [
                asdict(tensor) | {"dtype": str(tensor.dtype).removeprefix("torch.")}
                for tensor in found.alive
            ],
        },
    }

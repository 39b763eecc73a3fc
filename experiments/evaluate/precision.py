"""A network in 16 bits against the same network in 32 (Table 7 of the paper's appendix)."""

import copy
from typing import Any

import torch
from torch.utils.data import Dataset

from experiments.config import ComputeConfig
from experiments.evaluate.vision import accuracy, distance, predict
from experiments.models import Network


def measure_precision(
    network: Network, data: Dataset, compute: ComputeConfig, device: torch.device
) -> dict[str, Any]:
    """Evaluate the whole network in float32, float16 and bfloat16.

    Args:
        network: the trained network.
        data: yields (image, label).
        compute: batch size and workers.
        device: where it runs.

    Returns:
        What `docs/records.md` describes as `results.precision`.
    """
    results, reference = {}, None
    for name in ("float32", "float16", "bfloat16"):
        dtype = getattr(torch, name)
        module = copy.deepcopy(network.module).to(device, dtype)
        logits, labels = predict(
            lambda images, module=module, dtype=dtype: module(images.to(dtype)),
            data,
            device=device,
            batch_size=compute.batch_size,
            workers=compute.workers,
            description=name,
        )
        results[name] = accuracy(logits, labels)
        if reference is None:
            reference = logits
        else:
            results[name] |= distance(reference, logits)
    return results

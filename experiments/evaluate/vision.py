"""Accuracy of classifiers, and how far a packed network is from its original."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from jlcm.learning.forward import to_device


@torch.inference_mode()
def predict(
    module: nn.Module,
    data: Dataset,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    description: str,
) -> tuple[Tensor, Tensor]:
    """Run a classifier over a data set.

    Args:
        module: in evaluation mode, on `device`.
        data: yields (image, label).
        device: of the network.
        batch_size: images at a time.
        workers: processes that load images.
        description: of the progress bar.

    Returns:
        Logits (n, classes) float32 and labels (n,) int64, on the CPU.

    Raises:
        ValueError: if an output is NaN or Inf.
    """
    # Fork: worker processes of other start methods would import the whole program again.
    options = {"multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers, **options)
    logits, labels = [], []
    for images, targets in tqdm(loader, desc=description, unit="batch", leave=False):
        logits.append(module(to_device(images, device)).float().cpu())
        labels.append(targets)
    outputs = torch.cat(logits)
    if not outputs.isfinite().all():
        raise ValueError(f"{description}: the network's outputs contain NaN or Inf")
    return outputs, torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, with the standard error of top-1.

    Args:
        logits: (n, classes).
        labels: (n,) class indices.

    Returns:
        `top1`, `top5`, `top1_standard_error` (percent) and `samples`.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    top1 = hits[:, 0].double().mean().item()
    return {
        "top1": 100 * top1,
        "top5": 100 * hits.any(1).double().mean().item(),
        "top1_standard_error": 100 * (top1 * (1 - top1) / len(labels)) ** 0.5,
        "samples": len(labels),
    }


def distance(original: Tensor, packed: Tensor) -> dict[str, float]:
    """How far a packed network's outputs are from its original's.

    Args:
        original: logits (n, classes).
        packed: logits of the same images.

    Returns:
        `agreement` of the predictions in percent, and `kl`, the mean KL(original || packed) in
            nats.
    """
    divergence = torch.nn.functional.kl_div(
        packed.log_softmax(1), original.log_softmax(1), log_target=True, reduction="batchmean"
    )
    same = original.argmax(1) == packed.argmax(1)
    return {"agreement": 100 * same.double().mean().item(), "kl": divergence.item()}

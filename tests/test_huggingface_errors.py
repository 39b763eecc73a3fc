"""Folders of packed models that cannot be loaded, libraries that are missing or old, cards."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers  # noqa: E402
from tiny_transformers import gpt2, llama, logits, packed, tokens  # noqa: E402

import jlcm  # noqa: E402
from jlcm import layers, transformers_compat  # noqa: E402
from jlcm.huggingface import JlcmConfig  # noqa: E402
from jlcm.imports import when_imported  # noqa: E402
from jlcm.layers import WHEN_PACKED  # noqa: E402

ROOT = Path(__file__).parents[1]
load = transformers.AutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return packed(llama())


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder, max_shard_size="8KB")
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "folder")


def change(folder: Path, function) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    function(config)
    path.write_text(json.dumps(config))


# Other libraries ---------------------------------------------------------------------------------

FIRST = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("jlcm.torchvision_compat", sys.argv[1])  # without the package
compat = sys.modules[spec.name] = module_from_spec(spec)
spec.loader.exec_module(compat)
compat.declare_missing_operators()
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[2])
except RuntimeError as error:
    print("refused:", error)
assert "jlcm" not in sys.modules
import hashlib, jlcm, torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
with torch.no_grad():
    print(hashlib.sha256(model(torch.arange(3, 20)[None]).logits.numpy().tobytes()).hexdigest())
"""

ALONE = """
import sys, jlcm
print([name for name in sys.modules if name.partition(".")[0] == "transformers"])
"""


def run(script: str, *arguments: Path | str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def test_without_jlcm_nothing_random_is_loaded(model, folder):
    """transformers itself would only warn; afterwards an import of jlcm is all that is needed."""
    result = run(FIRST, ROOT / "jlcm/torchvision_compat.py", folder)
    assert result.returncode == 0, result.stderr
    refused, loaded = result.stdout.splitlines()
    assert refused.startswith("refused: You set `ignore_mismatched_sizes` to `False`")
    assert "Unknown quantization type, got jlcm" in result.stderr
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        (line,) = [x for x in result.stderr.splitlines() if f"{name}.weight " in x]
        assert "MISMATCH" in line
    with torch.no_grad():
        expected = model(torch.arange(3, 20)[None]).logits.numpy().tobytes()
    assert loaded == hashlib.sha256(expected).hexdigest()


def test_jlcm_does_not_import_transformers():
    assert run(ALONE).stdout.strip() == "[]"


def test_modules_are_watched(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    before, called = list(sys.meta_path), []
    when_imported("json", lambda: called.append("at once"))
    when_imported("watched.inner", lambda: called.append(sys.modules["watched.inner"].value))
    assert called == ["at once"]
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "__init__.py").touch()
    inner = tmp_path / "watched" / "inner.py"
    with pytest.raises(ModuleNotFoundError):
        import watched.inner
    inner.write_text("value = 1 / 0")
    with pytest.raises(ZeroDivisionError):
        import watched.inner
    inner.write_text("value = 'later, once it works'")
    import watched.inner  # noqa: F401

    assert called == ["at once", "later, once it works"] and sys.meta_path == before
    for name in ("watched.inner", "watched"):
        monkeypatch.delitem(sys.modules, name)


def test_old_transformers(model, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "WHEN_PACKED", WHEN_PACKED.copy())
    for name in (transformers_compat, sys.modules["jlcm.compress"]):
        monkeypatch.setattr(name, "WHEN_PACKED", layers.WHEN_PACKED)
    layers.WHEN_PACKED.clear()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.3")
    with pytest.warns(UserWarning, match="5.18 or newer, version 4.57.3 is installed"):
        transformers_compat.register()
    with pytest.raises(ImportError, match="pip install -U transformers"):
        packed(llama()).save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# Folders -----------------------------------------------------------------------------------------


def test_other_format_version(folder):
    change(folder, lambda config: config["quantization_config"].update(format_version=2))
    for read in (load, jlcm.load, jlcm.footprint):
        with pytest.raises(jlcm.CheckpointError, match="version 2, this jlcm reads version 1"):
            read(folder)


def test_description_is_missing(folder):
    """The codes stop transformers from loading random weights here too."""
    change(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)
    for read in (jlcm.load, jlcm.footprint):
        with pytest.raises(jlcm.CheckpointError, match="has no quantization_config of jlcm"):
            read(folder)


def test_shard_is_missing(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    for read in (load, jlcm.load, jlcm.footprint):
        with pytest.raises(jlcm.CheckpointError, match=f"lacks {shard.name}"):
            read(folder)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_shard_is_truncated(folder, share):
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(share * len(content))])
    for read in (load, jlcm.load, jlcm.footprint):
        with pytest.raises(jlcm.CheckpointError, match=f"{shard.name}: truncated"):
            read(folder)


def test_changed_bytes_are_noticed(folder):
    for shard in sorted(folder.glob("*.safetensors")):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        for read in (load, jlcm.load):
            with pytest.raises(jlcm.CheckpointError, match="does not match its blake2b"):
                read(folder)
        content[-1] ^= 1
        shard.write_bytes(content)
    assert load(folder).quantization_method == "jlcm"


def test_index_names_files_elsewhere(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(jlcm.CheckpointError, match="it names files elsewhere"):
        jlcm.footprint(folder)


def set_(key, value):
    return lambda config: config.update({key: value})


def describe(name, **values):
    return lambda config: config["quantization_config"]["tensors"][name].update(values)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (set_("hidden_size", 64), "has shape .* is expected"),
        (set_("vocab_size", 97), "has shape .*, .97, 32. is expected"),
        (set_("num_hidden_layers", 1), "no layer for model.layers.1"),
        (set_("num_hidden_layers", 3), "no values for model.layers.2"),
        (set_("attention_bias", True), "no values for model.layers.0.self_attn.q_proj.bias"),
        (describe(Q, bits=8), "codes have 512 bytes, 1024 expected"),
        (describe(Q, shape=[16, 64]), "has shape .16, 64., .32, 32. is expected"),
        (describe(Q, kind="new"), "unknown kind of weight 'new'"),
        (describe(Q, relative_error=0.5), "does not match its blake2b"),
        (lambda config: config["quantization_config"]["tensors"].pop(Q), f"no layer for {Q}"),
        (lambda config: config["quantization_config"].pop("tensors"), "cannot be read"),
        (lambda config: config["quantization_config"]["compression"].update(new=1), "does not fit"),
    ],
)
def test_config_and_weights_disagree(folder, function, message):
    change(folder, function)
    with pytest.raises(jlcm.CheckpointError, match=message):
        load(folder)


def test_another_class(folder):
    with pytest.raises(jlcm.CheckpointError, match="written by LlamaForCausalLM, does not fit"):
        transformers.AutoModel.from_pretrained(folder)


def test_another_quantisation(folder):
    config = transformers.GPTQConfig(bits=4)
    with pytest.raises(ValueError, match="JlcmConfig but you are passing a GPTQConfig"):
        load(folder, quantization_config=config)


def test_state_dict_in_place_of_files(folder):
    with pytest.raises(ValueError, match="loaded from files, not from a state dict"):
        config = transformers.AutoConfig.from_pretrained(folder)
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_plain_models(tmp_path, model):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass it to jlcm.compress"):
        load(tmp_path, quantization_config=model.hf_quantizer.quantization_config)
    assert isinstance(model.hf_quantizer.quantization_config, JlcmConfig)
    for read in (jlcm.load, jlcm.footprint):
        with pytest.raises(jlcm.CheckpointError, match="has no quantization_config of jlcm"):
            read(tmp_path)
    plain = load(tmp_path)  # as if jlcm were not there
    assert torch.equal(logits(plain), logits(llama()))
    plain.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()
    with pytest.raises(ValueError, match="already compressed"):
        jlcm.compress(model, progress=False)
    plain.hf_quantizer = model.hf_quantizer
    with pytest.raises(ValueError, match="already quantised .jlcm.: start from the original"):
        jlcm.compress(plain, progress=False)


def test_parts_and_variants_are_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match="LlamaModel is a part of a packed model"):
        model.model.save_pretrained(tmp_path / "part")
    with pytest.raises(ValueError, match="no variants"):
        model.save_pretrained(tmp_path / "variant", variant="fp16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_new_models_of_a_packed_class_are_plain(model, tmp_path):
    llama().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is transformers.LlamaForCausalLM
    assert torch.equal(logits(again), logits(llama()))


def test_layers_that_are_not_there(tmp_path):
    path = jlcm.save(packed(gpt2()), tmp_path / "m")
    other = gpt2()
    other.transformer.h[0].mlp.c_fc = nn.Identity()
    with pytest.raises(jlcm.CheckpointError, match="mlp.c_fc is no Conv1D but Identity"):
        jlcm.load(path, model=other)


# Model cards -------------------------------------------------------------------------------------


def test_model_card(model, folder):
    card, size = (folder / "README.md").read_text(), jlcm.footprint(folder)
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- jlcm\n")
    for line in (
        "| method | jlcm, encoding multi_scale, initialised by random clustering |",
        "| goal alpha | 4 |",
        f"| {size.alpha_layers:.3f} |",
        f"| {size.alpha_total:.3f} |",
        f"| original at 16 bits | {model.compression.reference_bytes:,} bytes |",
        f"shards + model.safetensors.index.json | {size.file_bytes:,} bytes |",
        "import jlcm",
        'model = LlamaForCausalLM.from_pretrained("FOLDER")',
    ):
        assert line in card
    assert str(folder) not in card and "base_model" not in card


def test_model_card_names_the_original(tmp_path):
    original = llama()
    original.config.name_or_path = "somebody/tiny-llama"
    jlcm.quantize(original, "rtn", progress=False).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "\nbase_model: somebody/tiny-llama\nbase_model_relation: quantized\n" in card
    assert "# tiny-llama, packed by jlcm" in card and "| method | rtn |" in card
    # A packed model is no original, wherever it was loaded from.
    again = load(tmp_path)
    again.config.name_or_path = "somebody/packed-llama"
    again.save_pretrained(tmp_path)
    assert "base_model" not in (tmp_path / "README.md").read_text()


def test_cards_of_others_are_kept(model, tmp_path):
    card = tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    first = card.read_text()
    card.write_text(first.replace("| goal alpha | 4 |", "| goal alpha | 5 |"))
    model.save_pretrained(tmp_path)
    assert card.read_text() == first
    card.write_text("# My own\n")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "# My own\n"


def test_pipeline(folder):
    """Tools that take a model by its folder."""
    model = load(folder, device_map="cpu")
    assert model.device == torch.device("cpu") and model.is_quantized
    ids = tokens(1, 5)
    assert model.generate(ids, max_new_tokens=2, attention_mask=torch.ones_like(ids)).shape[1] <= 7

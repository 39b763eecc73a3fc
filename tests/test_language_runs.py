"""Whole runs on a tiny language model: compress, save, reload, evaluate, record."""

import random

import pytest
import torch
from hydra import compose
from omegaconf import OmegaConf
from tiny_language import WORDS, make_llama, make_tokenizer

import jlcm
from experiments.config import configurations, identity
from experiments.report import as_text
from experiments.runner import run

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its tokenizer and two texts."""
    path = tmp_path_factory.mktemp("language")
    make_llama().save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    for seed, name in enumerate(("evaluation.txt", "calibration.txt")):
        (path / name).write_text(" ".join(random.Random(seed).choices(WORDS, k=2000)))
    return path


def do(folder, *overrides):
    given = [
        "model=hf",
        f"model.name={folder / 'model'}",
        "data=commonsense",
        "data.tasks=[]",
        f"data.text={folder / 'evaluation.txt'}",
        f"data.calibration_text={folder / 'calibration.txt'}",
        "data.window=16",
        "data.calibration_length=16",
        "data.calibration_samples=24",
        "compute.threads=1",
        f"results_dir={folder / 'results'}",
        *overrides,
    ]
    with configurations():
        config = compose("config", overrides=given)
    place = folder / "results" / "runs" / "-".join(overrides).replace("/", "_")[-80:]
    return run(OmegaConf.to_object(config), run_id="tiny", identity=identity(config), folder=place)


METHODS = ("rtn", "squant", "powerquant", "redpp", "dfq", "rex", "lnq", "optq", "awq", "llm_int8")


@pytest.mark.parametrize("method", ["jlcm_init", "squeezellm", *METHODS])
def test_every_method_serves_language_models(folder, method):
    record = do(folder, f"method={method}", "alpha=4")
    assert record["packed"]["perplexity"] < 2 * record["original"]["perplexity"]
    assert 0 <= record["packed"]["kl"] < 1 and record["packed"]["tokens"] > 100
    # Embeddings stay in 16 bits; all linear layers of the decoder are packed.
    assert len(record["layers"]) == 7 * make_llama().config.num_hidden_layers
    assert not any("embed" in layer["name"] for layer in record["layers"])


def test_the_default_is_nearer_to_the_original_than_the_initialisation(folder):
    learned = do(folder, "alpha=7", "learn.distill.epochs=2")
    init = do(folder, "alpha=7", "method=jlcm_init")
    assert learned["packed"]["kl"] < init["packed"]["kl"]
    assert learned["footprint"]["alpha_layers"] == pytest.approx(7, rel=0.02)
    text = as_text(learned)
    assert "perplexity" in text and "top-1" not in text and "tokens" in text


def test_outliers_as_a_method(folder):
    record = do(folder, "method=jlcm_rex", "alpha=4", "learn=none")
    assert record["config"]["rex"]["outliers"] == "auto"
    assert "outliers" not in record["config"]["method"]
    assert record["footprint"]["outliers"] > 0


def test_compressed_embeddings_stay_tied(folder):
    record = do(folder, "method=jlcm_init", "alpha=4", "model.embeddings=compressed")
    names = [layer["name"] for layer in record["layers"]]
    assert "model.embed_tokens.weight" in names
    model = jlcm.load(record["file"])
    tied = model.config.tie_word_embeddings
    same = model.lm_head.packed["weight"] is model.model.embed_tokens.packed["weight"]
    assert same == tied
    with torch.no_grad():
        assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.embeddings=none"], "model.embeddings"),
        (["data.window=100000"], "reads at most"),
        (["encoding.first_last=int8"], "first_last"),
        (["model.name=/nowhere"], "/nowhere"),
        (["data.text=/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_input_is_refused(folder, overrides, message):
    with pytest.raises((ValueError, OSError), match=message):
        do(folder, "method=rtn", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=resnet18", "data=commonsense"], "commonsense is not for networks of images"),
        (["model=smollm2_135m", "data=digits"], "digits is not for language models: set data="),
    ],
)
def test_network_and_data_must_belong_together(overrides, message, tmp_path):
    with configurations():
        config = compose("config", overrides=overrides)
    with pytest.raises(ValueError, match=message):
        run(OmegaConf.to_object(config), run_id="x", identity={}, folder=tmp_path)


def test_footprint_of_llama_7b_needs_no_memory(tmp_path):
    with configurations():
        config = compose(
            "config",
            overrides=["task=footprint", "model=llama7b", "data=commonsense", "data.window=64"],
        )
    record = run(
        OmegaConf.to_object(config), run_id="x", identity=identity(config), folder=tmp_path
    )
    found = record["results"]["footprint"]
    # Llama's published 6,738,415,616 parameters, and 64 rotary frequencies twice, at 2 bytes.
    assert found["parameters"] == 6_738_415_616
    assert found["weight_bytes"] == 2 * (found["parameters"] + 128)
    # The widest moment is inside an MLP: what goes on, and three tensors of hidden units.
    assert found["activation_peak_bytes"] > 2 * 64 * (4096 + 3 * 11008)
    assert found["tokens"] == 64 and record["config"].keys() == {
        "task",
        "model",
        "data",
        "footprint",
    }


def test_times_of_a_language_model(folder):
    record = do(
        folder,
        "task=latency",
        "method=jlcm_init",
        "latency.rounds=1",
        "latency.repeats=1",
        "latency.batch_sizes=[1,2]",
        "compute.device=cpu",
    )
    found = record["results"]["latency"]["cpu"]
    assert found["outputs"]["disk_offload"] == 0 < found["outputs"]["packed"]
    assert all(line["ms"] > 0 for line in found["batch_2"].values())
    assert found["best_batch"]["packed"]["batch_size"] in (1, 2)
    assert record["config"]["data"] == {"kind": "commonsense", "window": 16}


def test_precision_of_language_models_is_refused(folder):
    with pytest.raises(ValueError, match="task=precision measures networks of images"):
        do(folder, "task=precision")

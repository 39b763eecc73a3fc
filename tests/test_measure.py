"""Measurements: records, identities, weights on disk, and how times become ratios."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize
from omegaconf import OmegaConf
from torch import nn

import jlcm
from experiments.config import LatencyConfig, identity, register, run_id
from experiments.data import load_data
from experiments.evaluate.latency import (
    Timing,
    Variant,
    best_batches,
    compare_outputs,
    summarise,
    time_in_turn,
)
from experiments.evaluate.offload import drop_page_cache, offloaded, read_from_disk
from experiments.measure import choose_devices
from experiments.models import load_network
from experiments.report import as_text
from experiments.runner import run
from experiments.tables.cells import tidy
from jlcm.layers import stored_tensors
from jlcm.packed import PackedWeight

register()

CPU = torch.device("cpu")
SMALL = ["model=timm", "model.name=test_byobnet", "init=kmeans", "alpha=5.33"]
needs_accelerate = pytest.mark.skipif(
    find_spec("accelerate") is None,
    reason="accelerate is not installed",
)


def composed(*overrides):
    with initialize(version_base="1.3", config_path="../conf"):
        return compose("config", overrides=list(overrides))


def measured(folder, *overrides):
    config = composed(*SMALL, f"results_dir={folder}", "compute.device=cpu", *overrides)
    arguments = {"run_id": run_id(config), "identity": identity(config)}
    return run(OmegaConf.to_object(config), **arguments, folder=folder / arguments["run_id"])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "measure-cache"
    monkeypatch.setenv("JLCM_CACHE", str(folder))


# Identities


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "resnet18-84cf22b372"),
        (["alpha=5.33", "learn=none"], "resnet18-c3fc7d2c3e"),
        (["method=rtn"], "resnet18-28982d53fc"),
        (["experiment=table4", "model=vit_b16", "learn=joint"], "vit_b_16-5af173dbc3"),
        (["experiment=table5_digits", "method=brecq"], "resnet18-c474ddf87a"),
        (["latency.rounds=2", "footprint.dtype=float32"], "resnet18-84cf22b372"),
    ],
)
def test_runs_that_compress_keep_their_names(overrides, expected):
    assert run_id(composed(*overrides)) == expected


@pytest.mark.parametrize("task", ["footprint", "latency", "precision"])
def test_measurement_is_identified_by_what_it_looks_at(task):
    config = composed(f"task={task}")

    def changes(option):
        return run_id(OmegaConf.merge(config, OmegaConf.from_dotlist([option]))) != run_id(config)

    assert changes("model.name=vit_b_16") and changes("data.image_size=64")
    assert not changes("compute.threads=1") and not changes("compute.device=cpu")
    assert changes("alpha=4") == changes("init.method=kmeans") == (task == "latency")
    assert changes("seed=1") == (task != "footprint")
    assert changes("data.limit=10") == (task == "precision")
    assert changes("latency.rounds=2") == (task == "latency")
    assert changes("footprint.batch_size=2") == (task == "footprint")
    assert not changes("learn.kind=none")
    assert changes("learn.rotation=null") == (task == "latency")
    assert identity(config)["task"] == task


@pytest.mark.parametrize("name", ["table1", "table2", "throughput", "table7"])
@pytest.mark.parametrize("scale", ["", "_digits"])
def test_experiments_measure(name, scale):
    config = composed(f"experiment={name}{scale}")
    tasks = {"table1": "footprint", "table7": "precision"}
    assert config.task == tasks.get(name, "latency")
    assert config.data.kind == ("digits" if scale else "image_folder")
    assert (max(config.latency.batch_sizes) > 1) == (name == "throughput")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=measure"], "footprint, latency, precision"),
        (["task=footprint", "footprint.dtype=int8"], "bfloat16"),
        (["task=footprint", "footprint.batch_size=0"], "at least 1"),
        (["task=latency", "latency.batch_sizes=[]"], "different sizes"),
        (["task=latency", "latency.batch_sizes=[2,2]"], "different sizes"),
        (["task=latency", "latency.rounds=0"], "latency.rounds=0"),
        (["task=latency", "alpha=0.5"], "must be above 1"),
        (["task=precision", "data=imagenet", "data.root=/nonexistent"], "/nonexistent"),
        (["task=footprint", "compute.device=tpu"], "auto, cpu, cuda"),
    ],
)
def test_bad_options_are_named_before_any_work(overrides, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        measured(tmp_path, *overrides)
    assert not list(tmp_path.iterdir())


@needs_accelerate
def test_methods_that_need_data_are_not_timed(tmp_path):
    with pytest.raises(ValueError, match="method=adaround"):
        measured(tmp_path, "task=latency", "method=adaround")


def test_missing_accelerate_is_said_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"pip install -c constraints.txt -e '\.\[latency\]'"):
        measured(tmp_path, "task=latency")


def test_auto_means_every_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_devices("auto") == [CPU, torch.device("cuda")]
    assert choose_devices("cuda") == [torch.device("cuda")] and choose_devices("cpu") == [CPU]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_devices("auto") == [CPU]


# Memory


def test_record_of_a_footprint(tmp_path):
    record = measured(tmp_path, "task=footprint", "footprint.batch_size=3")
    path = tmp_path / record["run_id"] / "record.json"
    assert record == json.loads(path.read_text())
    found = record["results"]["footprint"]
    network = load_network_of("footprint.batch_size=3")
    images = torch.zeros(3, 3, 32, 32)
    expected = jlcm.activation_footprint(network.module, images)
    assert found["weight_bytes"] == expected.weight_bytes
    assert found["activation_peak_bytes"] == expected.peak_bytes
    assert found["activation_eager_peak_bytes"] == expected.eager_peak_bytes
    assert found["activation_peak_measured_bytes"]["cpu"] >= expected.eager_peak_bytes
    assert found["total_bytes"] == expected.weight_bytes + expected.peak_bytes
    assert found["weights_percent"] + found["activations_percent"] == pytest.approx(100)
    assert found["activations_percent"] == pytest.approx(
        100 * expected.peak_bytes / found["total_bytes"]
    )
    assert sum(t["nbytes"] for t in found["peak"]["alive"]) == expected.peak_bytes
    assert (found["batch_size"], found["image_size"], found["dtype"]) == (3, 32, "float16")
    assert record["config"].keys() == {"task", "model", "data", "footprint"}
    assert record["machine"]["threads"] == torch.get_num_threads() and record["machine"]["cpu"]
    text = as_text(record)
    assert f"{expected.weight_bytes:,}" in text and f"{expected.peak_bytes:,}" in text
    assert set(tidy("table4_digits", [record])["status"]) == {"not run"}  # belongs to none
    path.write_text(json.dumps(record | {"notes": ["kept"]}))
    assert measured(tmp_path, "task=footprint", "footprint.batch_size=3")["notes"] == ["kept"]


def load_network_of(*overrides):
    config = OmegaConf.to_object(composed(*SMALL, *overrides))
    return load_network(config.model, config.data, seed=config.seed, device=CPU, trained=False)


@pytest.mark.parametrize("name", ["mobilenet_v2", "vit_b16"])
def test_random_networks_are_repeatable_and_of_order_one(name):
    config = OmegaConf.to_object(composed(f"model={name}"))

    def outputs(seed, dtype=torch.float32):
        network = load_network(config.model, config.data, seed=seed, device=CPU, trained=False)
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert not network.module.training and network.classes == 10
        with torch.inference_mode():
            return network.module.to(dtype)(images.to(dtype)).float()

    expected = outputs(0)
    assert 0.05 < expected.std() < 5
    assert torch.equal(outputs(0), expected)
    torch.testing.assert_close(outputs(0, torch.float16), expected, rtol=0.1, atol=0.1)
    assert not torch.allclose(outputs(1), expected, rtol=0.1, atol=0.1)


# Times


@needs_accelerate
def test_record_of_a_latency(tmp_path, monkeypatch):
    sizes = "latency.batch_sizes=[1,4]"
    options = ["task=latency", sizes, "latency.rounds=3", "latency.repeats=2"]
    record = measured(tmp_path, *options)
    found = record["results"]["latency"]
    cpu, path = found["cpu"], Path(record["file"])
    variants = {"fp32", "fp16", "bf16", "disk_offload", "disk_offload_cached", "packed"}
    for size in (1, 4):
        assert cpu[f"batch_{size}"].keys() == variants == cpu["outputs"].keys()
        for line in cpu[f"batch_{size}"].values():
            assert line["ms_quartiles"][0] <= line["ms"] <= line["ms_quartiles"][1]
            assert line["per_second"] == pytest.approx(1000 * size / line["ms"])
        assert cpu[f"batch_{size}"]["fp32"]["time_ratio"] == 1
    for name, best in cpu["best_batch"].items():
        every = [cpu[f"batch_{size}"][name]["per_second"] for size in (1, 4)]
        assert best["per_second"] == max(every) and best["batch_size"] in (1, 4)
        fp32 = cpu["best_batch"]["fp32"]["per_second"]
        assert best["throughput_ratio"] == pytest.approx(best["per_second"] / fp32)
    assert cpu["reference"] == "fp32" and "cuda" not in found
    assert cpu["outputs"]["disk_offload"] == cpu["outputs"]["disk_offload_cached"] == 0
    assert 0 < cpu["outputs"]["fp16"] < cpu["outputs"]["bf16"] < 0.1
    # What was timed is the file of the record: rotated rows, as by default.
    stored = [held for _, held in stored_tensors(jlcm.load(path))]
    weights = [held for held in stored if isinstance(held, PackedWeight)]
    assert weights and all(held.rotated for held in weights)
    assert found["packed_file"] == jlcm.footprint(path).as_dict()
    assert found["packed_file"]["alpha_layers"] >= 5.33
    network = load_network_of().module
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))[:1]
    with torch.inference_mode():
        expected = network(images).double()
        distance = (jlcm.load(path)(images).double() - expected).norm() / expected.norm()
    assert cpu["outputs"]["packed"] == pytest.approx(distance.item(), rel=1e-4)
    tensors = sum(t.nbytes for t in network.state_dict().values())
    assert cpu["disk"]["weight_bytes"] == tensors <= cpu["disk"]["bytes"]
    assert {p.name for p in path.parent.iterdir()} == {"record.json", path.name}
    assert "disk_offload_cached" in as_text(record)
    assert record["versions"]["accelerate"][0].isdigit()
    monkeypatch.setitem(sys.modules, "accelerate", None)  # a finished run does not need it
    assert measured(tmp_path, *options) == record


@pytest.mark.gpu
@needs_accelerate
def test_record_of_a_latency_on_a_gpu(tmp_path):
    options = ["task=latency", "compute.device=auto", "latency.rounds=2"]
    found = measured(tmp_path, *options)["results"]["latency"]
    assert found["cuda"]["reference"] == "fp16" and found["cpu"]["reference"] == "fp32"
    assert found["cuda"]["outputs"]["disk_offload"] == 0
    assert found["cuda"]["batch_1"]["fp16"]["time_ratio"] == 1


class Recorded(nn.Module):
    """Writes down that it runs."""

    def __init__(self, name, events):
        super().__init__()
        self.name, self.events = name, events

    def forward(self, x):
        self.events.append((self.name, x.dtype))
        return x


def test_variants_take_turns_and_are_prepared_before_each_timed_forward():
    events = []
    variants = {
        "a": Variant(module=Recorded("a", events), dtype=torch.float32),
        "b": Variant(
            module=Recorded("b", events),
            dtype=torch.float16,
            prepare=lambda: events.append("prepare"),
        ),
    }
    options = LatencyConfig(rounds=3, repeats=2)
    timings = time_in_turn(variants, torch.zeros(1), options, CPU)
    a, b = ("a", torch.float32), ("b", torch.float16)
    warm = [a, a, a, b, "prepare", b, "prepare", b]  # the first forward of each is not timed
    assert events == warm * 3
    assert [len(t.ms) for t in timings["a"] + timings["b"]] == [2] * 6


def test_ratios_are_those_of_a_round():
    # The machine slows down threefold; the ratio is 2 in each round.
    timings = {
        "fp32": [Timing(ms=[1.0 * slow] * 3, read=[None] * 3) for slow in (1, 2, 3)],
        "disk_offload": [Timing(ms=[2.0 * slow] * 3, read=[8, 10, 12]) for slow in (1, 2, 3)],
    }
    found = summarise(timings, "fp32", 4)
    assert found["disk_offload"]["time_ratio"] == 2 and found["fp32"]["time_ratio"] == 1
    assert found["disk_offload"]["ms"] == 4 and found["disk_offload"]["per_second"] == 1000
    assert found["disk_offload"]["read_bytes"] == 10 and "read_bytes" not in found["fp32"]
    assert found["fp32"]["ms_quartiles"] == [1, 3]


def test_each_variant_has_its_own_best_batch():
    results = {
        "reference": "fp32",
        "batch_1": {"fp32": {"ms": 1, "per_second": 1000}, "packed": {"ms": 9, "per_second": 111}},
        "batch_8": {"fp32": {"ms": 9, "per_second": 888}, "packed": {"ms": 16, "per_second": 500}},
    }
    best = best_batches(results, "fp32")
    assert best["fp32"] == {
        "batch_size": 1, "ms": 1, "per_second": 1000, "throughput_ratio": 1,
    }  # fmt: skip
    assert best["packed"]["batch_size"] == 8 and best["packed"]["throughput_ratio"] == 0.5


# Weights on disk


def files_of(folder):
    return {path.stem: path.stat().st_size for path in folder.glob("*.dat")}


@needs_accelerate
@pytest.mark.parametrize("name", ["cnn", "vit", "mlp"])
@pytest.mark.parametrize("part", [0.1, 0.9, 1])
def test_weights_on_disk_give_the_same_outputs(name, part, networks, tmp_path):
    model, inputs = networks[name]
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    copy = offloaded(model, tmp_path / "w", device=CPU, memory_limit=int(part * weights))
    with torch.inference_mode():
        expected = model(inputs)
        for _ in range(2):
            assert torch.equal(copy(inputs), expected)
    files = files_of(tmp_path / "w")
    on_disk = {name for name, parameter in copy.named_parameters() if parameter.is_meta}
    assert on_disk and on_disk <= files.keys()
    if part != 0.9:  # all would fit, or nothing does
        assert files.keys() == model.state_dict().keys()
    else:
        kept = [n for n, _ in model.named_parameters() if n not in on_disk]
        assert kept and sum(model.get_parameter(n).nbytes for n in kept) <= part * weights
    assert not any(parameter.is_meta for parameter in model.parameters())


@needs_accelerate
@pytest.mark.skipif(read_from_disk() is None, reason="the system does not count reads")
def test_dropped_files_are_read_from_the_disk_again(tmp_path):
    layer = nn.Linear(1000, 1000)
    copy = offloaded(layer, tmp_path / "w", device=CPU, memory_limit=10**9)
    inputs = torch.zeros(1, 1000)

    def reads():
        before = read_from_disk()
        with torch.inference_mode():
            copy(inputs)
        return read_from_disk() - before

    drop_page_cache(tmp_path / "w")
    first = reads()
    if not first:
        pytest.skip("the folder of temporary files lies in memory")
    assert first >= sum(files_of(tmp_path / "w").values())
    assert reads() == 0
    drop_page_cache(tmp_path / "w")
    assert reads() == pytest.approx(first, rel=0.1)


def test_outputs_are_compared_with_the_reference():
    variants = {
        "fp32": Variant(module=lambda x: x, dtype=torch.float32),
        "packed": Variant(module=lambda x: 1.5 * x, dtype=torch.float16),
    }
    assert compare_outputs(variants, torch.ones(1, 4), "fp32") == {"fp32": 0, "packed": 0.5}


# Precision


def test_record_of_a_precision(tmp_path):
    record = measured(tmp_path, "task=precision", "data.epochs=2")
    found = record["results"]["precision"]
    assert found.keys() == {"float32", "float16", "bfloat16"}
    assert all(line["samples"] == 360 for line in found.values())
    assert "kl" not in found["float32"]
    assert 0 <= found["float16"]["kl"] < found["bfloat16"]["kl"] < 0.1
    same = found["float16"]["agreement"]
    assert abs(found["float16"]["top1"] - found["float32"]["top1"]) <= 100 - same < 5
    config = OmegaConf.to_object(composed(*SMALL, "data.epochs=2"))
    network = load_network(config.model, config.data, seed=0, device=CPU)
    test = load_data(config.data, network.preprocessing, classes=10, seed=0).test
    right = [network.module(image[None]).argmax(1).item() == label for image, label in test]
    assert found["float32"]["top1"] == pytest.approx(100 * sum(right) / len(right))
    assert f"{found['float32']['top1']:.2f}" in as_text(record)

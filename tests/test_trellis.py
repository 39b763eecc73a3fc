"""Codes with memory: the index, optimal paths, what they gain, and all that is done with them."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import jlcm
from jlcm.budget import Allocation, bytes_of, memory_of
from jlcm.clustering import scalar
from jlcm.config import Encoding, Init, Invalid
from jlcm.encode import encode
from jlcm.layers import stored_tensors
from jlcm.learning.factors import Factors, pack_factors, unpack_factors
from jlcm.learning.objective import Moments, quadratic
from jlcm.learning.solver import coordinate_descent, feedback_rounding, improve, start
from jlcm.packed import PackedWeight
from jlcm.packing import packed_bytes
from jlcm.trellis import best_path, best_path_of_tensors, cluster, index_of, quantise
from jlcm.trellis_kernel import best_path_on_cpu, decode_on_cpu


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def index_in_words(codes, bits, memory):
    """The definition: the row as one string of bits, of which each index is a substring."""
    rows = []
    for row in codes.tolist():
        text = "0" * memory + "".join(f"{code:0{bits}b}" for code in row)
        rows.append([int(text[i * bits : (i + 1) * bits + memory], 2) for i in range(len(row))])
    return torch.tensor(rows)


@given(st.integers(1, 5), st.integers(0, 7), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None)
def test_index_is_a_window_of_the_codes_bits(bits, memory, n, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, n), generator=generator).to(torch.uint8)
    assert torch.equal(index_of(codes, bits, memory).long(), index_in_words(codes, bits, memory))


@given(
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 60),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_compiled_decoding_is_that_of_tensors(bits, memory, rows, columns, groups, seed):
    generator, count = torch.Generator().manual_seed(seed), rows * columns
    groups = min(groups, count)
    stored = PackedWeight.encode(
        torch.randint(0, 2**bits, (count,), generator=generator),
        random(1, 2 ** (bits + memory), seed=seed),
        shape=(rows, columns),
        bits=bits,
        memory=memory,
        scales=random(groups, seed=seed) if groups else None,
    )
    expected, scales = stored.codeword_per_weight(), torch.ones(1)
    if groups:
        expected, scales = expected * stored.scale_per_weight(), stored.scales.float()
    codebook = stored.codebooks.float().view(-1)
    found = decode_on_cpu(stored.codes, codebook, scales, rows=rows, count=count, bits=bits)
    assert torch.equal(found, expected) and torch.equal(stored().flatten(), expected)


@pytest.mark.parametrize(("bits", "memory"), [(1, 3), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("bound", ["free", "before", "after", "both"])
@pytest.mark.parametrize("search", [best_path_on_cpu, best_path_of_tensors])
def test_paths_are_the_best_of_all(bits, memory, bound, search):
    n, count = 5, 7
    values, codebook = random(n, count), random(2 ** (bits + memory), seed=1)
    weights = random(n, count, seed=2).square()
    generator = torch.Generator().manual_seed(3)
    before = torch.randint(0, len(codebook), (count,), generator=generator)
    after = torch.randint(0, 2**bits, (2, count), generator=generator)
    before = before if bound in ("before", "both") else None
    after = after if bound in ("after", "both") else None
    found = search(values, codebook, memory, weights, before, after)

    every = torch.tensor(list(itertools.product(range(2**bits), repeat=n)))
    for sequence in range(count):
        head = 0 if before is None else int(before[sequence])
        index = torch.zeros_like(every)
        last = torch.full((len(every),), head)
        for t in range(n):
            last = (last % 2**memory) * 2**bits + every[:, t]
            index[:, t] = last
        cost = ((codebook[index] - values[:, sequence]).square() * weights[:, sequence]).sum(1)
        if after is not None:
            cost[(every[:, -2:] != after[:, sequence]).any(1)] = float("inf")
        path = found[:, sequence]
        own = ((codebook[path] - values[:, sequence]).square() * weights[:, sequence]).sum()
        assert torch.equal(path, index[cost.argmin()]) or float(own) == pytest.approx(
            float(cost.min()), rel=1e-5
        )


@pytest.mark.parametrize("count", [1, 600, 1500])
def test_paths_are_the_same_in_several_threads(count):
    values, codebook, weights = random(20, count), random(256, seed=1), random(20, count).square()
    threads, paths = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            paths.append(best_path(values, codebook, memory=5, weights=weights))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(path, paths[0]) for path in paths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_paths_on_a_gpu():
    given_ = random(40, 700), random(256, seed=1), random(40, 700, seed=2).square()
    errors = []
    for device in ("cpu", "cuda"):
        values, codebook, weights = (part.to(device) for part in given_)
        path = best_path(values, codebook, memory=5, weights=weights)
        errors.append(float(((codebook[path] - values).square() * weights).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)


def test_rows_in_parts_are_nearly_as_good_as_whole():
    values, codebook = random(200, 20), random(256, seed=1)
    whole = best_path(values, codebook, memory=5)
    parts = quantise(values, codebook, 5, None)
    assert torch.equal(
        index_of((parts % 8).T.to(torch.uint8), 3, 5).T.long(), parts
    )  # codes can write it
    errors = [(codebook[path] - values).square().mean() for path in (whole, parts)]
    assert errors[0] <= errors[1] < 1.001 * errors[0]


def clustering_error(values, bits):
    codebook, codes = cluster(values, None, bits=bits, memory=8 - bits, seed=0)
    index = index_of(codes, bits, 8 - bits).long()
    return float((codebook[0][index] - values).square().mean())


@pytest.mark.parametrize(
    ("bits", "lloyd_max", "share"),
    [(1, 0.3634, 0.82), (2, 0.1175, 0.70), (3, 0.03454, 0.65), (4, 0.009497, 0.65)],
)
def test_normal_values_are_served_better_than_by_any_scalar_codebook(bits, lloyd_max, share):
    """Errors of optimal scalar quantisers: Max, "Quantizing for minimum distortion", 1960."""
    error = clustering_error(random(300, 256), bits)
    assert 4.0**-bits < error < share * lloyd_max  # the rate-distortion bound is 4**-bits


@pytest.mark.parametrize(("power", "share"), [(3, 0.5), (0.5, 0.96)], ids=["heavy", "light"])
def test_other_distributions_are_too(power, share):
    values = random(300, 256)
    values = values.sign() * values.abs() ** power
    codebook, codes = scalar.cluster(values.view(-1), k=4, method="kmeans")
    optimum = (codebook[0][codes.long()] - values.view(-1)).square().mean()
    assert clustering_error(values, 2) < share * optimum


def test_importance_counts():
    values, importance = random(300, 64), random(300, 64, seed=1).square()
    errors = []
    for given_ in (None, importance):
        codebook, codes = cluster(values, given_, bits=2, memory=6, seed=0)
        missed = (codebook[0][index_of(codes, 2, 6).long()] - values).square()
        errors.append(float((missed * importance).sum()))
    assert errors[1] < 0.8 * errors[0]


def plan(rows, columns, bits, spare=2000):
    size = packed_bytes(rows * columns, bits)
    return Allocation(rows=rows, columns=columns, bits=bits, nbytes=size + spare)


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "memory"),
    [
        (512, 512, 3, 5),
        (512, 512, 8, 0),
        (64, 192, 3, 2),
        (64, 64, 3, 0),
        (8, 8, 3, 0),
        (4096, 9, 3, 0),
    ],
)
def test_memory_is_what_the_bytes_can_pay_for(rows, columns, bits, memory):
    allocation = plan(rows, columns, bits)
    assert memory_of("trellis", allocation) == memory
    assert memory_of("multi_scale", allocation) == 0
    book = bytes_of("trellis", 1, 0, allocation)
    assert book == 2 * 2 ** (bits + memory)
    if memory:
        assert book <= packed_bytes(rows * columns, bits) / 64


def test_encoded_weight_keeps_to_its_bytes_and_orders():
    weight = random(128, 192)
    allocation = plan(128, 192, 3, spare=300)
    errors = {}
    for kind in ("multi_scale", "trellis"):
        packed = encode(weight, allocation, Encoding(kind=kind), Init(), always_store_order=True)
        assert packed.order is not None and sum(packed.sizes().values()) <= allocation.nbytes
        errors[kind] = float((packed() - weight).square().sum())
        # What is unpacked is what is decoded.
        factors = unpack_factors(packed, 1)
        assert torch.equal(factors.weight()[0], packed())
        assert factors.memory == packed.memory == (3 if kind == "trellis" else 0)
    assert errors["trellis"] < 0.9 * errors["multi_scale"]


def test_parts_that_do_not_fit():
    packed = encode(random(64, 192), plan(64, 192, 3), Encoding(kind="trellis"), Init())
    parts = {"codes": packed.codes, "codebooks": packed.codebooks, "scales": packed.scales}
    for memory in (-1, 0, 3):
        with pytest.raises(ValueError, match="codewords|memory"):
            PackedWeight(shape=(64, 192), bits=3, memory=memory, **parts)


# Learning ----------------------------------------------------------------------------------------


def problem_of(rows=24, n=96, groups=1, seed=0):
    # A few directions of much energy, spread over all columns as a rotation does.
    x = random(groups, n, 4 * n, seed=seed)
    x = x + random(1, n, 8, seed=9) @ random(groups, 8, 4 * n, seed=seed + 2) / 3
    weight = random(groups, rows, n, seed=seed + 1)
    moments = Moments.zeros(groups, rows, n, torch.device("cpu"))
    moments.add(x, weight @ x)
    return quadratic(moments, centred=False).damped(weight, 0.01), weight


def factors_of(weight, bits=2, memory=4, seed=0):
    groups, rows, n = weight.shape
    scales = 0.5 + torch.rand(groups * rows, generator=torch.Generator().manual_seed(seed))
    codebook, _ = cluster(weight.flatten(0, 1), None, bits=bits, memory=memory, seed=seed)
    place = torch.arange(groups * rows).view(groups, rows, 1).expand(weight.shape)
    codes = torch.randint(0, 2**bits, (groups * rows, n))
    return Factors(
        codes=index_of(codes.to(torch.uint8), bits, memory).long().view(weight.shape),
        codebooks=codebook,
        book=None,
        scales=scales,
        scale=place,
        row_scale=None,
        memory=memory,
    )


def can_be_written(factors, bits=2):
    index = factors.codes.flatten(0, 1)
    return torch.equal(
        index_of((index % 2**bits).to(torch.uint8), bits, factors.memory).long(), index
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_solver_lowers_the_loss_of_each_row(groups):
    problem, weight = problem_of(groups=groups)
    factors = factors_of(weight)

    def losses(found):
        difference = found.weight() - weight
        return ((difference @ problem.gram) * difference).sum(-1)

    plain = replace(
        factors,
        codes=quantise(
            (weight / factors.multiplier()).permute(2, 0, 1).flatten(1).contiguous(),
            factors.codebooks[0],
            factors.memory,
            None,
        ).T.reshape(weight.shape),
    )
    rounded = feedback_rounding(problem, weight, factors)
    assert can_be_written(plain) and can_be_written(rounded)
    assert losses(rounded).sum() < 0.98 * losses(plain).sum()
    found = rounded
    for sweeps in (1, 2, 3):
        better = coordinate_descent(problem, found, sweeps)
        assert can_be_written(better)
        assert (losses(better) <= losses(found) * (1 + 1e-5)).all()
        found = better
    assert losses(found).sum() < 0.97 * losses(rounded).sum()


def test_descent_reaches_the_best_of_all_codes_where_errors_are_independent():
    weight = random(1, 30, 6, seed=4)
    problem, _ = problem_of(rows=30, n=6)
    problem = replace(problem, gram=torch.eye(6)[None], cross=weight)
    factors = factors_of(weight, bits=2, memory=2)
    found = coordinate_descent(problem, factors, 1)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)))
    candidates = factors.codebooks[0][index_of(every.to(torch.uint8), 2, 2).long()]
    scaled = weight[0] / factors.multiplier()[0]
    least = (candidates[:, None] - scaled).square().sum(-1).min(0).values
    own = (found.codewords()[0] - scaled).square().sum(-1)
    torch.testing.assert_close(own, least)


@pytest.mark.parametrize("row_scale", [False, True])
def test_less_loss_than_without_memory_at_the_same_bits(row_scale):
    problem, weight = problem_of(rows=128, n=384)
    losses = {}
    for kind in ("multi_scale", "trellis"):
        allocation = plan(128, 384, 3, spare=700)
        packed = encode(weight[0], allocation, Encoding(kind=kind), Init())
        factors = start(problem, weight, unpack_factors(packed, 1), row_scale=row_scale)
        factors, curve = improve(problem, factors, rounds=2, sweeps=2)
        losses[kind] = float(problem.loss(factors.weight()))
        assert losses[kind] <= 1.01 * min(curve)
        if not row_scale:
            for name, value in pack_factors(packed, factors).items():
                getattr(packed, name).copy_(value)
            torch.testing.assert_close(packed(), factors.weight()[0], rtol=0, atol=0)
    assert losses["trellis"] < 0.93 * losses["multi_scale"]


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(48, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    return model.eval().requires_grad_(False)


def test_all_stages_and_the_file(tmp_path):
    model, inputs, other = network(), random(400, 48), random(400, 48, seed=1)
    options = {"alpha": 5.33, "rotation": "hadamard", "progress": False, "calibration": inputs}
    stages = {
        "learn": jlcm.Learn(statistics="none"),
        "distill": jlcm.Distill(epochs=2, flip=False, precision="fp32"),
        "allocation": "auto",
    }
    errors = {}
    for kind, given_ in (("multi_scale", stages), ("trellis", {}), ("trellis", stages)):
        packed = jlcm.compress(model, encoding=kind, **options, **given_)
        errors[kind, bool(given_)] = float((packed(other) - model(other)).square().mean())
        assert jlcm.footprint(packed).alpha_layers >= 5.33
    assert errors["trellis", True] < errors["multi_scale", True]
    assert errors["trellis", True] < 0.7 * errors["trellis", False]
    assert any(held.memory for _, held in stored_tensors(packed) if isinstance(held, PackedWeight))
    path = jlcm.save(packed, tmp_path / "packed.safetensors")
    again = jlcm.load(path, model=copy.deepcopy(model))
    assert torch.equal(again(other), packed(other))
    assert jlcm.footprint(path).file_bytes == path.stat().st_size
    assert jlcm.footprint(path).codebooks == jlcm.footprint(packed).codebooks


@pytest.mark.parametrize("rounds", [None, 3])
def test_one_round_suffices_where_there_is_memory(rounds):
    learn = jlcm.Learn(statistics="none", rounds=rounds)
    options = {"alpha": 5.33, "encoding": "trellis", "progress": False}
    packed = jlcm.compress(network(), learn=learn, calibration=random(100, 48), **options)
    memory = {name: getattr(held, "memory", 0) for name, held in stored_tensors(packed)}
    assert min(memory[result.name] for result in packed.learning) == 0  # too small for any
    assert max(memory[result.name] for result in packed.learning) > 0
    for result in packed.learning:
        assert len(result.curve) == (rounds or (1 if memory[result.name] else 2))


def test_outliers_on_top(tmp_path):
    model, inputs = network(), random(100, 48)
    packed = jlcm.compress(model, alpha=3.9, encoding="trellis", outliers=0.05, progress=False)
    footprint = jlcm.footprint(packed)
    assert footprint.outliers > 0 and footprint.alpha_layers >= 3.9
    path = jlcm.save(packed, tmp_path / "packed.safetensors")
    again = jlcm.load(path, model=copy.deepcopy(model))
    assert torch.equal(again(inputs), packed(inputs))


def test_distillation_moves_codewords_and_no_codes():
    model, inputs = network(), random(200, 48)
    packed = jlcm.compress(model, alpha=5.33, encoding="trellis", progress=False)
    before = {n: h for n, h in copy.deepcopy(packed).named_buffers()}
    options = jlcm.Distill(epochs=1, flip=False, lr=0.01, precision="fp32")
    jlcm.learning.distill.distill(packed, model, inputs, options=options, progress=False)
    changed = {n for n, h in packed.named_buffers() if not torch.equal(h, before[n])}
    assert "0.packed.weight.codebooks" in changed
    assert not any(name.endswith("codes") for name in changed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learn": jlcm.Learn(kind="proximal")}, "learn=proximal moves codes one by one"),
        ({"blocks": jlcm.Blocks(lr_codes=0.1)}, "blocks with lr_codes=0.1 moves codes"),
        ({"distill": jlcm.Distill(lr_codes=0.1)}, "distill with lr_codes=0.1 moves codes"),
    ],
)
def test_stages_that_move_codes_one_by_one_are_refused(options, said):
    with pytest.raises(Invalid, match=said):
        jlcm.compress(network(), encoding="trellis", calibration=random(9, 48), **options)

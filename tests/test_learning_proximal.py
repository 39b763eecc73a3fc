"""The custom backward against its formula, and the paper's own example of Section 3.4."""

import math

import pytest
import torch

from jlcm.config import Invalid
from jlcm.learning.factors import Factors
from jlcm.learning.objective import Moments, quadratic
from jlcm.learning.options import Learn
from jlcm.learning.proximal import (
    Adam,
    AssignCodewords,
    Samples,
    initial_logits,
    learn_by_gradient,
    proximal_direction,
    sharpness,
)
from jlcm.learning.solver import nearest_codes

#: The codebook of the paper's example; its "-0.09" must be 0.09 for 0.12 to be mapped to it.
EXAMPLE = torch.tensor([[-1.23, 0.09, 0.17, 0.96]])
AS_PRINTED = torch.tensor([[-1.23, -0.09, 0.17, 0.96]])


def gradients(logits, codebooks, book, upstream, kind="proximal", forward="hard", **settings):
    logits, codebooks = logits.clone().requires_grad_(), codebooks.clone().requires_grad_()
    sign, distance = settings.get("sign", "corrected"), settings.get("distance", "relative")
    out, _ = AssignCodewords.apply(logits, codebooks, book, kind, forward, sign, distance)
    out.backward(upstream)
    return out.detach(), logits.grad, codebooks.grad


def random_case(books):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4, generator=generator)
    codebooks = torch.randn(books, 4, generator=generator).sort(1).values
    book = torch.randint(books, (20,), generator=generator) if books > 1 else None
    return logits, codebooks, book, torch.randn(20, generator=generator)


@pytest.mark.parametrize("sign", ["corrected", "printed"])
@pytest.mark.parametrize("distance", ["raw", "relative", "rank"])
@pytest.mark.parametrize("books", [1, 3])
def test_backward_is_equation_9(sign, distance, books):
    logits, codebooks, book, upstream = random_case(books)
    out, to_logits, to_codebooks = gradients(
        logits, codebooks, book, upstream, sign=sign, distance=distance
    )
    expected_codebooks = torch.zeros_like(codebooks)
    for i in range(20):
        b = 0 if book is None else int(book[i])
        values = [float(v) for v in codebooks[b]]
        a = max(range(4), key=lambda j: float(logits[i, j]))
        assert out[i] == codebooks[b, a]
        expected_codebooks[b, a] += upstream[i]
        gap = (values[-1] - values[0]) / 3
        for j in range(4):
            apart = abs(values[j] - values[a])
            unit = {"raw": apart, "relative": apart / gap, "rank": abs(j - a)}[distance]
            towards = (values[j] > values[a]) - (values[j] < values[a])
            d = (towards if sign == "corrected" else -towards) / (1 + unit)
            assert float(to_logits[i, j]) == pytest.approx(float(upstream[i]) * d, abs=1e-6)
    torch.testing.assert_close(to_codebooks, expected_codebooks)


@pytest.mark.parametrize("books", [1, 3])
def test_soft_joint_backward_is_the_chain_rule(books):
    logits, codebooks, book, upstream = random_case(books)
    out, to_logits, to_codebooks = gradients(
        logits, codebooks, book, upstream, kind="joint", forward="soft"
    )
    a, c = logits.clone().requires_grad_(), codebooks.clone().requires_grad_()
    plain = (a.softmax(1) * (c.expand(20, 4) if book is None else c[book])).sum(1)
    plain.backward(upstream)
    torch.testing.assert_close(out, plain.detach())
    torch.testing.assert_close(to_logits, a.grad)
    torch.testing.assert_close(to_codebooks, c.grad)


@pytest.mark.parametrize("codebook", [EXAMPLE, AS_PRINTED])
def test_paper_example_corrected_sign_descends_and_printed_sign_ascends(codebook):
    # A weight of 0.12 on the second codeword whose loss falls as it grows (negative gradient).
    start = torch.tensor([[-9.0, 1.0, 0.9, -9.0]])
    assert codebook[0, start.argmax()] == codebook[0, 1]
    target, moved = 0.17, {}
    for sign in ("corrected", "printed"):
        logits = start.clone()
        for _ in range(50):
            value = codebook[0, logits.argmax()]
            _, gradient, _ = gradients(
                logits, codebook, None, 2 * (value - target)[None], sign=sign, distance="raw"
            )
            logits = logits - 0.1 * gradient
        moved[sign] = float((codebook[0, logits.argmax()] - target).square())
    before = float((codebook[0, 1] - target) ** 2)
    assert moved["corrected"] == 0.0
    assert moved["printed"] >= before


def test_paper_example_chain_rule_favours_the_far_codeword_and_proximal_the_near_one():
    logits = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    upstream = torch.tensor([-1.0])
    _, chain, _ = gradients(logits, EXAMPLE, None, upstream, kind="joint")
    _, proximal, _ = gradients(logits, EXAMPLE, None, upstream)
    assert int((-chain).argmax()) == 3
    assert int((-proximal).argmax()) == 2


def test_printed_and_corrected_differ_in_sign_only_and_vanish_at_the_codeword():
    codebooks, chosen = EXAMPLE.expand(4, 4), torch.arange(4)
    for distance in ("raw", "relative", "rank"):
        right = proximal_direction(codebooks, chosen, sign="corrected", distance=distance)
        wrong = proximal_direction(codebooks, chosen, sign="printed", distance=distance)
        assert torch.equal(right, -wrong)
        assert torch.equal(right.diagonal(), torch.zeros(4))
        # Decreasing in the distance on either side.
        assert right[0, 1] > right[0, 2] > right[0, 3] > 0
        assert right[3, 2] < right[3, 1] < right[3, 0] < 0


def test_initial_logits_give_the_codes_and_probability_095_on_a_codeword():
    codebook = torch.tensor([[-1.0, 0.0, 1.0]])
    codes = torch.tensor([1, 0, 2, 1])
    values = torch.tensor([0.0, -0.4, 5.0, 0.3])  # the second one's nearest is another codeword
    logits = initial_logits(values, codebook, None, codes)
    assert torch.equal(logits.argmax(1), codes)
    assert float(logits.softmax(1)[0, 1]) == pytest.approx(0.95, abs=1e-3)
    assert float(logits.softmax(1)[3, 2]) > 0.1


def test_sharpness_is_zero_for_hard_and_positive_for_soft_mappings():
    hard = torch.tensor([[50.0, -50.0, -50.0]])
    assert float(sharpness(hard, 2.0)) == pytest.approx(0.0, abs=1e-6)
    third = 3 * (1 - (1 / 3) ** 2)
    assert float(sharpness(torch.zeros(5, 3), 2.0)) == pytest.approx(third, rel=1e-5)


def test_per_element_adam_equals_torch_and_cancels_a_factor_that_shared_keeps():
    torch.manual_seed(0)
    start, factor = torch.randn(6, 4), torch.tensor([1.0, 0.1, 0.5, 0.01])
    ours, theirs, shared = (start.clone().requires_grad_() for _ in range(3))
    a = Adam(ours, 0.01, shared=False)
    b = torch.optim.Adam([theirs], lr=0.01)
    c = Adam(shared, 0.01, shared=True)
    for _ in range(5):
        gradient = torch.randn(6, 1) * factor
        ours.grad, theirs.grad, shared.grad = gradient.clone(), gradient.clone(), gradient.clone()
        for optimizer in (a, b, c):
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    plain, kept = (ours - start).abs().mean(0), (shared - start).abs().mean(0)
    assert plain.max() / plain.min() < 1.01
    torch.testing.assert_close(kept / kept[0], factor, rtol=1e-3, atol=1e-4)


def learn(kind, activation=False, **options):
    torch.manual_seed(0)
    x = torch.randn(1, 12, 900)
    x[:, 1:] += 0.8 * x[:, :-1]
    w = torch.randn(1, 10, 12)
    y = w @ x
    device = torch.device("cpu")
    train, held = Moments.zeros(1, 10, 12, device), Moments.zeros(1, 10, 12, device)
    train.add(x[..., :700], y[..., :700])
    held.add(x[..., 700:], y[..., 700:])
    problem, held = quadratic(train, centred=False), quadratic(held, centred=False)
    factors = Factors(
        torch.zeros(1, 10, 12, dtype=torch.int64), torch.tensor([[-1.5, -0.4, 0.4, 1.5]]),
        None, None, None, None,
    )  # fmt: skip
    factors = Factors(nearest_codes(factors, w), factors.codebooks, None, None, None, None)
    samples = None
    if activation:
        ones = torch.ones(1, 10)
        samples = Samples(x, y.relu(), ones, 0 * ones, torch.relu)
    options = Learn(kind=kind, polish=0, **{"iterations": 300, "patience": 300} | options)
    found, curve = learn_by_gradient(
        problem,
        factors,
        w,
        held=held,
        damped=problem.damped(w, 0.01),
        samples=samples,
        options=options,
        seed=0,
    )
    loss, before = problem.loss(found.weight()), problem.loss(factors.weight())
    return float(loss), float(before), factors, found, curve


def test_learning_the_mapping_beats_the_codebook_alone_and_codebook_keeps_the_mapping():
    codebook, before, given, found, _ = learn("codebook")
    assert codebook < before
    assert torch.equal(found.codes, given.codes)
    proximal, *_ = learn("proximal")
    assert proximal < codebook
    joint, *_ = learn("joint")
    assert joint < codebook


def test_printed_sign_without_keeping_the_best_is_worse_than_the_start():
    options = {"final_least_squares": False, "keep_best": False}
    printed, before, *_ = learn("proximal", sign="printed", **options)
    assert printed > before


@pytest.mark.parametrize(
    "options",
    [
        {"forward": "soft"},
        {"second_moment": "per_element"},
        {"distance": "raw"},
        {"distance": "rank"},
        {"activation": True},
        {"activation": True, "forward": "soft"},
        {"lambda_": 1.0},
    ],
)
def test_every_option_ends_no_worse_than_its_start(options):
    loss, before, _, found, curve = learn("proximal", **options)
    assert loss <= before
    assert all(math.isfinite(value) for value in curve)
    assert torch.equal(found.codebooks, found.codebooks.half().float())


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "proxy"},
        {"sign": "plus"},
        {"distance": "far"},
        {"forward": "firm"},
        {"second_moment": "own"},
        {"statistics": "median"},
        {"start": "random"},
        {"held_out": 0.0},
        {"warmup": 1.0},
        {"iterations": 0},
        {"lr": -1.0},
        {"rounds": -1},
        {"damping": ()},
        {"correction": 1.5},
        {"beta": (20.0,)},
    ],
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(Invalid, match="learn" if "kind" in wrong else next(iter(wrong))):
        Learn(**wrong)

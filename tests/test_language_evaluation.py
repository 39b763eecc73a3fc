"""Perplexity and distance of language models against sums over the whole vocabulary."""

import math

import pytest
import torch
from tiny_language import make_llama

from experiments.evaluate import language
from experiments.evaluate.language import perplexity_and_kl

pytest.importorskip("transformers")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(15, (3, 20), generator=torch.Generator().manual_seed(0))


def test_perplexity_and_kl_are_means_over_predicted_tokens(windows, monkeypatch):
    packed, original = make_llama(seed=1), make_llama()
    found = perplexity_and_kl(packed, original, windows, device=CPU)
    logs = [m(windows).logits[:, :-1].double().log_softmax(-1) for m in (packed, original)]
    nll = [-x.gather(2, windows[:, 1:, None]).mean().item() for x in logs]
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean().item()
    same = (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean().item()
    assert found["packed"] == {
        "perplexity": pytest.approx(math.exp(nll[0]), rel=1e-5),
        "kl": pytest.approx(kl, rel=1e-5),
        "agreement": pytest.approx(100 * same),
    }
    assert found["original"] == {"perplexity": pytest.approx(math.exp(nll[1]), rel=1e-5)}
    assert (found["windows"], found["window"], found["tokens"]) == (3, 20, 57)
    # The result does not depend on how many positions are compared at once.
    monkeypatch.setattr(language, "_POSITIONS", 7)
    parts = perplexity_and_kl(packed, original, windows, device=CPU)
    assert parts["packed"] == pytest.approx(found["packed"], rel=1e-6)


def test_a_model_has_no_distance_from_itself(windows):
    model = make_llama()
    found = perplexity_and_kl(model, model, windows, device=CPU)
    assert found["packed"]["kl"] == 0 and found["packed"]["agreement"] == 100
    assert found["packed"]["perplexity"] == found["original"]["perplexity"]


def test_perplexity_without_the_original(windows):
    model = make_llama()
    found = perplexity_and_kl(model, None, windows, device=CPU)
    expected = perplexity_and_kl(model, model, windows, device=CPU)["original"]["perplexity"]
    assert found["packed"] == {"perplexity": pytest.approx(expected)} and "original" not in found


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(windows):
    model = make_llama(tie_word_embeddings=False)
    model.lm_head.weight.zero_()
    found = perplexity_and_kl(model, None, windows, device=CPU)
    assert found["packed"]["perplexity"] == pytest.approx(15)


def test_outputs_that_are_not_finite(windows):
    broken = make_llama()
    broken.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        perplexity_and_kl(broken, None, windows, device=CPU)

"""Language models: perplexity, distance and answers against sums over the whole vocabulary."""

import math
import sys

import pytest
import torch
from tiny_language import make_llama, make_tokenizer

import jlcm
from experiments.data.commonsense import write_rows
from experiments.evaluate import language
from experiments.evaluate.language import check_commonsense, commonsense, perplexity_and_kl

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

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


#: Questions of each kind, in the fields of the hub's data sets.
ROWS = {
    "boolq": [
        {"passage": "A -- the cat sat", "question": "cat sat", "idx": 0, "label": 1},
        {"passage": "B -- the dog ran", "question": "cat ran", "idx": 1, "label": 0},
    ],
    "piqa": [
        {"goal": "the cat", "sol1": "sat on the mat", "sol2": "ran", "label": 0},
        {"goal": "the dog", "sol1": "sat", "sol2": "ran and ran", "label": 1},
        {"goal": "a mat", "sol1": "sat on a dog", "sol2": "ran and sat", "label": 1},
    ],
    "winogrande": [
        {"sentence": "the _ sat on the mat", "option1": "cat", "option2": "dog", "answer": "1"},
        {"sentence": "a _ ran on a cat", "option1": "mat", "option2": "dog", "answer": "2"},
    ],
    "arc_easy": [
        {
            "id": str(index),
            "question": question,
            "choices": {"text": ["the cat", "a dog ran", "no", "mat"], "label": list("ABCD")},
            "answerKey": answer,
        }
        for index, (question, answer) in enumerate([("cat sat", "A"), ("dog", "D"), ("on", "B")])
    ],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, questions in ROWS.items():
        write_rows(folder / f"{name}.jsonl", questions)
    return folder


@pytest.fixture
def unplugged(monkeypatch):
    """Whoever tries the network is noted, and refused."""
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return tried


def prompts(name, row):
    """Context, continuations and the right one, written down from lm-eval's task files."""
    match name:
        case "boolq":
            context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
            return [(context, answer) for answer in (" no", " yes")], row["label"]
        case "piqa":
            context = f"Question: {row['goal']}\nAnswer:"
            return [(context, f" {row[key]}") for key in ("sol1", "sol2")], row["label"]
        case "winogrande":
            before, after = row["sentence"].split("_")
            options = [before + row[key] for key in ("option1", "option2")]
            return [(option, after) for option in options], int(row["answer"]) - 1
        case "arc_easy":
            context = f"Question: {row['question']}\nAnswer:"
            answers = row["choices"]["text"]
            return [(context, f" {answer}") for answer in answers], "ABCD".index(row["answerKey"])


def expected(model, tokenizer, name):
    """Accuracies with a likelihood per answer computed alone, without padding or a cache."""
    hits, per_character = [], []
    for row in ROWS[name]:
        answers, right = prompts(name, row)
        sums = []
        for context, answer in answers:
            ids, start = tokenizer(context + answer)["input_ids"], len(tokenizer.tokenize(context))
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids))))
        lengths = [len(answer) - 1 for _, answer in answers]
        hits.append(sums.index(max(sums)) == right)
        means = [x / n for x, n in zip(sums, lengths, strict=True)]
        per_character.append(means.index(max(means)) == right)
    return 100 * sum(hits) / len(hits), 100 * sum(per_character) / len(hits)


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_the_highest_likelihood(rows, unplugged, seed, capfd):
    model, tokenizer = make_llama(seed=seed), make_tokenizer()
    state = torch.get_rng_state()
    found = commonsense(
        model, tokenizer, list(ROWS), limit=None, batch_size=4, device=CPU, rows=rows
    )
    assert not unplugged and torch.equal(state, torch.get_rng_state())
    output = capfd.readouterr()
    assert not output.out and "lm_eval" not in output.err and "Running" not in output.err
    accuracies = []
    for name in ROWS:
        acc, acc_norm = expected(model, tokenizer, name)
        accuracies.append(acc)
        assert found[name]["acc"] == pytest.approx(acc)
        assert found[name]["samples"] == len(ROWS[name])
        if name in ("piqa", "arc_easy"):
            assert found[name]["acc_norm"] == pytest.approx(acc_norm)
        else:
            assert "acc_norm" not in found[name]
        share, count = acc / 100, len(ROWS[name])
        error = 100 * math.sqrt(share * (1 - share) / (count - 1))
        assert found[name]["acc_standard_error"] == pytest.approx(error)
    assert found["average"]["acc"] == pytest.approx(sum(accuracies) / 4)


def test_limits_and_packed_models(rows, unplugged):
    """A packed model has no parameters, and its tied weights must be left alone."""
    model, tokenizer = make_llama(), make_tokenizer()
    packed = jlcm.compress(model, alpha=3.9, progress=False)
    assert not list(packed.parameters())
    options = {"batch_size": 2, "device": CPU, "rows": rows}
    before = packed(torch.arange(15)[None]).logits
    found = commonsense(packed, tokenizer, ["piqa"], limit=2, **options)
    assert found["piqa"]["samples"] == 2 and not unplugged
    assert torch.equal(packed(torch.arange(15)[None]).logits, before)
    single = commonsense(packed, tokenizer, ["piqa"], limit=1, **options)
    assert single["piqa"]["acc_standard_error"] is None
    assert commonsense(packed, tokenizer, [], limit=2, **options) == {}


def test_unknown_tasks(monkeypatch):
    with pytest.raises(ValueError, match="data.tasks='mmlu' is not one of boolq, piqa"):
        check_commonsense(["piqa", "mmlu"])
    with pytest.raises(ValueError, match="names a task twice"):
        check_commonsense(["piqa", "boolq", "piqa"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"needs lm-eval: pip install .*\[llm\]"):
        check_commonsense(["piqa"])
    check_commonsense([])  # perplexity needs none


def test_the_hubs_tasks_are_lm_evals_own(unplugged, monkeypatch, tmp_path):
    """Without a network, what is asked for is seen in the error."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConnectionError, match=r"hub.*piqa .*data\.hub=false"):
        commonsense(
            make_llama(),
            make_tokenizer(),
            ["piqa"],
            limit=1,
            batch_size=1,
            device=CPU,
            hub=True,
        )


def test_models_in_float32_answer_in_bf16_on_demand(rows):
    model, seen = make_llama(), set()
    model.lm_head.register_forward_hook(lambda _, args, output: seen.add(output.dtype))
    options = {"limit": 1, "batch_size": 2, "device": CPU, "rows": rows}
    commonsense(model, make_tokenizer(), ["piqa"], precision="bf16", **options)
    assert seen == {torch.bfloat16}
    seen.clear()
    commonsense(model, make_tokenizer(), ["piqa"], **options)
    assert seen == {torch.float32}

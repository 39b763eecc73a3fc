"""The summary of a run names what learning left alone."""

from experiments.report import _learning


def test_learning_is_summarised_by_stage():
    results = [
        {"name": "a", "kept": "learned"},
        {"name": "b", "kept": "initialisation"},
        {"name": "a .. b", "before": 0.2, "after": 0.1, "best_epoch": 2},
        {"initial_loss": 0.5, "final_loss": 0.25, "best_epoch": 3, "history": [[1, 1]] * 4},
    ]
    assert _learning(results) == [
        "learned 1 of 2 layers; left as they were: b",
        "improved 1 of 1 blocks",
        "distillation: held-out divergence 0.5 -> 0.25, epoch 3 of 4",
    ]
    assert _learning([]) == []

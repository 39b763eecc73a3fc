"""What learning tells its caller: every result, in order, as soon as it is finished."""

import math
from dataclasses import replace

import pytest
import torch

import jlcm
from jlcm.learning.blocks import BlockResult
from jlcm.learning.distill import DistillResult, EpochResult
from jlcm.learning.sequential import LayerResult
from jlcm.methods.adaround import AdaRound
from jlcm.methods.brecq import Brecq
from jlcm.methods.dkm import DKM
from jlcm.methods.nupes import Nupes
from jlcm.quantize import METHODS

STAGES = {
    "learn": jlcm.Learn(positions=4),
    "blocks": jlcm.Blocks(epochs=1),
    "distill": jlcm.Distill(epochs=2, zoom=1.0),
}
SHORT = {
    "adaround": AdaRound(iterations=20),
    "brecq": Brecq(iterations=10),
    "nupes": Nupes(iterations=20),
    "dkm": DKM(epochs=2),
}


def inputs() -> torch.Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def told_by(call, *arguments, **options):
    """What `on_result` was called with, and the network."""
    told = []
    model = call(*arguments, calibration=inputs(), progress=False, on_result=told.append, **options)
    return told, model.learning


def of(kind, results):
    return [result for result in results if isinstance(result, kind)]


def losses(epochs):
    return [(epoch.training_loss, epoch.held_out_loss) for epoch in epochs]


def test_every_stage_tells_what_it_returns(cnn):
    told, learning = told_by(jlcm.compress, cnn, alpha=4.5, init="kmeans", **STAGES)
    *parts, distilled = learning
    assert told[: len(parts)] == parts and of(LayerResult, parts) and of(BlockResult, parts)
    epochs = told[len(parts) :]
    assert [epoch.epoch for epoch in epochs] == [1, 2]
    assert losses(epochs) == distilled.history
    assert all(epoch.seconds > 0 and not epoch.restored for epoch in epochs)


def test_a_call_that_goes_on_tells_the_same_in_the_same_order(cnn, tmp_path):
    options = {"alpha": 4.5, "init": "kmeans", "folder": tmp_path, **STAGES}
    first, _ = told_by(jlcm.compress, cnn, **options)
    again, _ = told_by(jlcm.compress, cnn, **options)
    assert all(result.restored for result in again)
    assert of(LayerResult, again) == [replace(r, restored=True) for r in of(LayerResult, first)]
    assert of(BlockResult, again) == [replace(r, restored=True) for r in of(BlockResult, first)]
    assert losses(of(EpochResult, again)) == losses(of(EpochResult, first))
    assert all(math.isnan(epoch.seconds) for epoch in of(EpochResult, again))


def test_an_error_of_the_caller_loses_no_finished_layer(cnn, tmp_path):
    told = []

    def stop(result):
        told.append(result)
        if len(told) == 3:
            raise KeyboardInterrupt

    options = {"alpha": 4.5, "init": "kmeans", "folder": tmp_path, "learn": STAGES["learn"]}
    with pytest.raises(KeyboardInterrupt):
        jlcm.compress(cnn, calibration=inputs(), progress=False, on_result=stop, **options)
    again, _ = told_by(jlcm.compress, cnn, **options)
    assert [result.restored for result in again] == [True] * 3 + [False] * (len(again) - 3)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].learn is not None])
def test_compared_methods_tell_what_they_return(method, cnn):
    told, learning = told_by(jlcm.quantize, cnn, method, alpha=4.0, options=SHORT.get(method))
    if of(DistillResult, learning):
        assert losses(told) == learning[0].history
    else:
        assert told == learning and len(told) > 1

"""Training steps do not synchronize with the device.

The tests run steps on the device "meta". Its tensors have no values, so reading a value would fail.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import SYMBOLS

from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.session import TrainingSession
from ddiff.training.signals import StopSignals


@pytest.mark.parametrize(("optimizer", "taps"), [("adamw", 0), ("muon", 0), ("muon", 3)])
def test_training_step_does_not_wait_for_the_device(
    optimizer: str,
    taps: int,
    no_sync_guard: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The step includes random draws, clipping, a skipped step, the optimizer, EMA and metrics."""
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    settings = [f"train.optimizer={optimizer}", "train.ema=0.9", "train.accumulate=2"]
    settings += [f"denoiser.convolution={taps}"]
    session = TrainingSession.open(parse_recipe(SYMBOLS.read_text(), str(SYMBOLS), settings))
    session.run.objective.module.to("meta")
    session.backend.device = torch.device("meta")
    trainer = session.trainer()
    first, second = ([trainer.batch_at(step, micro) for micro in (0, 1)] for step in (0, 1))
    trainer._launch(0, first, StopSignals())
    with no_sync_guard():
        launched = trainer._launch(1, second, StopSignals())
    assert launched.figures.is_meta


def test_no_sync_guard_detects_blocking_copies(no_sync_guard: Any) -> None:
    with no_sync_guard(), pytest.raises(AssertionError, match="waits"):
        torch.ones(2).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones(2, device="meta").any())

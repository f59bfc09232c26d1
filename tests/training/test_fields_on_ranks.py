"""Runs of several fields on two ranks equal those on one rank, up to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import on_ranks, train_fields
from torch import Tensor

from ddiff.checkpoint.checkpoints import Checkpoints


def losses(run_dir: Path) -> Tensor:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["train_loss"] for line in lines], dtype=torch.float64)


def weights(run_dir: Path) -> Tensor:
    found = Checkpoints(run_dir / "checkpoints").read_weights(6)
    return torch.cat([found[name].double().ravel() for name in sorted(found)])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of one process; the cache is next to it."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        torch.set_num_threads(1)
        train_fields([f"run_dir={str(folder / 'alone')!r}"], str(folder / "cache"))
    return folder / "alone"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_of_fields_does_not_depend_on_the_number_of_ranks(
    alone: Path, tmp_path: Path, kind: str, accumulate: int
) -> None:
    place = tmp_path / "shared"
    settings = [
        f"run_dir={str(place)!r}",
        f"backend.kind={kind}",
        "backend.processes=2",
        f"train.accumulate={accumulate}",
    ]
    on_ranks(2, train_fields, settings, str(alone.parent / "cache"))
    # float32 sums in another order
    torch.testing.assert_close(losses(place), losses(alone), rtol=1e-5, atol=0.0)
    distance = (weights(place) - weights(alone)).norm() / weights(alone).norm()
    assert float(distance) < 1e-5

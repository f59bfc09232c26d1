"""`ddiff export`: one safetensors file with weights and metadata."""

from __future__ import annotations

from pathlib import Path

import torch
from commands import Command
from safetensors import safe_open
from safetensors.torch import load_file

import ddiff as api
from ddiff.checkpoint.checkpoints import Checkpoints


def test_export_writes_all_weights_to_one_file(folder: Path, ddiff: Command) -> None:
    assert ddiff("run", "small.toml", "--set", "train.steps=4")[0] == 0
    code, out, _ = ddiff("export", "runs/small", "weights.safetensors")
    assert (code, out) == (0, "weights.safetensors: the trained weights of step 4 of runs/small\n")
    assert sorted(path.name for path in folder.glob("weights*")) == ["weights.safetensors"]
    run = api.load("runs/small")
    found, expected = load_file("weights.safetensors"), run.objective.module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with safe_open("weights.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["vocabulary fingerprint"] == run.vocabulary.fingerprint
    assert metadata["tokenizer fingerprint"] == run.tokenizer.fingerprint
    assert (metadata["step"], metadata["weights"], metadata["ddiff"]) == (
        "4",
        "trained",
        api.__version__,
    )


def test_export_writes_ema_weights_if_the_run_has_them(folder: Path, ddiff: Command) -> None:
    assert ddiff("run", "small.toml", "--set", "train.steps=2")[0] == 0
    code, _, err = ddiff("export", "runs/small", "weights.safetensors", "--weights", "ema")
    assert code == 2
    assert "holds no moving average of the weights" in err
    checkpoints = Checkpoints("runs/small/checkpoints")
    found = checkpoints.newest()
    assert found is not None
    weights = found.read_weights()
    name = next(iter(weights))
    ema = {"updates": 1, "weights": {name: weights[name] + 1.0}}
    checkpoints.save(3, weights, found.read_state() | {"ema": ema})
    assert "the ema weights of step 3" in ddiff("export", "runs/small", "weights.safetensors")[1]
    assert torch.equal(load_file("weights.safetensors")[name], weights[name] + 1.0)
    assert ddiff("export", "runs/small", "weights.safetensors", "--weights", "trained")[0] == 0
    assert torch.equal(load_file("weights.safetensors")[name], weights[name])


def test_export_refuses_untrained_runs_and_other_file_formats(folder: Path, ddiff: Command) -> None:
    code, _, err = ddiff("export", "runs/nowhere", "weights.safetensors")
    assert code == 2
    assert "is not a run directory" in err
    assert ddiff("run", "small.toml", "--set", "train.steps=2")[0] == 0
    code, _, err = ddiff("export", "runs/small", "weights.bin")
    assert code == 2
    assert "weights.bin.safetensors" in err
    assert list(folder.glob("weights*")) == []

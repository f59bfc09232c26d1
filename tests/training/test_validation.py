"""Validation during training has the results of `evaluate` and does not change training."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SYMBOLS, on_ranks, train_symbols
from rich.console import Console

from ddiff import load, run
from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.errors import NonFiniteError
from ddiff.progress import show_progress
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.replay import verify_resume
from ddiff.training.ema import ExponentialMovingAverage
from ddiff.training.metrics import WALL_CLOCK

BOUND = "validation_nelbo_nats_per_symbol"
ENDS = ("validation_interval_low_nats_per_symbol", "validation_interval_high_nats_per_symbol")
DROPOUT = (
    "denoiser.dropout=0.3",
    "train.checkpoint_every=2",
)  # dropout, so that the random state of torch has an effect


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def trained(folder: str, *settings: str) -> Any:
    return run(parse_recipe(SYMBOLS.read_text(), str(SYMBOLS), [f'run_dir="{folder}"', *settings]))


def lines(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def without_validation(folder: str) -> list[dict[str, Any]]:
    kept = [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines(folder)]
    return [{k: v for k, v in line.items() if not k.startswith("validation")} for line in kept]


def state(folder: str) -> dict[str, Any]:
    newest = Checkpoints(f"{folder}/checkpoints").newest()
    assert newest is not None
    return {"model": newest.read_weights(), **newest.read_state()}


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            if key not in (
                "seconds",
                "tokens_per_second",
                "settled",
                "made_with",
            ):  # "made_with" contains the recipe
                assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_trained_weights_are_bitwise_equal_with_and_without_validation(ema: float) -> None:
    trained("plain", f"train.ema={ema}", *DROPOUT)
    trained("watched", f"train.ema={ema}", "evaluate.every=2", *DROPOUT)
    assert without_validation("plain") == without_validation("watched")
    assert_same(state("plain"), state("watched"))


def test_validation_logs_the_same_bound_as_evaluate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for weights in ("ema", "trained"):
        made = trained(
            weights,
            "train.ema=0.5",
            f"evaluate.weights={weights}",
            "evaluate.every=3",
            "evaluate.draws=2",
        )
        found, _ = load(weights).evaluate()
        watched = lines(weights)
        assert [BOUND in line for line in watched] == [False, False, True] * 2
        assert watched[-1][BOUND] == pytest.approx(found.nelbo_nats_per_token, rel=1e-12)
        assert found.interval is not None
        assert [watched[-1][end] for end in ENDS] == pytest.approx(found.interval, rel=1e-12)
        assert made.denoiser.training is False
    assert "step 3: validation NELBO" in capsys.readouterr().err
    assert lines("ema")[-1][BOUND] != lines("trained")[-1][BOUND]


def test_resumed_run_logs_the_same_validation_results() -> None:
    trained("straight", "evaluate.every=2", *DROPOUT)
    trained("torn", "evaluate.every=2", "train.steps=3", "train.schedule=constant", *DROPOUT)
    trained("whole", "evaluate.every=2", "train.schedule=constant", *DROPOUT)
    trained("torn", "evaluate.every=2", "train.schedule=constant", *DROPOUT)
    drop = [
        [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines(name)]
        for name in ("torn", "whole")
    ]
    assert drop[0] == drop[1]
    assert sum(BOUND in line for line in lines("torn")) == 3


def test_run_resumes_with_another_validation_interval() -> None:
    trained("run", "train.steps=3", "train.schedule=constant", *DROPOUT)
    trained("run", "evaluate.every=1", "train.schedule=constant", *DROPOUT)
    assert [BOUND in line for line in lines("run")] == [False] * 3 + [True] * 3


def test_verify_resume_reproduces_validation_results(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ['run_dir="run"', "evaluate.every=2", *DROPOUT]
    trained("run", *settings[1:])
    capsys.readouterr()
    assert verify_resume(parse_recipe(SYMBOLS.read_text(), str(SYMBOLS), settings), 2) == 0
    assert "losses and other figures: equal" in capsys.readouterr().out


def test_training_continues_after_a_non_finite_validation_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any) -> Any:
        raise NonFiniteError("the bound is inf nats")

    monkeypatch.setattr("ddiff.runs.session.TrainingSession._validate", broken)
    trained("run", "evaluate.every=3")
    assert "step 3: the bound is inf nats" in capsys.readouterr().err
    assert not any(BOUND in line for line in lines("run"))


def test_tracker_receives_validation_results_at_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, bool]] = []

    class Listening:
        def log(self, step: int, metrics: Any) -> None:
            logged.append((step, BOUND in metrics))

        def close(self) -> None:
            pass

    monkeypatch.setattr(
        "ddiff.runs.session.TrainingSession.build_tracker", lambda self: Listening()
    )
    trained("run", "evaluate.every=4")
    assert logged == [(4, True), (5, False), (6, False)]


def test_trained_weights_are_restored_after_an_error_with_ema_weights() -> None:
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    average = ExponentialMovingAverage(module, 0.9)
    with torch.no_grad():
        module.weight += 1.0
    before = module.weight.clone()
    with suppress(KeyError), average.apply():
        assert not torch.equal(module.weight, before)
        raise KeyError
    assert torch.equal(module.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ema"), [("ddp", 0.0), ("fsdp", 0.9)])
def test_distributed_training_is_bitwise_equal_with_and_without_validation(
    kind: str, ema: float, tmp_path: Path
) -> None:
    common = [
        f"backend.kind={kind}",
        "backend.processes=2",
        f"train.ema={ema}",
        "denoiser.dropout=0.3",
    ]
    for name, more in (("plain", []), ("watched", ["evaluate.every=2"])):
        settings = [f'run_dir="{tmp_path / name}"', *common, *more]
        on_ranks(2, train_symbols, settings, str(tmp_path / "cache"))
    assert without_validation("plain") == without_validation("watched")
    trained("single", f"train.ema={ema}", "denoiser.dropout=0.3", "evaluate.every=2")
    figures = [
        [line[BOUND] for line in lines(name) if BOUND in line] for name in ("watched", "single")
    ]
    assert len(figures[0]) == 3
    assert figures[0] == pytest.approx(figures[1], rel=0.05)


def test_progress_notes_are_printed_between_lines_or_above_the_bar() -> None:
    import io

    for terminal in (False, True):
        out = io.StringIO()
        with show_progress(
            3, "training", console=Console(file=out, force_terminal=terminal, width=100)
        ) as job:
            job.advance(1)
            job.note("step 1: validation NELBO [4.0]")
        assert "step 1: validation NELBO [4.0]" in out.getvalue()

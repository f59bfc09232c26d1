"""Training loop: gradients, skipped steps, metrics, signals, resuming."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import ROWS, Identify, Net, Rows, rng_at, rows_at, toy_trainer

from ddiff.errors import ArgumentError, CheckpointError, NonFiniteError
from ddiff.training.learning_rate import WarmupConstant
from ddiff.training.metrics import WALL_CLOCK, StepRecord
from ddiff.training.protocols import LossTerms


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    text = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in text]


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.objective.module.state_dict().items()}


class Broken(Identify):
    """Objective of the toy model whose loss is NaN, or its gradient infinite, in given steps."""

    def __init__(self, module: nn.Module, steps: set[int], kind: str = "loss") -> None:
        super().__init__(module)
        self.steps, self.kind = steps, kind

    def __call__(
        self, batch: Rows, noise: Any, denominators: dict[str, Tensor], slots: int
    ) -> LossTerms:
        step, numbers = noise
        terms = super().__call__(batch, numbers, denominators, slots)
        if step not in self.steps:
            return terms
        if self.kind == "loss":
            return LossTerms(terms.loss * float("nan"), terms.metrics)
        # sqrt has a finite value and an infinite derivative at 0
        return LossTerms(
            terms.loss + (0.0 * self.module.hidden.weight).abs().sqrt().sum(), terms.metrics
        )


def broken_trainer(
    run_dir: Path, steps: int, broken: set[int], kind: str = "loss", **settings: Any
) -> Any:
    torch.manual_seed(0)
    objective = Broken(Net().double(), broken, kind)
    settings["rng_at"] = lambda step, batch: (step, rng_at(step, batch))
    return toy_trainer(run_dir, steps, objective=objective, **settings)


def test_training_does_not_depend_on_the_number_of_micro_batches(tmp_path: Path) -> None:
    # Rows have between 1 and 6 scored symbols, so that a mean of micro-batch means would have an
    # error of several percent. The tolerance allows the rounding of float64 sums in another order,
    # about 1e-16 relative per sum, over six steps.
    whole = toy_trainer(tmp_path / "1", 6, optimizer=sgd, accumulate=1)
    whole.fit()
    for accumulate in (2, 4, 8):
        split = toy_trainer(tmp_path / str(accumulate), 6, optimizer=sgd, accumulate=accumulate)
        split.fit()
        assert split.objective.slots_seen == {ROWS}
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(split)[name], value, rtol=1e-12, atol=1e-12)
        for one, other in zip(lines(tmp_path / "1"), lines(tmp_path / str(accumulate))):
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-12)
            assert other["nats_per_symbol"] == pytest.approx(one["nats_per_symbol"], rel=1e-12)


def test_gradient_is_divided_by_the_token_count_of_the_global_batch(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 1, optimizer=sgd, accumulate=4, clip=None)
    before, rows = weights(trainer), rows_at(1)(0, 0)
    net = Net().double()
    net.load_state_dict(before)
    losses = nn.functional.cross_entropy(net(rows.ids).transpose(1, 2), rows.ids, reduction="none")
    loss = (losses * rows.scored * (1 + rng_at(0, rows)[:, None])).sum() / rows.scored.sum()
    loss.backward()
    trainer.fit()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(
            weights(trainer)[name], before[name] - 0.1 * parameter.grad, rtol=1e-12, atol=1e-14
        )


def test_trainer_reports_the_gradient_norm_before_clipping(tmp_path: Path) -> None:
    trainer = toy_trainer(
        tmp_path, 1, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1.0), clip=1e-3
    )
    before = weights(trainer)
    trainer.fit()
    moved = torch.cat(
        [(weights(trainer)[name] - value).flatten() for name, value in before.items()]
    )
    # clip_grads_with_norm_ divides by norm + 1e-6
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-4)
    assert lines(tmp_path)[0]["grad_norm"] > 0.1


def test_each_step_uses_the_learning_rate_of_the_schedule(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 3, optimizer=sgd, multiplier=WarmupConstant(4), batch_at=None)
    rates = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (rates.append(trainer.optimizer.param_groups[0]["lr"]), step())
    trainer.fit()
    assert rates == pytest.approx([0.025, 0.05, 0.075])
    assert [line["lr_multiplier"] for line in lines(tmp_path)] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_non_finite_step_changes_no_parameter_and_counts_as_skipped(
    tmp_path: Path, kind: str
) -> None:
    skipped = {2, 3}
    trainer = broken_trainer(tmp_path, 6, skipped, kind)
    seen, batch_at = [], trainer.batch_at

    def watched(step: int, micro: int) -> Rows:
        seen.append((weights(trainer), json.dumps(str(trainer.optimizer.state_dict()))))
        return batch_at(step, micro)

    trainer.batch_at = watched
    summary = trainer.fit()
    unchanged = [
        a[1] == b[1] and all(torch.equal(a[0][k], b[0][k]) for k in a[0]) for a, b in pairwise(seen)
    ]
    assert unchanged == [step in skipped for step in range(5)]
    assert summary.skipped_steps == 2
    assert summary.status == "finished"
    assert [line["skipped_steps"] for line in lines(tmp_path)] == [0, 0, 1, 2, 2, 2]
    assert ["train_loss" in line for line in lines(tmp_path)] == [
        step not in skipped for step in range(6)
    ]


def test_twenty_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    nearly = broken_trainer(tmp_path / "nearly", 30, set(range(5, 24)))
    assert nearly.fit().skipped_steps == 19
    trainer = broken_trainer(tmp_path / "run", 30, set(range(3, 30)))
    with pytest.raises(
        NonFiniteError,
        match=r"20 steps in a row, up to step 23.*newest checkpoint is of step 20",
    ):
        trainer.fit()
    again = broken_trainer(tmp_path / "run", 30, set(range(3, 30)))
    with pytest.raises(NonFiniteError, match="step 23"):  # resumed count
        again.fit(again.checkpoints.newest())


class RecordingTracker:
    """Tracker that records all metrics except wall-clock times."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.records.append(
            (step, {name: value for name, value in metrics.items() if name not in WALL_CLOCK})
        )

    def close(self) -> None: ...


def test_tracker_receives_metrics_as_total_sum_divided_by_total_count(tmp_path: Path) -> None:
    tracker = RecordingTracker()
    summary = toy_trainer(tmp_path, 10, tracker=tracker, log_every=4).fit()
    assert [step for step, _ in tracker.records] == [4, 8, 10]
    rows, figures = lines(tmp_path)[:4], tracker.records[0][1]
    tokens = sum(row["tokens"] for row in rows)
    mean = sum(row["nats_per_symbol"] * row["tokens"] for row in rows) / tokens
    assert figures["nats_per_symbol"] == pytest.approx(mean, rel=1e-12)
    assert figures["tokens"] == tokens
    assert figures["train_loss"] == pytest.approx(
        sum(row["train_loss"] for row in rows) / 4, rel=1e-12
    )
    assert {
        name: value for name, value in summary.metrics.items() if name not in WALL_CLOCK
    } == tracker.records[-1][1]


def test_tracker_metrics_do_not_change_if_a_run_is_resumed(
    tmp_path: Path,
) -> None:
    straight, resumed = RecordingTracker(), RecordingTracker()
    toy_trainer(tmp_path / "straight", 12, tracker=straight, log_every=4).fit()
    first = toy_trainer(
        tmp_path / "run", 12, tracker=resumed, log_every=4, checkpoint_every=6, batch_at=stop_in(6)
    )
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    again = toy_trainer(tmp_path / "run", 12, tracker=resumed, log_every=4)
    assert again.checkpoints.steps() == [6]
    again.fit(again.checkpoints.newest())
    assert resumed.records == straight.records


def stop_in(last: int) -> Callable[[int, int], Rows]:
    def batch_at(step: int, micro: int) -> Rows:
        if step == last:
            raise KeyboardInterrupt
        return rows_at(1)(step, micro)

    return batch_at


def test_metrics_of_equal_runs_differ_only_in_wall_clock_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        toy_trainer(tmp_path / name, 4).fit()
    a, b = (
        [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines(tmp_path / n)]
        for n in "ab"
    )
    assert a == b
    assert [line["step"] for line in a] == [1, 2, 3, 4]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_training_after_the_current_step(
    tmp_path: Path, number: int, code: int
) -> None:
    trainer, rows = toy_trainer(tmp_path / "run", 9), rows_at(1)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def batch_at(step: int, micro: int) -> Rows:
        if step == 3:
            os.kill(os.getpid(), number)
        return rows(step, micro)

    trainer.batch_at = batch_at
    summary = trainer.fit()
    assert (summary.status, summary.step, summary.exit_code) == ("interrupted", 4, code)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    again = toy_trainer(tmp_path / "run", 9)
    assert again.checkpoints.steps() == [4]
    assert again.fit(again.checkpoints.newest()).exit_code == 0
    straight = toy_trainer(tmp_path / "straight", 9)
    straight.fit()
    assert all(
        torch.equal(weights(again)[name], value) for name, value in weights(straight).items()
    )


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_second_signal_ends_training_immediately(
    tmp_path: Path, number: int, error: type[BaseException]
) -> None:
    trainer = toy_trainer(tmp_path, 9)

    def batch_at(step: int, micro: int) -> Rows:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        raise AssertionError("the second signal did not end training")

    trainer.batch_at = batch_at
    with pytest.raises(error):
        trainer.fit()
    assert trainer.checkpoints.steps() == []


def test_finished_run_resumes_with_a_larger_number_of_steps(tmp_path: Path) -> None:
    short = toy_trainer(tmp_path / "run", 7)
    assert short.fit().status == "finished"
    done = toy_trainer(tmp_path / "run", 7)
    assert done.fit(done.checkpoints.newest()).tokens == 0.0
    longer = toy_trainer(tmp_path / "run", 12)
    longer.fit(longer.checkpoints.newest())
    straight = toy_trainer(tmp_path / "straight", 12)
    straight.fit()
    assert all(
        torch.equal(weights(longer)[name], value) for name, value in weights(straight).items()
    )
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 13))


def test_ema_added_on_resuming_starts_from_the_restored_weights(
    tmp_path: Path,
) -> None:
    first = toy_trainer(tmp_path, 6)
    first.fit()
    then = toy_trainer(tmp_path, 7, ema=0.999)
    then.fit(then.checkpoints.newest())
    assert then.ema is not None
    before = weights(first)
    for name, now in weights(then).items():  # float64; the first decay is 1/10
        torch.testing.assert_close(
            then.ema.weights[name], 0.1 * before[name] + 0.9 * now, rtol=1e-14, atol=1e-15
        )


def test_trainer_refuses_checkpoints_of_another_run(tmp_path: Path) -> None:
    toy_trainer(tmp_path, 6, fingerprints={"vocabulary": "aa"}).fit()
    with pytest.raises(CheckpointError, match="already holds checkpoints of a run, up to step 6"):
        toy_trainer(tmp_path, 9).fit()
    shorter = toy_trainer(tmp_path, 3, fingerprints={"vocabulary": "aa"})
    with pytest.raises(ArgumentError, match="at least 6, the step of"):
        shorter.fit(shorter.checkpoints.newest())
    other = toy_trainer(tmp_path, 9, fingerprints={"vocabulary": "bb"})
    with pytest.raises(CheckpointError, match=r"vocabulary: was .aa., is .bb."):
        other.fit(other.checkpoints.newest())
    (tmp_path / "metrics.jsonl").write_text("")
    emptied = toy_trainer(tmp_path, 9, fingerprints={"vocabulary": "aa"})
    with pytest.raises(
        CheckpointError, match=r"metrics.jsonl has valid lines for only the first 0 of the 6"
    ):
        emptied.fit(emptied.checkpoints.newest())


@pytest.mark.parametrize("name", ["steps", "slots", "accumulate", "log_every", "checkpoint_every"])
def test_trainer_settings_refuse_counts_below_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must be at least 1; got 0"):
        toy_trainer(tmp_path, batch_at=rows_at(1), **{name: 0})


def test_trainer_settings_refuse_a_non_positive_gradient_clip(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="clip must be positive"):
        toy_trainer(tmp_path, clip=0.0)


def test_trainer_fit_stops_after_max_steps_and_saves_no_checkpoint(tmp_path: Path) -> None:
    tracker = RecordingTracker()
    trainer = toy_trainer(tmp_path, 20, log_every=4, checkpoint_every=20, tracker=tracker)
    records: list[StepRecord] = []
    summary = trainer.fit(max_steps=6, on_step=records.append)
    assert (summary.status, summary.step, summary.steps, summary.exit_code) == ("stopped", 6, 20, 0)
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [record.loss for record in records] == [line["train_loss"] for line in lines(tmp_path)]
    assert trainer.checkpoints.steps() == []
    assert [step for step, _ in tracker.records] == [4, 6]


def test_training_with_max_steps_and_resuming_gives_the_same_weights(tmp_path: Path) -> None:
    first = toy_trainer(tmp_path / "run", 12)
    assert first.fit(max_steps=7).step == 7  # the newest checkpoint is of step 5
    second = toy_trainer(tmp_path / "run", 12)
    assert second.fit(second.checkpoints.newest(), max_steps=5).step == 10
    third = toy_trainer(tmp_path / "run", 12)
    assert third.fit(third.checkpoints.newest(), max_steps=99).status == "finished"
    straight = toy_trainer(tmp_path / "straight", 12)
    straight.fit()
    for name, value in weights(straight).items():
        assert torch.equal(weights(third)[name], value)


def test_seconds_of_a_step_include_its_own_waiting_time(tmp_path: Path) -> None:
    """Step results are read late, at the next report: the time must not move to other steps."""
    waits = [0.0, 0.06, 0.0, 0.12, 0.03, 0.09]
    at = rows_at(1)

    def wait_and_read(step: int, micro: int) -> Rows:
        time.sleep(waits[step])
        return at(step, micro)

    toy_trainer(tmp_path, steps=6, batch_at=wait_and_read, log_every=2).fit()
    seconds = [line["seconds"] for line in lines(tmp_path)]
    assert all(found >= wait for found, wait in zip(seconds, waits, strict=True))

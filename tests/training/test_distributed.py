"""Training on several processes equals training in one process.

Random draws must be equal. Losses must be equal up to the rounding of sums in another order.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SYMBOLS, on_ranks, stop_one, train_symbols, train_toys, train_with_dropout
from torch import Tensor
from toy import rows_at, toy_trainer

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.core.rng import CounterRng
from ddiff.distributed.data_parallel import DistributedBackend
from ddiff.distributed.launcher import _report_outcome, get_rank_info, launch
from ddiff.distributed.single import SingleBackend
from ddiff.errors import ArgumentError, CheckpointError, RecipeError
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.build import Overrides
from ddiff.runs.directory import check_directory
from ddiff.runs.session import build_run
from ddiff.runs.stages import run_recipe

STEPS = 50


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def draws(built: Any, world_size: int, accumulate: int, step: int) -> dict[str, Tensor]:
    """Return the random draws of a step, over all ranks and micro-batches, by name.

    The draws are ordered by slot, the index of a sample in the global batch. The entry "counts" has
    the number of scored tokens of each micro-batch.
    """
    recipe, parts = built.recipe, []
    object.__setattr__(recipe.train, "accumulate", accumulate)
    for rank in range(world_size):
        for micro in range(accumulate):
            batch = built.data.batch_at(step, micro, rank, world_size)
            rng = CounterRng(recipe.seed, step, batch.index, recipe.length)
            noisy = built.objective._draw(batch, rng, recipe.train.batch).noisy
            parts.append((batch.index, batch.ids, batch.scored, noisy.zt, noisy.t))
    counts = torch.stack([part[2].sum() for part in parts])
    index, *seen = (torch.cat(column) for column in zip(*parts))
    order = index.argsort()
    names = ("index", "ids", "scored", "zt", "t")
    return {name: value[order] for name, value in zip(names, (index, *seen))} | {"counts": counts}


def test_random_draws_of_a_step_do_not_depend_on_rank_or_micro_batch_count(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", cache)
    built = build_run(parse_recipe(SYMBOLS.read_text(), str(SYMBOLS)), SingleBackend())
    for step in (0, 7):
        whole = draws(built, 1, 1, step)
        assert whole["index"].tolist() == list(range(8))
        for world_size, accumulate in ((1, 4), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)):
            shared = draws(built, world_size, accumulate, step)
            assert len(set(shared["counts"].tolist())) > 1, (
                "micro-batches must have different numbers of scored tokens"
            )
            for name in ("index", "ids", "scored", "zt", "t"):
                assert torch.equal(shared[name], whole[name]), (world_size, accumulate, step, name)


def settings(place: Path, processes: int, *more: str, kind: str = "ddp") -> list[str]:
    several = [f"backend.kind={kind}", f"backend.processes={processes}"] if processes > 1 else []
    return [f"run_dir={json.dumps(str(place))}", *several, *more]


def losses(run_dir: Path) -> Tensor:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["train_loss"] for line in lines], dtype=torch.float64)


def farthest(run_dir: Path, other: Path, step: int) -> float:
    """Return the relative distance between the parameters of two runs after `step`."""
    files = [Checkpoints(place / "checkpoints").read_weights(step) for place in (run_dir, other)]
    assert files[0].keys() == files[1].keys()
    one, two = (torch.cat([file[name].double().ravel() for name in sorted(file)]) for file in files)
    return ((one - two).norm() / one.norm()).item()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Callable[..., Path]:
    """Function that returns the directory of a single-process run with the given settings.

    The run is trained on the first call.
    """

    @functools.cache
    def trained(*long: str) -> Path:
        place = tmp_path_factory.mktemp("alone")
        train_symbols(settings(place, 1, *long), cache)
        return place

    return trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "optimizer", "accumulate", "numbers", "allowed"),
    [("ddp", "adamw", 1, (2, 4), 1e-6), ("fsdp", "muon", 2, (2, 4), 1e-5)],
)
def test_training_does_not_depend_on_the_number_of_ranks(
    tmp_path: Path,
    cache: str,
    alone: Callable[..., Path],
    kind: str,
    optimizer: str,
    accumulate: int,
    numbers: tuple[int, ...],
    allowed: float,
) -> None:
    # float32 sums in another order have a relative error of 1e-7. After 50 steps of AdamW the loss
    # may differ by 1e-6. With Muon it may differ by 1e-5, because the smallest singular values are
    # dominated by rounding. The tolerance of the parameters is ten times larger: AdamW divides by
    # the size of the gradient, and some gradient entries are dominated by rounding.
    long = (
        f"train.steps={STEPS}",
        f"train.optimizer.kind={optimizer}",
        f"train.accumulate={accumulate}",
        "train.checkpoint_every=99",
        "train.ema=0.9",
        "denoiser.convolution=3",
        "denoiser.qk_norm=true",
    )
    one = alone(*long)
    for number in numbers:
        shared = tmp_path / str(number)
        on_ranks(number, train_symbols, settings(shared, number, *long, kind=kind), cache)
        torch.testing.assert_close(losses(shared), losses(one), rtol=allowed, atol=0.0)
        assert farthest(one, shared, STEPS) < 10 * allowed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resumed_run_on_the_same_number_of_ranks_is_bitwise_identical(
    tmp_path: Path, cache: str, kind: str
) -> None:
    long = (
        "train.checkpoint_every=5",
        "train.schedule=constant",
        "denoiser.dropout=0.2",
        "train.optimizer.kind=muon",
    )
    straight, torn = tmp_path / "straight", tmp_path / "torn"
    on_ranks(2, train_symbols, settings(straight, 2, *long, "train.steps=10", kind=kind), cache)
    for steps in (5, 10):
        on_ranks(
            2, train_symbols, settings(torn, 2, *long, f"train.steps={steps}", kind=kind), cache
        )
    assert torch.equal(losses(torn), losses(straight))
    assert farthest(torn, straight, 10) == 0.0


@pytest.mark.slow
def test_transformers_backbone_trains_with_fsdp_in_bfloat16(tmp_path: Path, cache: str) -> None:
    """Sharded training of a transformers backbone has the losses of a single process.

    The first losses differ only by the order of float32 sums. Later losses differ more, because
    gradients are bfloat16 products (8 bits), summed over the rows of a rank and then over ranks.
    """
    sizes = "hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32"
    bert = f"denoiser={{kind='hf', architecture='bert', settings={{{sizes}}}}}"
    long = (
        "plugins=['mdlm', 'hf']",
        bert,
        "backend.precision=bfloat16",
        "train.optimizer.kind=muon",
        "train.steps=4",
    )
    on_ranks(1, train_symbols, settings(tmp_path / "one", 1, *long), cache)
    on_ranks(2, train_symbols, settings(tmp_path / "two", 2, *long, kind="fsdp"), cache)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    torch.testing.assert_close(two[:1], one[:1], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(two, one, rtol=1e-2, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_training_on_several_ranks_equals_one_process_and_skips_nan_steps(
    tmp_path: Path, number: int
) -> None:
    on_ranks(number, train_toys, str(tmp_path))

    def saved(name: str, rank: int) -> dict[str, Tensor]:
        return torch.load(tmp_path / name / f"rank{rank}.pt")

    alone = toy_trainer(tmp_path / "alone", 6, batch_at=rows_at(1), log_every=2)
    alone.fit()
    # float64 sums in another order, amplified by the orthogonalization of Muon
    expected = alone.objective.module.state_dict()
    for rank in range(number):
        for name in ("whole", "micro"):
            torch.testing.assert_close(saved(name, rank), expected, rtol=1e-11, atol=1e-12)
        for name, value in saved("broken", rank).items():
            assert torch.equal(value, saved("broken", 0)[name])
            assert value.isfinite().all()
    lines = [
        json.loads(line) for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()
    ]
    assert ["train_loss" in line for line in lines] == [True, True, False, True, True]
    expected_lines = [
        json.loads(line) for line in (tmp_path / "alone/metrics.jsonl").read_text().splitlines()
    ]
    found = [
        json.loads(line) for line in (tmp_path / "micro/metrics.jsonl").read_text().splitlines()
    ]
    for one, two in zip(expected_lines, found, strict=True):
        assert one["tokens"] == two["tokens"]
        assert two["nats_per_symbol"] == pytest.approx(one["nats_per_symbol"], rel=1e-11)


@pytest.mark.slow
def test_dropout_on_ranks_does_not_depend_on_when_checkpoints_are_saved(
    tmp_path: Path,
) -> None:
    """Neither the number of checkpoints nor a signal between two checkpoints changes the run."""
    on_ranks(2, train_with_dropout, str(tmp_path))
    expected = torch.load(tmp_path / "few" / "rank0.pt")
    for name in ("many", "stopped"):
        for key, value in torch.load(tmp_path / name / "rank0.pt").items():
            assert torch.equal(value, expected[key]), (name, key)


@pytest.mark.slow
def test_signal_to_one_rank_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    on_ranks(2, stop_one, str(tmp_path))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4]


def ddiff_run(
    place: Path, processes: int, cache: str, *more: str, kind: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ddiff", "run", str(SYMBOLS)]
    command += [f"--set={setting}" for setting in settings(place, processes, *more, kind=kind)]
    environment = os.environ | {"DDIFF_CACHE": cache, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_killed_run_resumes_with_another_backend_and_process_count(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", cache)
    long = (
        "train.checkpoint_every=10",
        "train.keep=20",
        "train.schedule=constant",
        "train.steps=60",
    )
    torn, straight = tmp_path / "torn", tmp_path / "straight"
    process = ddiff_run(torn, 2, cache, *long, kind="fsdp")
    file = torn / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_text().count("\n") < 15):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)  # the workers end with the launcher, because their standard input is closed
    ended = file.read_text()
    time.sleep(0.5)
    assert file.read_text() == ended
    assert 15 <= ended.count("\n") < 60

    assert (
        run_recipe(parse_recipe(SYMBOLS.read_text(), str(SYMBOLS), settings(torn, 1, *long))) == 0
    )
    train_symbols(settings(straight, 1, *long, "train.steps=70"), cache)
    assert farthest(torn, straight, 60) < 1e-5
    process = ddiff_run(torn, 2, cache, *long, "train.steps=70", kind="ddp")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    rows = [line for line in out.splitlines() if line.startswith("NELBO")]
    assert len(rows) == 1, out  # printed by rank 0 only
    assert "Warning" not in err
    torch.testing.assert_close(losses(torn), losses(straight), rtol=2e-6, atol=0.0)


def test_launch_prints_an_error_of_all_ranks_only_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(["run", "no_such_recipe"], 2) == 2
    message = capfd.readouterr().err
    assert message.count("no_such_recipe") == 1, message
    assert "Traceback" not in message


def test_launcher_prints_the_log_of_a_worker_that_ends_without_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workers = []
    for code in (0, 3):
        worker = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
        worker.wait()
        workers.append(worker)
    (tmp_path / "1.log").write_text("libfoo: cannot allocate\n")
    assert _report_outcome(workers, tmp_path) == 3
    message = capfd.readouterr().err
    assert "libfoo: cannot allocate" in message
    assert "Worker 1 of 2 ended with exit code 3" in message


def test_batch_size_must_be_a_multiple_of_the_process_count() -> None:
    with pytest.raises(
        RecipeError, match=r"symbols\.toml:\d+: \[train\] batch must be a multiple .* processes = 3"
    ):
        parse_recipe(
            SYMBOLS.read_text(), "symbols.toml", ["backend.kind=ddp", "backend.processes=3"]
        )


def test_distributed_backend_without_torchrun_raises_argument_error() -> None:
    assert get_rank_info() is None
    with pytest.raises(
        ArgumentError, match="must be started by the command `ddiff run`, or by torchrun"
    ):
        DistributedBackend("cpu", 2)


def test_run_resumes_with_another_backend_but_not_another_recipe(tmp_path: Path) -> None:
    recipe = parse_recipe(SYMBOLS.read_text(), "symbols.toml", settings(tmp_path, 2))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    Checkpoints(tmp_path / "checkpoints").save(
        1, {}, {}
    )  # without checkpoints, two runs cannot be mixed
    check_directory(
        parse_recipe(SYMBOLS.read_text(), "symbols.toml", settings(tmp_path, 4)),
        Overrides(),
        False,
    )
    other = parse_recipe(SYMBOLS.read_text(), "symbols.toml", settings(tmp_path, 4, "seed=5"))
    with pytest.raises(CheckpointError, match=r"Changed keys:\n  seed: was 0, is 5\nGive"):
        check_directory(other, Overrides(), False)

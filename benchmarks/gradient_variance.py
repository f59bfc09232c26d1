"""Measure the variance of training gradients for several distributions of noise times.

    python benchmarks/gradient_variance.py runs/variance [RECIPE ...]

The distributions are uniform t, uniform information time tau (the share of the mutual information
of x and z_t that is lost at time t), and the draws of `FlatTimes` for several sequence lengths.

Each recipe is trained for a few steps first. Then gradients of one fixed batch are computed with
different noise times and noise. The script prints trace(Cov(gradient)) / |mean gradient|^2, with
the loss of the recipe and with the bound as loss.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddiff
from ddiff import CounterRng, IdentityTime, TimeChange

RECIPES = ("mdlm_small", "hdlm_small", "gidd_small", "hybrid_gamma_small", "sedd_uniform_small")
STEPS = 60
DRAWS = 32


TOKENS = (64, 16, 4, 1)


class EvenDraws:
    """Map `clock` from information time tau to time t, with draws that are uniform in tau."""

    def __init__(self, clock: TimeChange) -> None:
        self.clock = clock

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        return self.clock.at(tau)

    def draw(self, v: Tensor, start: float, stop: float, length: int) -> tuple[Tensor, Tensor]:
        t, speed = self.clock.at(start + (stop - start) * v)
        return t, (stop - start) * speed


class DrawsForLength(EvenDraws):
    """Time change that draws noise times as if all sequences had `tokens` tokens.

    The draws of `FlatTimes` depend on the length of the sequences; this class ignores their length.
    """

    def __init__(self, clock: TimeChange, tokens: int) -> None:
        super().__init__(clock)
        self.tokens = tokens

    def draw(self, v: Tensor, start: float, stop: float, length: int) -> tuple[Tensor, Tensor]:
        return self.clock.draw(v, start, stop, self.tokens)


def gradients(run: Any, clock: TimeChange, loss: Any) -> Tensor:
    """Return gradients [DRAWS, parameters] of one fixed batch, each for different noise.

    run: run whose network is trained. clock: time change from which noise times are drawn. loss:
    training loss.
    """
    objective = run.objective
    run.process.__dict__["information_time"] = clock
    objective.loss = loss
    batch = run.data.batch_at(0, 0)
    tokens = {"tokens": batch.scored.sum()}
    found = []
    for draw in range(DRAWS):
        objective.module.zero_grad(set_to_none=True)
        rng = CounterRng(run.recipe.seed, draw, batch.index, run.recipe.length, "variance")
        objective(batch, rng, tokens, len(batch.index)).loss.backward()
        parts = [p.grad.reshape(-1) for p in objective.module.parameters() if p.grad is not None]
        found.append(torch.cat(parts).clone())
    return torch.stack(found)


def relative_variance(gradient: Tensor) -> float:
    """Return trace(Cov) / |mean|^2 over the rows of `gradient` [draws, parameters].

    |mean|^2 is corrected for the variance of the mean.
    """
    mean = gradient.double().mean(0)
    variance = float((gradient.double() - mean).square().sum()) / (len(gradient) - 1)
    return variance / (float(mean.square().sum()) - variance / len(gradient))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="directory of the short runs")
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    given = parser.parse_args()
    columns = ["even t", "even tau", *(f"tokens = {tokens}" for tokens in TOKENS)]
    print("| recipe | loss | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 2) + "|")
    for name in given.recipes:
        settings = [
            f"run_dir={given.runs / name}",
            f"train.steps={STEPS}",
            "evaluate.rows=64",
            "sample.count=1",
        ]
        with contextlib.redirect_stdout(sys.stderr):
            run = ddiff.run(ddiff.read_recipe(name, settings))
        information = run.process.information_time
        clocks = [
            IdentityTime(),
            EvenDraws(information),
            *(DrawsForLength(information, tokens) for tokens in TOKENS),
        ]
        for label, loss in (("of the recipe", run.objective.loss), ("elbo", ddiff.ElboLoss())):
            row = [f"{relative_variance(gradients(run, clock, loss)):.2f}" for clock in clocks]
            print(f"| {name} | {label} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Confusions of the network of a run on its validation text, for `ddiff report`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ddiff.core.elbo import Network, corrupt
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, Noisy
from ddiff.data.packing import batch_rows
from ddiff.evaluation.confusion import Confusion, count_confusions
from ddiff.nn.network import as_network
from ddiff.progress import Progress, show_progress
from ddiff.runs.evaluation import evaluated_rows
from ddiff.runs.report.confusions import LevelConfusion
from ddiff.runs.run import Run
from ddiff.training.context import build_context

MOST_ROWS = 256  # validation rows that are noised, spread evenly over the text


@torch.no_grad()
def measure_confusion(run: Run, most_rows: int = MOST_ROWS) -> list[LevelConfusion]:
    """Count the true and predicted nodes of a network on rows of the validation text.

    Each row is noised once, at a time that is stratified over information time. The result is empty
    for a run without a process, and for a network that predicts scores.

    Raises DataError if the data of the run cannot be read here.
    """
    process = run.process
    if process is None or run.denoiser.parameterization.predicts != "distribution":
        return []
    run.objective.module.eval()  # no dropout
    count = min(most_rows, len(evaluated_rows(run.data, run.recipe)))
    with show_progress(count, "comparing predictions") as bar:
        found = count_confusions(process, _noise_rows(run, process, count, bar))
    return [_convert(each) for each in found]


def _noise_rows(
    run: Run, process: ForwardProcess, count: int, bar: Progress
) -> Iterator[tuple[Network, Tensor, Noisy]]:
    """Yield the network, the clean tokens and the noised states of each batch of `count` rows."""
    keys = run.recipe.evaluate
    times = FlatTimes(*keys.window)
    every = evaluated_rows(run.data, run.recipe)
    numbers = every[np.arange(count) * len(every) // count]
    conditions = run.data.validation_conditions
    for first in range(0, count, keys.batch):
        chosen = numbers[first : first + keys.batch]
        batch = batch_rows(run.data.validation_rows, chosen, conditions=conditions).to(run.device)
        rng = CounterRng(keys.seed, 0, batch.index, run.recipe.length)
        slot = torch.arange(first, first + len(chosen), device=run.device)
        drawn = times.draw(process.information_time, rng, slot, count, run.recipe.length)
        noisy = corrupt(process, batch.ids, drawn, batch.scored, rng, "confusion")
        yield as_network(run.denoiser, process, build_context(batch)), batch.ids, noisy
        bar.advance(len(chosen))


def _convert(found: Confusion) -> LevelConfusion:
    pairs = zip(found.true.tolist(), found.predicted.tolist(), found.count.tolist())
    return LevelConfusion(found.level, list(pairs))

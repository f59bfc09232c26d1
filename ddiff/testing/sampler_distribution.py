"""The law of a sampler on a joint of two symbols, summed over all canvases: how far it is from the truth, and for how much.

The network is replaced by the exact law of each symbol given the other position's state, so that what is left is the
sampler's own error.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.prediction import DenseDistribution, Score
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.times import Noisy
from ddiff.sampling.grid_sampler import GridSampler
from ddiff.sampling.loop import Canvas, Sampler, counting

FEW_TIMES = 64  # up to which a table over times and states is shorter than one over rows
FEWEST = 64  # draws of a canvas, however improbable
DIMENSIONS = 32  # of the Sobol sequence: uniforms of one step


class SamplerMeasurement(NamedTuple):
    """`law` [S,S] of the two final states; `runs`, how often a sequence went through the network, on average."""

    dist: Tensor
    runs: float

    def distance(self, joint: Tensor) -> float:
        """Total variation to `joint` [V,V]."""
        whole = torch.zeros_like(self.dist)
        whole[: len(joint), : len(joint)] = joint
        return 0.5 * float((self.dist - whole).abs().sum())


def condition_on_other(
    process: ForwardProcess, joint: Tensor, zt: Tensor, t: Tensor, clean: Tensor
) -> Tensor:
    """[B,2] each -> [B,2,V] log of the exact law of each symbol given the other position: its word where it is clean."""
    times, place = t.unique(return_inverse=True)
    states = torch.arange(process.vocabulary.num_states)
    if len(times) <= FEW_TIMES:  # one table for all canvases
        table = process.log_likelihood(
            states.repeat(len(times)), times.repeat_interleave(len(states))
        )
        evidence = table[place * len(states) + zt].exp()
    else:
        evidence = (
            process.log_likelihood(zt.reshape(-1), t.reshape(-1)).exp().reshape(*zt.shape, -1)
        )
    certain = torch.nn.functional.one_hot(torch.where(clean, zt, 0), len(joint)).to(evidence)
    evidence = torch.where(clean.unsqueeze(-1), certain, evidence)
    laws = torch.stack([evidence[:, 1] @ joint.T, evidence[:, 0] @ joint], 1)
    return (laws / laws.sum(-1, keepdim=True)).log()


@final
class ExactNetwork:
    """An ask that knows `joint` [V,V]; `says = "score"` gives the ratios of the marginals under the same laws."""

    def __init__(self, process: ForwardProcess, joint: Tensor, predicts: str = "law") -> None:
        self.process, self.joint, self.predicts = process, joint, predicts

    def __call__(self, noisy: Noisy) -> Query:
        def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            sequence, place = rows // 2, torch.arange(len(rows))
            shown = (part[sequence] for part in (noisy.zt, noisy.t, noisy.clean))
            log_p = condition_on_other(self.process, self.joint, *shown)[place, rows % 2]
            if self.predicts == "law":
                return fn(DenseDistribution(log_p, self.process.vocabulary), *per_row)
            log_q = self.process.log_marginal(
                log_p, self.process.clamp_score_time(noisy.t.reshape(-1)[rows])
            )
            return fn(
                Score(log_q - log_q.gather(-1, noisy.zt.reshape(-1)[rows].unsqueeze(-1))), *per_row
            )

        return query


@final
class FastRng:
    """Uniforms of one generator, for hundreds of thousands of samples; `Noise` numbers each one and takes longer."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(seed)

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        drawn = torch.rand(self.count, 2, count, generator=self.generator, dtype=torch.float64)
        return drawn.squeeze(-1) if count == 1 else drawn


@final
class ShiftedSobolRng:
    """Uniforms for `counts` [c] rows of each canvas: one Sobol sequence, shifted at random per canvas, so without bias."""

    def __init__(self, counts: Tensor, seed: int) -> None:
        self.canvas = torch.arange(len(counts)).repeat_interleave(counts)
        self.place = torch.arange(len(self.canvas)) - (counts.cumsum(0) - counts)[self.canvas]
        self.points = torch.quasirandom.SobolEngine(DIMENSIONS).draw(
            int(counts.max()), dtype=torch.float64
        )
        self.used, self.generator = 0, torch.Generator().manual_seed(seed)

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        own = self.points[:, self.used : self.used + 2 * count]
        self.used += 2 * count
        shift = torch.rand(
            int(self.canvas.max()) + 1, 2 * count, generator=self.generator, dtype=torch.float64
        )
        drawn = ((own[self.place] + shift[self.canvas]) % 1.0).reshape(-1, 2, count)
        return drawn.squeeze(-1) if count == 1 else drawn


def measure_sampler(
    sampler: Sampler,
    process: ForwardProcess,
    joint: Tensor,
    *,
    points: int = 2**15,
    apart: bool = False,
    seed: int = 7,
    predicts: str = "law",
) -> SamplerMeasurement:
    """The law of the samples of `sampler`, the network being exact.

    `points` are the draws of a step, shared out among the canvases by their probability. A sampler on a grid that keeps no
    notes starts every step from all canvases, and with `apart` (positions move independently given the canvas) goes to the
    product of what each position does; the others draw `points` samples.
    """
    network = ExactNetwork(process, joint, predicts)
    sampler.needs(process, predicts)  # type: ignore[arg-type]
    if isinstance(sampler, GridSampler) and not getattr(
        getattr(sampler, "kappa", None), "watches", False
    ):
        return _step_by_step(sampler, process, network, points, apart, seed)
    counted = counting(network)
    noise: Any = FastRng(points, seed)
    start = process.prior.draw(noise.uniform("start"))
    for canvas in sampler.run(process, counted, _canvas(start, 1.0), lambda step: noise):  # noqa: B007
        pass
    return SamplerMeasurement(
        _histogram(canvas.zt, torch.ones(points), process), float(counted.runs.double().mean())
    )


def _step_by_step(
    sampler: GridSampler,
    process: ForwardProcess,
    network: Network,
    points: int,
    apart: bool,
    seed: int,
) -> SamplerMeasurement:
    size, times, runs = process.vocabulary.num_states, sampler.grid.times(), 0.0
    canvases = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    prior = process.prior.log_prob.exp()
    law = torch.outer(prior, prior).reshape(-1)
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        possible = (law > 0).nonzero().squeeze(-1)
        counts = (points * law[possible]).long().clamp(min=FEWEST)
        weight = (law[possible] / counts).repeat_interleave(counts)
        noise: Any = ShiftedSobolRng(counts, seed + 1000 * k)
        counted, canvas = (
            counting(network),
            _canvas(canvases[possible].repeat_interleave(counts, 0), t),
        )
        if k == len(times) - 2:
            moved = sampler.finish(process, counted, canvas, noise)
        else:
            moved = sampler.move(process, counted, canvas, torch.full_like(canvas.t, s), noise)
        runs += float(weight @ counted.runs.double()) if counted.calls else 0.0
        law = (
            _together(moved.zt, weight, noise.canvas, size)
            if apart
            else _histogram(moved.zt, weight, process)
        )
        law = law.reshape(-1)
    return SamplerMeasurement(law.reshape(size, size), runs)


def _together(zt: Tensor, weight: Tensor, canvas: Tensor, size: int) -> Tensor:
    """[S,S] the sum over canvases of the product of both positions' laws; rows zt [n,2] of a canvas have one weight."""
    parts = [
        torch.bincount(
            canvas * size + zt[:, i], weights=weight, minlength=size * (int(canvas.max()) + 1)
        ).reshape(-1, size)
        for i in (0, 1)
    ]
    return parts[0].T @ (parts[1] / parts[1].sum(-1, keepdim=True))


def _canvas(zt: Tensor, t: float) -> Canvas:
    free = torch.ones(zt.shape, dtype=torch.bool)
    return Canvas(zt, torch.full(zt.shape, t, dtype=torch.float64), ~free, free)


def _histogram(zt: Tensor, weight: Tensor, process: ForwardProcess) -> Tensor:
    """[S,S] the law of rows zt [n,2] with weights [n]."""
    size = process.vocabulary.num_states
    counts = torch.bincount(
        zt[:, 0] * size + zt[:, 1], weights=weight.double(), minlength=size * size
    )
    return (counts / counts.sum()).reshape(size, size)

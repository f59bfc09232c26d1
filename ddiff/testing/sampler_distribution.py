"""Measured distribution of a sampler's output for a joint distribution of two tokens.

The network predicts the exact distribution of each token given the other position's state. The
distance between output and joint distribution is then the error of the sampler.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts, count_evaluations
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy
from ddiff.sampling.grid_sampler import GridSampler
from ddiff.sampling.loop import Canvas, Sampler
from ddiff.testing.derived_formulas import score_from_distribution

FEW_TIMES = 64  # largest number of distinct times for which a table over states is used
FEWEST = 64  # smallest number of draws from a possible canvas
DIMENSIONS = 32  # of the Sobol points: uniforms of one step


class SamplerMeasurement(NamedTuple):
    """Measured distribution of a sampler's output, and its cost.

    Attributes:
        dist: [S,S] probabilities of the final states of both positions, for S states per position.
        runs: mean number of network evaluations per sample.
    """

    dist: Tensor
    runs: float

    def distance(self, joint: Tensor) -> float:
        """Return the total variation distance of the measured distribution to `joint` [V,V].

        `joint` contains the probabilities of pairs of tokens.
        """
        whole = torch.zeros_like(self.dist)
        whole[: len(joint), : len(joint)] = joint
        return 0.5 * float((self.dist - whole).abs().sum())


# ------------------------------------------------------------------ the exact network


def condition_on_other(
    process: ForwardProcess, joint: Tensor, zt: Tensor, t: Tensor, clean: Tensor
) -> Tensor:
    """Return log-distributions [B,2,V] of each token given the other position's state.

    Args:
        process: forward process.
        joint: [V,V] joint distribution of the two tokens.
        zt: [B,2] states.
        t: [B,2] noise times.
        clean: bool [B,2], True at positions whose state is their token.
    """
    evidence = _evidence(process, zt, t)
    token = torch.where(clean, zt, 0)
    # a clean position has its token with probability 1, also if q_0 has noise
    certain = torch.nn.functional.one_hot(token, len(joint)).to(evidence)
    evidence = torch.where(clean.unsqueeze(-1), certain, evidence)
    p = torch.stack(
        [evidence[:, 1] @ joint.T, evidence[:, 0] @ joint],
        1,
    )
    return (p / p.sum(-1, keepdim=True)).log()


def _evidence(
    process: ForwardProcess,
    zt: Tensor,
    t: Tensor,
) -> Tensor:
    """Return q_t(z_t|x) [B,2,V] of the states zt [B,2] for every token x."""
    times, place = t.unique(return_inverse=True)
    if len(times) > FEW_TIMES:
        log_likelihood = process.log_likelihood(zt.reshape(-1), t.reshape(-1))
        return log_likelihood.exp().reshape(*zt.shape, -1)
    num_states = process.vocabulary.num_states
    states = torch.arange(num_states).repeat(len(times))
    table = process.log_likelihood(states, times.repeat_interleave(num_states))
    return table[place * num_states + zt].exp()


@final
class ExactNetwork:
    """Network that predicts exactly for pairs of tokens with the joint distribution `joint` [V,V].

    If `predicts` is "score", the predictions are the scores of the exact distributions.
    """

    def __init__(
        self, process: ForwardProcess, joint: Tensor, predicts: Predicts = "distribution"
    ) -> None:
        self.process = process
        self.joint = joint
        self.predicts = predicts

    def __call__(self, noisy: Noisy) -> Query:
        return ExactQuery(self, noisy)


@final
class ExactQuery:
    """Predictions of an `ExactNetwork` for one batch of noisy states of two positions."""

    def __init__(
        self,
        network: ExactNetwork,
        noisy: Noisy,
    ) -> None:
        self.network = network
        self.noisy = noisy

    def __call__(self, rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        process = self.network.process
        noisy = self.noisy
        sequence = rows // 2
        both = condition_on_other(
            process,
            self.network.joint,
            noisy.zt[sequence],
            noisy.t[sequence],
            noisy.clean[sequence],
        )
        log_p = both[torch.arange(len(rows)), rows % 2]
        if self.network.predicts == "distribution":
            return fn(DenseDistribution(log_p, process.vocabulary), *per_row)
        zt = noisy.zt.reshape(-1)[rows]
        t = process.clamp_score_time(noisy.t.reshape(-1)[rows])
        return fn(
            score_from_distribution(process, log_p, zt, t),
            *per_row,
        )


# ------------------------------------------------------------------ random numbers


class FastRng(CounterRng):
    """Random generator that draws the uniforms of all samples from one `torch.Generator`.

    It is faster than `CounterRng`, which seeds every sample separately. There are `count` samples
    with two positions each.
    """

    def __init__(
        self,
        count: int,
        seed: int,
    ) -> None:
        super().__init__(seed, 0, torch.arange(count), 2)
        self.count = count
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(
        self,
        channel: str,
        count: int = 1,
    ) -> Tensor:
        shape = (self.count, 2, count)
        drawn = torch.rand(
            shape,
            generator=self.generator,
            dtype=torch.float64,
        )
        return drawn.squeeze(-1) if count == 1 else drawn


@final
class ShiftedSobolRng(CounterRng):
    """Random generator of Sobol points, which are shifted by a random vector for each canvas.

    A canvas is the pair of states from which a sampling step starts. A batch contains `counts[i]`
    copies of canvas i. Copy j of every canvas uses Sobol point j. The random shifts make estimates
    unbiased.
    """

    def __init__(
        self,
        counts: Tensor,
        seed: int,
    ) -> None:
        canvas = torch.arange(len(counts)).repeat_interleave(counts)
        super().__init__(seed, 0, torch.arange(len(canvas)), 2)
        self.canvas = canvas
        first_row = counts.cumsum(0) - counts
        self.place = torch.arange(len(canvas)) - first_row[canvas]
        sobol = torch.quasirandom.SobolEngine(DIMENSIONS)
        self.points = sobol.draw(int(counts.max()), dtype=torch.float64)
        self.used = 0
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(
        self,
        channel: str,
        count: int = 1,
    ) -> Tensor:
        size = 2 * count
        own = self.points[:, self.used : self.used + size]
        self.used += size
        shape = (int(self.canvas.max()) + 1, size)
        shift = torch.rand(
            shape,
            generator=self.generator,
            dtype=torch.float64,
        )
        drawn = ((own[self.place] + shift[self.canvas]) % 1.0).reshape(-1, 2, count)
        return drawn.squeeze(-1) if count == 1 else drawn


# ------------------------------------------------------------------ measurement


def measure_sampler(
    sampler: Sampler,
    process: ForwardProcess,
    joint: Tensor,
    *,
    points: int = 2**15,
    apart: bool = False,
    seed: int = 7,
    predicts: Predicts = "distribution",
) -> SamplerMeasurement:
    """Measure the distribution of a sampler's output if the network is exact.

    A `GridSampler` that passes only the canvas (the states of the batch) from step to step is
    measured step by step. Each step starts from all possible canvases, and the draws are divided
    among the canvases in proportion to their probabilities. For other samplers, whole samples are
    drawn.

    Args:
        sampler: sampler to measure.
        process: forward process.
        joint: [V,V] joint distribution of two tokens, for which the network is exact.
        points: number of draws per step, or of whole samples.
        apart: whether the two positions move independently given the canvas. The distribution after
            a step is then computed as the product of the distributions of both positions.
        seed: seed of the random generator.
        predicts: "distribution" or "score", the kind of the network's predictions.
    """
    network = ExactNetwork(process, joint, predicts)
    sampler.check_supported(process, predicts)
    if isinstance(sampler, GridSampler) and not sampler.keeps_extras:
        return _measure_by_step(sampler, process, network, points, apart, seed)
    counted = count_evaluations(network)
    rng = FastRng(points, seed)
    canvas = make_canvas(
        process.prior.draw(rng.uniform("start")),
        1.0,
    )
    for moved in sampler.run(process, counted, canvas, lambda step: rng):
        canvas = moved
    dist = _histogram(canvas.zt, torch.ones(points), process)
    return SamplerMeasurement(
        dist,
        float(counted.runs_of_batch(points).double().mean()),
    )


def _measure_by_step(
    sampler: GridSampler,
    process: ForwardProcess,
    network: Network,
    points: int,
    apart: bool,
    seed: int,
) -> SamplerMeasurement:
    """Measure the distribution of a sampler's output, one sampling step at a time.

    Each step starts from every canvas (pair of states) of positive probability. The number of draws
    from a canvas is proportional to its probability, about `points` in total. `apart` means that
    the two positions move independently given the canvas.
    """
    size = process.vocabulary.num_states
    times = sampler.times(process)
    runs = 0.0
    canvases = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    prior = process.prior.log_prob.exp()
    dist = torch.outer(prior, prior).reshape(-1)
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        possible = (dist > 0).nonzero().squeeze(-1)
        # divide the draws among canvases in proportion to their probabilities
        counts = (points * dist[possible]).long().clamp(min=FEWEST)
        # the weights of a canvas sum to its probability
        weight = (dist[possible] / counts).repeat_interleave(counts)
        rng = ShiftedSobolRng(counts, seed + 1000 * k)
        counted = count_evaluations(network)
        canvas = make_canvas(
            canvases[possible].repeat_interleave(counts, 0),
            t,
        )
        if k == len(times) - 2:
            moved = sampler.finish(process, counted, canvas, rng)
        else:
            moved = sampler.move(
                process,
                counted,
                canvas,
                torch.full_like(canvas.t, s),
                rng,
            )
        if counted.calls:
            runs += float(weight @ counted.runs_of_batch(len(weight)).double())
        if apart:
            dist = _sum_of_products(moved.zt, weight, rng.canvas, size)
        else:
            dist = _histogram(moved.zt, weight, process)
        dist = dist.reshape(-1)
    return SamplerMeasurement(dist.reshape(size, size), runs)


def _sum_of_products(
    zt: Tensor,
    weight: Tensor,
    canvas: Tensor,
    size: int,
) -> Tensor:
    """Return the distribution [S,S] of a step that draws both positions independently.

    The result is a weighted sum, over the states before the step (canvases), of the product of the
    two positions' distributions.

    Args:
        zt: [n,2] drawn states.
        weight: [n] weights of the draws, equal for all draws from one canvas.
        canvas: [n] index of the canvas (pair of states) from which each row was drawn.
        size: number S of states.
    """
    bins = size * (int(canvas.max()) + 1)
    first = torch.bincount(
        canvas * size + zt[:, 0],
        weights=weight,
        minlength=bins,
    )
    second = torch.bincount(
        canvas * size + zt[:, 1],
        weights=weight,
        minlength=bins,
    )
    first = first.reshape(-1, size)
    second = second.reshape(-1, size)
    return first.T @ (second / second.sum(-1, keepdim=True))


def make_canvas(zt: Tensor, t: float) -> Canvas:
    """Make the `Canvas` (state of a batch) with states zt, in which all positions have time t.

    The sampler may change every position.
    """
    free = torch.ones(zt.shape, dtype=torch.bool)
    return Canvas(
        zt,
        torch.full(zt.shape, t, dtype=torch.float64),
        ~free,
        free,
    )


def _histogram(
    zt: Tensor,
    weight: Tensor,
    process: ForwardProcess,
) -> Tensor:
    """Return the joint distribution [S,S] of drawn pairs of states, for S states per position.

    Row i of zt [n,2] is a drawn pair with the weight `weight[i]`.
    """
    size = process.vocabulary.num_states
    cell = zt[:, 0] * size + zt[:, 1]
    counts = torch.bincount(
        cell,
        weights=weight.double(),
        minlength=size * size,
    )
    return (counts / counts.sum()).reshape(size, size)

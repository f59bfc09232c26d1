"""Conformance checks of a sampler: its declarations, compared with the distribution of its samples.

A sample is a pair of tokens. The network predicts exactly for a known joint distribution of two
tokens, JOINT. The total variation distance between samples and joint distribution is therefore the
error of the sampler. A check takes a function that makes a `Sampler` for a given number of steps,
because an order of convergence can only be measured over several numbers of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import MixtureProcess
from ddiff.core.elbo import Network
from ddiff.core.network import Predicts, count_evaluations
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import Noisy
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError
from ddiff.sampling.loop import Quality, Sampler, generate
from ddiff.testing.report import Gap, LawReport, compare, evaluate_laws, law
from ddiff.testing.sampler_distribution import ExactNetwork, FastRng, make_canvas

JOINT = torch.tensor(
    [[0.30, 0.02, 0.08], [0.02, 0.20, 0.03], [0.05, 0.05, 0.25]], dtype=torch.float64
)
"""Joint distribution P(x_1, x_2) of two tokens.

Its total variation distance to the product of its marginals is 0.41."""

POINTS = 2**15  # samples; a true distance of 0 is measured as about 0.006
SAMPLING = 0.006  # contribution of the random samples to a distance
NOISE = 0.02
MEASURABLE = 0.05  # smallest distance from which an order is measured
FEW = 2  # fewest steps from which an order is measured
MANY = 8  # most steps from which an order is measured
SLACK = 0.6  # of an order: rates are clipped at 0 for this joint, which lowers the measured order


class SamplerCase(NamedTuple):
    """Sampler to check, with the process and the kind of network that it uses.

    Attributes:
        build: function that makes the sampler for a number of steps.
        process: forward process; None for next-token models.
        predicts: "distribution" or "score", the kind of the network's predictions.
    """

    build: Callable[[int], Sampler]
    process: ForwardProcess | None
    predicts: Predicts = "distribution"

    @property
    def vocabulary(self) -> Vocabulary:
        return _vocabulary_of(self.process)

    def make_network(self) -> Network:
        if self.process is None:
            return NextTokenNetwork(self.vocabulary)
        exact = ExactNetwork(self.process, JOINT, self.predicts)
        return count_evaluations(exact, self.predicts)

    def generate(self, steps: int, index: Tensor, seed: int, **options: Any) -> Tensor:
        """Generate the samples with the indices `index` [B] and return their token ids [B,2].

        Each sample has two tokens. `options` are further arguments of
        `ddiff.sampling.loop.generate`.
        """
        sampler = self.build(steps)
        network = self.make_network()
        samples = generate(
            sampler, self.process, network, index=index, length=2, seed=seed, **options
        )
        return samples.ids


class NextTokenNetwork:
    """Network of a next-token model, which predicts each token given the previous token.

    The predictions are exact for the joint distribution JOINT of two tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, noisy: Noisy) -> Query:
        def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            # before the first draw, the state may be a mask
            before = noisy.zt[rows // 2, 0].clamp(max=len(JOINT) - 1)
            is_first = (rows % 2 == 0).unsqueeze(-1)
            p = torch.where(is_first, JOINT.sum(1), JOINT[before])
            log_p = (p / p.sum(-1, keepdim=True)).log()
            return fn(DenseDistribution(log_p, self.vocabulary), *per_row)

        return query


def small_processes() -> dict[str, ForwardProcess | None]:
    """Return the processes on which samplers are checked, by name.

    They are masked diffusion, diffusion on a tree and uniform noise, on three tokens each. The
    fourth entry is None, for samplers of next-token models.
    """
    unmasked = FlatVocabulary(3, mask=False)
    tree = HierarchicalVocabulary([[0, 1, 0]])
    return {
        "masks": TreeProcess(FlatVocabulary(3), CdfClock([LinearSchedule()])),
        "a tree": TreeProcess(tree, LogTimeClock((1.0, 1.0))),
        "uniform noise": MixtureProcess(unmasked, LinearSchedule(), torch.full((3,), 1 / 3)),
        "no process": None,
    }


def check_sampler(
    build: Callable[[int], Sampler],
    process: ForwardProcess | None,
    predicts: Predicts = "distribution",
) -> list[LawReport]:
    """Apply every conformance check of samplers to a sampler on one small process.

    Args:
        build: function that makes the sampler for a number of steps.
        process: process on three tokens, as in `small_processes`; None for a next-token model.
        predicts: "distribution" or "score", the kind of the network's predictions.

    Raises ArgumentError if the sampler's `check_supported` rejects the process.
    """
    case = SamplerCase(build, process, predicts)
    build(FEW).check_supported(process, predicts)
    return evaluate_laws(case, SAMPLER_LAWS)


def measure_distance(case: SamplerCase, steps: int) -> float:
    """Measure the total variation distance of the samples from the exact joint distribution.

    The sampler runs with `steps` steps. `POINTS` samples are drawn for a process, and a quarter of
    `POINTS` for a next-token model.
    """
    if case.process is None:
        final = case.generate(
            steps,
            torch.arange(POINTS // 4),
            seed=7,
        )
    else:
        final = _draw_samples(case, case.process, steps)
    size = case.vocabulary.num_states
    cell = final[:, 0] * size + final[:, 1]
    counts = torch.bincount(cell, minlength=size * size).reshape(size, size)
    expected = torch.zeros(size, size, dtype=torch.float64)
    expected[: len(JOINT), : len(JOINT)] = JOINT
    return 0.5 * float((counts / counts.sum() - expected).abs().sum())


def _draw_samples(
    case: SamplerCase,
    process: ForwardProcess,
    steps: int,
) -> Tensor:
    """Draw samples [POINTS,2] with a random generator that is faster than that of `generate`."""
    rng = FastRng(POINTS, seed=7)
    canvas = make_canvas(
        process.prior.draw(rng.uniform("start")),
        1.0,
    )
    sampler = case.build(steps)
    for moved in sampler.run(process, case.make_network(), canvas, lambda step: rng):
        canvas = moved
    return canvas.zt


# ------------------------------------------------------------------ laws


@law("sampler: declarations are consistent", tolerance=0.0)
def declarations_are_consistent(case: SamplerCase) -> Iterator[Gap]:
    """Check that the declared `quality` and `order` of a sampler are consistent.

    `quality` must be "exact", "of an order" or "heuristic". `order`, the order of convergence, must
    be at least 1 if `quality` is "of an order", and 0 otherwise. Tolerance 0: the conditions are
    exact.
    """
    sampler = case.build(FEW)
    is_unknown = sampler.quality not in get_args(Quality)
    yield compare(
        torch.tensor(int(is_unknown)),
        0.0,
        {"quality": sampler.quality},
    )
    if sampler.quality == "of an order":
        is_wrong = sampler.order < 1
    else:
        is_wrong = sampler.order != 0
    labels = {"quality": sampler.quality, "order": sampler.order}
    yield compare(torch.tensor(int(is_wrong)), 0.0, labels)


@law("sampler: yields as many canvases as steps", tolerance=0.0)
def canvases_are_counted(case: SamplerCase) -> Iterator[Gap]:
    """Check that `run` yields as many canvases as the property `steps` declares.

    A canvas is the state of a batch during sampling, and `run` yields one after each step. The
    check does not apply if `steps` is None. Tolerance 0: canvases are counted.
    """
    for steps in (1, 3):
        declared = case.build(steps).steps
        if declared is not None:
            count = torch.tensor(_count_canvases(case, steps))
            yield compare(count, float(declared), {"steps": steps})


def _count_canvases(case: SamplerCase, steps: int) -> int:
    seen: list[int] = []
    case.generate(
        steps,
        torch.arange(4),
        seed=3,
        on_step=lambda k, _: seen.append(k),
    )
    return len(seen)


@law("sampler: returns tokens and keeps the prompt", tolerance=0.0)
def ends_in_tokens(case: SamplerCase) -> Iterator[Gap]:
    """Check that samples contain only tokens and that prompt positions keep their tokens.

    Tolerance 0: ids are integers.
    """
    index = torch.arange(64)
    prompt = torch.stack([index % 3, (index // 3) % 3], -1)
    for positions in ([False, False], [True, False], [True, True]):
        prompt_mask = torch.tensor(positions).expand(64, 2)
        ids = case.generate(
            3,
            index,
            seed=5,
            prompt=prompt,
            prompt_mask=prompt_mask,
        )
        not_tokens = (ids >= len(JOINT)).sum()
        changed = (prompt_mask & (ids != prompt)).sum()
        yield compare(not_tokens, 0.0, {"states that are not tokens, prompt at": positions})
        yield compare(changed, 0.0, {"changed tokens of the prompt, prompt at": positions})


@law("sampler: a sample does not depend on its batch", tolerance=0.0)
def samples_are_independent_of_batch(case: SamplerCase) -> Iterator[Gap]:
    """Check that a sample depends only on the seed and the index of the sample.

    The same samples are drawn a second time, in a smaller batch, and in reverse order. They must be
    equal each time. Tolerance 0: ids are integers.
    """
    index = torch.arange(24)
    expected = case.generate(3, index, seed=11)

    def gap(rows: Tensor, how: str) -> Gap:
        drawn = case.generate(3, rows, seed=11)
        return compare(
            drawn,
            expected[rows].double(),
            {"drawn": how},
        )

    yield gap(index, "again")
    yield gap(index[5:9], "in a smaller batch")
    yield gap(index.flip(0), "in another order")


@law("sampler: exact if declared exact", tolerance=NOISE)
def exact_samplers_are_exact(case: SamplerCase) -> Iterator[Gap]:
    """Check that a sampler that declares the quality "exact" draws from the joint distribution.

    The check runs with one and with several steps. The error is the total variation distance
    between samples and joint distribution. Tolerance 0.02: the randomness of the samples adds
    0.006.
    """
    if case.build(FEW).quality != "exact":
        return
    has_steps = case.build(1).steps is not None
    for steps in (1, FEW) if has_steps else (1,):
        distance = torch.tensor(measure_distance(case, steps))
        yield compare(distance, 0.0, {"total variation at steps": steps})


@law("sampler: reaches its declared order", tolerance=SLACK)
def orders_are_reached(case: SamplerCase) -> Iterator[Gap]:
    """Check that a sampler reaches its declared order of convergence.

    With order p, four times as many steps must divide the total variation distance between samples
    and joint distribution by 4^p, for at least one number of steps. The number of steps is doubled
    until the distance is too small to measure. The error is the declared order minus the largest
    measured order. Trees are not tested, because their orders can be measured only with many steps.
    Tolerance 0.6: some rates are clipped at 0 for this joint distribution, which lowers the
    measured order by up to 0.6.
    """
    sampler = case.build(FEW)
    if sampler.quality != "of an order" or case.vocabulary.num_levels > 1:
        return
    steps = FEW
    distance = measure_distance(case, steps)
    best = -math.inf
    while distance >= MEASURABLE and best < sampler.order - SLACK and steps <= MANY:
        finer = max(
            measure_distance(case, 4 * steps) - SAMPLING,
            1e-6,
        )
        best = max(
            best,
            math.log(distance / finer) / math.log(4),
        )
        steps *= 2
        distance = measure_distance(case, steps)
    missing = max(0.0, sampler.order - best)
    if best == -math.inf and distance < MEASURABLE:
        missing = 0.0  # the first distance is too small to measure an order
    labels = {"order": sampler.order, "best measured": f"{best:.2f}"}
    yield compare(torch.tensor(missing), 0.0, labels)


SAMPLER_LAWS = (
    declarations_are_consistent,
    canvases_are_counted,
    ends_in_tokens,
    samples_are_independent_of_batch,
    exact_samplers_are_exact,
    orders_are_reached,
)


# ------------------------------------------------------------------ processes accepted by a sampler


def find_accepted_processes(
    build: Callable[[Vocabulary, int], Sampler],
) -> tuple[dict[str, SamplerCase], list[str]]:
    """Find the processes of `small_processes()` that a sampler accepts.

    `build(vocabulary, steps)` makes the sampler. Only an ArgumentError counts as a rejection; other
    exceptions are raised.

    Returns:
        - the accepted processes as cases to check, by name,
        - the error messages of the rejections.
    """
    cases: dict[str, SamplerCase] = {}
    rejected: list[str] = []
    for name, predicts, case in _candidates(build):
        try:
            case.build(FEW).check_supported(case.process, predicts)
        except ArgumentError as error:
            rejected.append(f"{name}, {predicts}: {error}")
        else:
            cases[f"{name}, {predicts}"] = case
    return cases, rejected


def _candidates(
    build: Callable[[Vocabulary, int], Sampler],
) -> Iterator[tuple[str, Predicts, SamplerCase]]:
    for name, process in small_processes().items():
        build_steps = partial(build, _vocabulary_of(process))
        yield name, "distribution", SamplerCase(build_steps, process, "distribution")
        # a next-token model has no score
        if process is not None:
            yield name, "score", SamplerCase(build_steps, process, "score")


def _vocabulary_of(process: ForwardProcess | None) -> Vocabulary:
    return FlatVocabulary(3) if process is None else process.vocabulary

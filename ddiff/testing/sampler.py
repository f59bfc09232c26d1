"""What a sampler declares, held against the distribution of its samples on small joints that are known.

The network is exact (`enumerated.ExactNetwork`), so that what is left is the sampler's own error: the total variation
between its samples and a joint of two symbols. `steps -> Sampler` is what is checked, since an order shows only over
several numbers of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.elbo import Network
from ddiff.core.interpolating import MixtureProcess
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess, Query, RowFunction
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import Noisy
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError
from ddiff.sampling.loop import Canvas, Quality, Sampler, Says, generate
from ddiff.testing.report import Gap, LawReport, compare, evaluate_laws, law
from ddiff.testing.sampler_distribution import ExactNetwork, FastRng

JOINT = torch.tensor(
    [[0.30, 0.02, 0.08], [0.02, 0.20, 0.03], [0.05, 0.05, 0.25]], dtype=torch.float64
)
"""P(x_1, x_2), .41 in total variation from the product of its marginals."""

POINTS = 2**15  # samples: a distance of 0 is measured as about .006
SAMPLING = 0.006  # what the noise of the samples adds to a distance
NOISE = 0.02
TELLING = 0.05  # a distance from which an order can be measured
FEW, MANY = 2, 8  # the numbers of steps, the first and the last, from which an order is measured
SLACK = 0.6  # of an order: rates are cut off at 0 on this joint, which takes half of it from the second order


class SamplerCase(NamedTuple):
    """A sampler for any number of steps, the process that it reverses (None: next-token models), what it is told."""

    build: Callable[[int], Sampler]
    process: ForwardProcess | None
    predicts: Says = "law"

    @property
    def vocabulary(self) -> Vocabulary:
        return FlatVocabulary(3) if self.process is None else self.process.vocabulary

    def network(self) -> Network:
        return (
            NextTokenNetwork(self.vocabulary)
            if self.process is None
            else ExactNetwork(self.process, JOINT, self.predicts)
        )


class NextTokenNetwork:
    """The distribution of each symbol of the joint given the one before it, from the states of a canvas [B,2]."""

    predicts: Says = "law"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, noisy: Noisy) -> Query:
        def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            before = noisy.zt[rows // 2, 0].clamp(max=len(JOINT) - 1)
            p = torch.where((rows % 2 == 0).unsqueeze(-1), JOINT.sum(1), JOINT[before])
            return fn(
                DenseDistribution((p / p.sum(-1, keepdim=True)).log(), self.vocabulary), *per_row
            )

        return query


def small_processes() -> dict[str, ForwardProcess | None]:
    """Masks, a tree, uniform noise, and no process, on three tokens; a sampler refuses those that it does not suit."""
    return {
        "masks": TreeProcess(FlatVocabulary(3), CdfClock([LinearSchedule()])),
        "a tree": TreeProcess(HierarchicalVocabulary([[0, 1, 0]]), LogTimeClock((1.0, 1.0))),
        "uniform noise": MixtureProcess(
            FlatVocabulary(3, mask=False), LinearSchedule(), torch.full((3,), 1 / 3)
        ),
        "no process": None,
    }


def check_sampler(
    build: Callable[[int], Sampler], process: ForwardProcess | None, predicts: Says = "law"
) -> list[LawReport]:
    """Every law of samplers on one process of three tokens, such as those of `small_processes`.

    `build(steps)` makes the sampler. Raises ArgumentError where it refuses the process: its `needs` then says why.
    """
    subject = SamplerCase(build, process, predicts)
    build(FEW).needs(process, predicts)
    return evaluate_laws(subject, LAWS)


def distance(subject: SamplerCase, steps: int) -> float:
    """Total variation between the joint and `POINTS` samples."""
    sampler, process = subject.build(steps), subject.process
    if process is None:
        index = torch.arange(POINTS // 4)
        final = generate(sampler, None, subject.network(), index=index, length=2, seed=7).ids
    else:
        noise: Any = FastRng(POINTS, seed=7)
        start = process.prior.draw(noise.uniform("start"))
        free = torch.ones(start.shape, dtype=torch.bool)
        canvas = Canvas(start, torch.ones(start.shape, dtype=torch.float64), ~free, free)
        for canvas in sampler.run(process, subject.network(), canvas, lambda step: noise):  # noqa: B007, B020
            pass
        final = canvas.zt
    size = subject.vocabulary.num_states
    counts = torch.bincount(final[:, 0] * size + final[:, 1], minlength=size * size).reshape(
        size, size
    )
    due = torch.zeros(size, size, dtype=torch.float64)
    due[: len(JOINT), : len(JOINT)] = JOINT
    return 0.5 * float((counts / counts.sum() - due).abs().sum())


@law("sampler: its declarations are whole", tolerance=0.0)
def declarations_are_whole(subject: SamplerCase) -> Iterator[Gap]:
    """`quality` is "exact", "of an order" or "heuristic", and `order` is at least 1 for the second and 0 for the others.
    Counts: nothing is allowed."""
    sampler = subject.build(FEW)
    known = sampler.quality in get_args(Quality)
    yield compare(torch.tensor(int(not known)), 0.0, {"quality": sampler.quality})
    whole = sampler.order >= 1 if sampler.quality == "of an order" else sampler.order == 0
    yield compare(
        torch.tensor(int(not whole)), 0.0, {"quality": sampler.quality, "order": sampler.order}
    )


@law("sampler: as many canvases as steps", tolerance=0.0)
def canvases_are_counted(subject: SamplerCase) -> Iterator[Gap]:
    """`run` yields as many canvases as `steps` says, where it says a number. Counts: nothing is allowed."""
    for steps in (1, 3):
        sampler = subject.build(steps)
        if sampler.steps is not None:
            yield compare(
                torch.tensor(_canvases(sampler, subject)), float(sampler.steps), {"steps": steps}
            )


def _canvases(sampler: Sampler, subject: SamplerCase) -> int:
    """How many canvases a run yields."""
    seen: list[int] = []
    index = torch.arange(4)
    generate(
        sampler,
        subject.process,
        subject.network(),
        index=index,
        length=2,
        seed=3,
        on_step=lambda k, _: seen.append(k),
    )
    return len(seen)


@law("sampler: ends in tokens and keeps what is given", tolerance=0.0)
def ends_in_tokens(subject: SamplerCase) -> Iterator[Gap]:
    """The last canvas holds only tokens, and given positions hold what was given, bit for bit.

    Counts: nothing is allowed."""
    index = torch.arange(64)
    given = torch.stack([index % 3, (index // 3) % 3], -1)
    for where in ([False, False], [True, False], [True, True]):
        clamped = torch.tensor(where).expand(64, 2)
        ids = generate(
            subject.build(3),
            subject.process,
            subject.network(),
            index=index,
            length=2,
            seed=5,
            given=given,
            clamped=clamped,
        ).ids
        yield compare((ids >= len(JOINT)).sum(), 0.0, {"states that are no token, given": where})
        yield compare((clamped & (ids != given)).sum(), 0.0, {"changed tokens, given": where})


@law("sampler: a sample does not depend on its batch", tolerance=0.0)
def samples_are_their_own(subject: SamplerCase) -> Iterator[Gap]:
    """A sample is a function of its number and the seed: drawn alone, in company and again it is the same. Exactly."""
    index = torch.arange(24)

    def drawn(chosen: Tensor) -> Tensor:
        return generate(
            subject.build(3), subject.process, subject.network(), index=chosen, length=2, seed=11
        ).ids

    together = drawn(index)
    yield compare(drawn(index), together.double(), {"drawn": "again"})
    yield compare(drawn(index[5:9]), together[5:9].double(), {"drawn": "in less company"})
    backwards = index.flip(0)
    yield compare(drawn(backwards), together[backwards].double(), {"drawn": "in another order"})


@law("sampler: exact where it says so", tolerance=NOISE)
def exact_samplers_are_exact(subject: SamplerCase) -> Iterator[Gap]:
    """Samples of an exact sampler have the joint distribution, whatever the steps: .006 is the noise of the samples."""
    if subject.build(FEW).quality == "exact":
        for steps in (1, FEW)[
            : 1 if subject.build(1).steps is None else 2
        ]:  # None: steps change nothing
            yield compare(
                torch.tensor(distance(subject, steps)), 0.0, {"total variation at steps": steps}
            )


@law("sampler: of the order that it declares", tolerance=SLACK)
def orders_are_reached(subject: SamplerCase) -> Iterator[Gap]:
    """Somewhere a fourfold number of steps divides the distance by 4^order; measured is by how much the best order falls
    short. Steps grow until the distance is too small to tell an order from the noise of the samples. On this joint rates
    are cut off at 0, which costs up to .6 of an order. Not measured on trees, where orders show only after many steps."""
    sampler = subject.build(FEW)
    if sampler.quality != "of an order" or subject.vocabulary.num_levels > 1:
        return
    steps, few, best = FEW, distance(subject, FEW), -math.inf
    while few >= TELLING and best < sampler.order - SLACK and steps <= MANY:
        best = max(
            best, math.log(few / max(distance(subject, 4 * steps) - SAMPLING, 1e-6)) / math.log(4)
        )
        steps *= 2
        few = distance(subject, steps)
    missing = 0.0 if best == -math.inf and few < TELLING else max(0.0, sampler.order - best)
    yield compare(
        torch.tensor(missing), 0.0, {"order": sampler.order, "best measured": f"{best:.2f}"}
    )


LAWS = (
    declarations_are_whole,
    canvases_are_counted,
    ends_in_tokens,
    samples_are_their_own,
    exact_samplers_are_exact,
    orders_are_reached,
)


def find_accepted_processes(
    build: Callable[[Vocabulary, int], Sampler],
) -> tuple[dict[str, SamplerCase], list[str]]:
    """The small processes that a sampler takes, by name, and the reasons for which it refuses the others.

    `build(vocabulary, steps)` makes the sampler. What is no ArgumentError is no refusal, and is raised.
    """
    subjects: dict[str, SamplerCase] = {}
    refused: list[str] = []
    for name, process in small_processes().items():
        for predicts in ("law", "score") if process is not None else ("law",):
            subject = SamplerCase(partial(build, _vocabulary(process)), process, predicts)
            try:
                subject.build(FEW).needs(process, predicts)
            except ArgumentError as error:
                refused.append(f"{name}, {predicts}: {error}")
            else:
                subjects[f"{name}, {predicts}"] = subject
    return subjects, refused


def _vocabulary(process: ForwardProcess | None) -> Vocabulary:
    return FlatVocabulary(3) if process is None else process.vocabulary

"""Measure error and network evaluations of all samplers on all forward processes they support.

python benchmarks/sampler_matrix.py                # write docs/samplers.md, about half an hour
python benchmarks/sampler_matrix.py --only mdlm gidd --points 4096 --out /tmp/samplers.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddiff import (
    AdaptiveCorrectionSampler,
    AnalyticSampler,
    AncestralSampler,
    BlockwiseSampler,
    CapRemasking,
    ConfidenceRemasking,
    DenseProcess,
    EntropyBoundSampler,
    FirstHittingSampler,
    FlatVocabulary,
    ForwardBackward,
    ForwardProcess,
    HierarchicalVocabulary,
    LoopGrid,
    LoopRemasking,
    OneLevelSampler,
    PredictorCorrectorSampler,
    PsiSampler,
    RescaleRemasking,
    Sampler,
    SelfCorrectingSampler,
    TauLeapingSampler,
    TrapezoidalSampler,
    UnmaskingSampler,
    Vocabulary,
)
from ddiff.errors import ArgumentError
from ddiff.plugin.loader import load_plugins
from ddiff.testing.sampler_distribution import measure_sampler

JOINT = torch.tensor(
    [[0.30, 0.02, 0.08], [0.02, 0.20, 0.03], [0.05, 0.05, 0.25]], dtype=torch.float64
)
STEPS = (1, 2, 4, 8, 16, 32, 64)
HEAD = """# Samplers, measured

This page helps to choose a sampler. It lists the error of every sampler on every process that the sampler supports, for 1
to 64 steps. The page is the output of `python benchmarks/sampler_matrix.py`.

**What is measured.** The data are two tokens with the joint distribution

{joint}

The rows are the values of the first token, the columns those of the second. In place of a network, the sampler gets the
exact distribution of each token given the state of the other position, so that the sampler is the only source of error.
The tables show the total variation distance between the samples and the joint distribution, for N steps. The small number
below each distance is the number of network evaluations per sample. For comparison, sampling
both tokens independently from their marginals has the distance {far:.3f}.

| accuracy | meaning |
|---|---|
| exact | samples follow the distribution of the network; with uniform noise `first_hitting` has an error of 1e-6 |
| order n | the error falls as 1/N^n, unless the notes below give another order for the process |
| heuristic | the error does not vanish for large N, or no proof that it vanishes is known |

In rows marked `score`, the sampler gets scores in place of distributions. A score is the ratio of the marginal probabilities
of two states, as the head `score` predicts it. The scores are computed from the same exact distributions. Only processes on
flat vocabularies (tokens, or tokens and a mask) have such rows.

If the table of a process has no row for a sampler, ddiff refuses this sampler for the process. The section
[Refused samplers](#refused-samplers) gives the error messages.

**Precision.** The distances are estimated from random draws:

| sampler | method | statistical error of the distance |
|---|---|---|
| the two positions change independently in a step | the distribution over pairs of states is computed from step to step, with {points} draws per step | up to {fine:.3f} at N = 64, smaller for fewer steps |
| any other | the states are counted in {others} draws, per step or of whole samples | about {coarse:.3f} |

For comparison, the exact distance of the sampler `ancestral` is .0064 for masked diffusion at N = 64.

**Notes**

- **hybrid_epsilon.** This process replaces a tenth of the tokens by uniformly drawn tokens at t = 0. Only the final sampling step
  (decoding) reverses this noise. The final step draws all positions independently. Every sampler that draws both tokens in
  the final step, including `first_hitting`, therefore keeps an error of the order of (.1 L)^2 / 2 = .02 for L = 2 tokens.

- **hdlm with gamma < 1.** Here gamma is the rate at which tokens move to clusters. `tau_leaping` and `trapezoidal` use the
  rates at the start of a step. With gamma < 1, the rate of leaving the mask is infinite at t = 1, so all positions leave the
  mask in the first step. The distance then hardly falls with the number of steps N: with gamma = 0.5, it is 0.06 at N = 128
  and at N = 512. Use another sampler for such a process.

- **trapezoidal.** This sampler extrapolates rates within a step. It has order 2 if the extrapolated rates stay positive and
  are smooth in t. With the joint distribution above, some extrapolated rates are negative and are clipped at 0, because one
  token makes a value of the other token six times less likely. The order therefore falls from 1.5 towards 1 as N grows (exact
  distances for masks at N = 4, 8, ..., 128: .0455, .0166, .0065, .0028, .0013, .0006). For gidd, reverse rates are infinite
  at t = 1, and the order is 1.
  `tests/sampling/test_trapezoidal.py` tests order 2 on tokens with a weaker dependence.
"""

REFUSED = """ddiff refuses the samplers below. Each quotation is an error message, in which SAMPLER and PROCESS
stand for class names. The list after a message names the refused samplers of each process.
"""

Refused = dict[str, dict[str, list[str]]]  # error message -> process -> samplers


class Entry(NamedTuple):
    build: Callable[[int], Sampler]
    apart: bool = False  # positions move independently given the canvas
    single: bool = False  # the sampler has no number of steps


SAMPLERS: dict[str, Entry] = {
    "first_hitting": Entry(lambda n: FirstHittingSampler(), single=True),
    "blockwise, width 1": Entry(lambda n: BlockwiseSampler(AncestralSampler(n), 1)),
    "ancestral": Entry(AncestralSampler, apart=True),
    "tau_leaping": Entry(TauLeapingSampler, apart=True),
    "analytic": Entry(AnalyticSampler, apart=True),
    "trapezoidal": Entry(TrapezoidalSampler),
    "one_level": Entry(OneLevelSampler, apart=True),
    "dfm": Entry(lambda n: PredictorCorrectorSampler(AncestralSampler(n), ForwardBackward())),
    "psi, kappa .9": Entry(PsiSampler, apart=True),
    "psi, kappa .5": Entry(lambda n: PsiSampler(n, 0.5), apart=True),
    "remdm cap": Entry(lambda n: PsiSampler(n, CapRemasking()), apart=True),
    "remdm rescale": Entry(lambda n: PsiSampler(n, RescaleRemasking()), apart=True),
    "remdm confidence": Entry(lambda n: PsiSampler(n, ConfidenceRemasking())),
    "remdm loop": Entry(lambda n: PsiSampler(LoopGrid(n), LoopRemasking()), apart=True),
    "acs": Entry(AdaptiveCorrectionSampler, apart=True),
    "self_correction": Entry(lambda n: SelfCorrectingSampler(AncestralSampler(n), rounds=16)),
    "confidence": Entry(UnmaskingSampler),
    "margin": Entry(lambda n: UnmaskingSampler(n, "margin")),
    "entropy": Entry(lambda n: EntropyBoundSampler(), single=True),
}


def processes() -> dict[str, Callable[[], ForwardProcess]]:
    """Return a constructor for every process by name, on a vocabulary of three tokens."""
    masked, bare, tree = (
        FlatVocabulary(3),
        FlatVocabulary(3, mask=False),
        HierarchicalVocabulary([[0, 1, 0]]),
    )
    rates = torch.tensor(
        [[-3.0, 2.0, 1.0], [0.5, -1.5, 1.0], [1.0, 1.0, -2.0]], dtype=torch.float64
    )

    def of(kind: str, vocabulary: Vocabulary, **keys: Any) -> Callable[[], ForwardProcess]:
        def build() -> ForwardProcess:
            component = load_plugins([kind.partition("_")[0]]).component("process", kind).load()
            return component.build(component.Config(**keys), vocabulary=vocabulary)

        return build

    return {
        "mdlm": of("mdlm", masked),
        "hdlm": of("hdlm", tree),
        "hdlm, xi .8": of("hdlm", tree, xi=0.8),
        "gidd": of("gidd", masked, p_uniform=0.2),
        "sedd uniform": of("sedd", bare, graph="uniform"),
        "hybrid_epsilon": of("hybrid_epsilon", masked, epsilon=0.1),
        "hybrid_gamma": of("hybrid_gamma", masked, gamma=0.3),
        "dense": lambda: DenseProcess(bare, rates),
    }


def rows(
    name: str, process: ForwardProcess, steps: Sequence[int], points: int, refused: Refused
) -> Iterator[str]:
    for label, entry in SAMPLERS.items():
        sampler = entry.build(4)
        try:
            sampler.check_supported(process, "distribution")
        except ArgumentError as error:
            # messages of different pairs differ only in the names of the two classes
            message = str(error).replace(type(sampler).__name__, "SAMPLER")
            message = message.replace(type(process).__name__, "PROCESS")
            refused.setdefault(message, {}).setdefault(name, []).append(label)
            continue
        yield row(label, entry, process, steps, points, "distribution", name)
        if takes_scores(sampler, process):
            yield row(f"{label}, score", entry, process, steps, points, "score", name)


def refused_section(refused: Refused) -> Iterator[str]:
    """Yield the lines of the page section on refused samplers, grouped by error message.

    `refused` maps error message -> process -> samplers.
    """
    yield "\n## Refused samplers\n"
    yield REFUSED
    for message, pairs in refused.items():
        yield f"> {message}\n"
        for process, samplers in pairs.items():
            yield f"- {process}: {', '.join(samplers)}"
        yield ""


def takes_scores(sampler: Sampler, process: ForwardProcess) -> bool:
    """Return whether sampler and process support a network that predicts scores."""
    if process.vocabulary.num_levels > 1:
        return False
    try:
        sampler.check_supported(process, "score")
    except ArgumentError:
        return False
    return True


def row(
    label: str,
    entry: Entry,
    process: ForwardProcess,
    steps: Sequence[int],
    points: int,
    predicts: str,
    name: str,
) -> str:
    """Return a table row: distances and network evaluations for each number of steps.

    A distance is the total variation between the samples and the exact distribution.

    Args:
        label: name of the sampler in the table.
        entry: constructor and properties of the sampler.
        process: forward process.
        steps: numbers of sampling steps.
        points: draws per step.
        predicts: "distribution" or "score", the kind of prediction of the network.
        name: name of the process, for the progress line.
    """
    begun = time.perf_counter()
    share = points if entry.apart else 4 * points
    cells = []
    for count in steps[:1] if entry.single else steps:
        result = measure_sampler(
            entry.build(count), process, JOINT, points=share, apart=entry.apart, predicts=predicts
        )
        cells.append(f"{result.distance(JOINT):.4f}<br><sub>{result.runs:.1f}</sub>")
    cells += [""] * (len(steps) - len(cells))
    sampler = entry.build(4)
    kind = f"order {sampler.order}" if sampler.quality == "of an order" else sampler.quality
    print(f"{name}: {label}, {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return f"| {label} | {kind} | " + " | ".join(cells) + " |"


def pages(names: Sequence[str], steps: Sequence[int], points: int) -> Iterator[str]:
    """Yield the text of docs/samplers.md so far, each time a forward process has been measured.

    names: names of the forward processes. steps: numbers of sampling steps of the table columns.
    points: number of samples drawn per sampling step.
    """
    refused: Refused = {}
    joint = "\n".join("    " + "  ".join(f"{p:.2f}" for p in row) for row in JOINT.tolist())
    far = 0.5 * float((torch.outer(JOINT.sum(1), JOINT.sum(0)) - JOINT).abs().sum())
    parts = [
        HEAD.format(
            joint=joint,
            far=far,
            points=points,
            others=4 * points,
            fine=28.0 / points,
            coarse=1.0 / (4 * points) ** 0.5,
        )
    ]
    for name in names:
        table = [
            f"\n## {name}\n",
            "| sampler | accuracy | " + " | ".join(f"N = {n}" for n in steps) + " |",
        ]
        table += [
            "|---" * (len(steps) + 2) + "|",
            *rows(name, processes()[name](), steps, points, refused),
        ]
        parts += table
        yield "\n".join([*parts, *refused_section(refused)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(processes()),
        help="names of processes; default: all processes",
    )
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="numbers of steps")
    parser.add_argument("--points", type=int, default=2**12, help="random draws per step")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "docs" / "samplers.md"
    )
    given = parser.parse_args()
    for text in pages(given.only or list(processes()), given.steps, given.points):
        part = given.out.with_suffix(".part")
        part.write_text(text)
        part.replace(given.out)


if __name__ == "__main__":
    main()

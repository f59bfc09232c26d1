"""Every sampler on every process that it accepts: how far its samples are from the truth, and for how many network calls.

python benchmarks/sampler_matrix.py                      # all of it into docs/samplers.md, about half an hour
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
    Cap,
    Confidence,
    DenseProcess,
    EntropyBoundSampler,
    FirstHittingSampler,
    FlatVocabulary,
    ForwardBackward,
    ForwardProcess,
    HierarchicalVocabulary,
    Loop,
    LoopGrid,
    OneLevelSampler,
    PredictorCorrectorSampler,
    PsiSampler,
    Rescale,
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

Written by `python benchmarks/sampler_matrix.py`. Two symbols with the joint law

{joint}

and the exact law of each given the other's state in place of a network, so that what is left is the sampler's own error:
the total variation between the law of its samples and the joint, over the number of steps N. Drawing both symbols from
their marginals gives {far:.3f}. Under each distance, in small print, how often a sequence goes through the network.

Rows marked `score` give the same prediction as ratios of marginals, what a head `score` says, wherever that head is taken
(words, or words and a mask). They stop at what the last draw recovers of the distribution, so they fall as the rows of
distributions do.

What moves positions independently is summed over all canvases, from {points} draws a step: noise of a distance up to
{fine:.3f} at N = 64, less at fewer steps (masks at N = 64 are .0064 exactly). The others are sampled: about {coarse:.3f}.
`exact`: the law of the samples is the network's own; where tokens are noise, `first_hitting` leaves an error of 1e-6 (its
docstring has the bound). `order n`: it tends to it as 1/N^n. `heuristic`: it does not, or nobody has shown that it does. A
pair that is missing is refused, and the reason stands at the end.

`hybrid_epsilon` shuffles a tenth of the words at t = 0. Only the last draw undoes that, for all positions at once, so that
no sampler, `first_hitting` included, comes nearer than about .02 = (.1 L)^2 / 2 with L = 2.

`trapezoidal` is of order 2 where extrapolated rates stay positive and are smooth in t, which these symbols do not grant:
one can make a word of the other six times less likely, so that rates are cut off at 0, and the order falls from 1.5 towards
1 as N grows (masks at N = 4, 8, ..., 128, summed exactly: .0455, .0166, .0065, .0028, .0013, .0006). Under gidd, noise
sets in as a root at t = 1, where rates are infinite: order 1. `tests/sampling/test_trapezoidal.py` holds it to order 2 on
symbols that depend mildly.
"""


class Entry(NamedTuple):
    build: Callable[[int], Sampler]
    apart: bool = False  # positions move independently given the canvas
    single: bool = False  # takes no number of steps


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
    "remdm cap": Entry(lambda n: PsiSampler(n, Cap()), apart=True),
    "remdm rescale": Entry(lambda n: PsiSampler(n, Rescale()), apart=True),
    "remdm confidence": Entry(lambda n: PsiSampler(n, Confidence())),
    "remdm loop": Entry(lambda n: PsiSampler(LoopGrid(n), Loop()), apart=True),
    "acs": Entry(AdaptiveCorrectionSampler, apart=True),
    "self_correction": Entry(lambda n: SelfCorrectingSampler(AncestralSampler(n), rounds=16)),
    "confidence": Entry(UnmaskingSampler),
    "margin": Entry(lambda n: UnmaskingSampler(n, "margin")),
    "entropy": Entry(lambda n: EntropyBoundSampler(), single=True),
}


def processes() -> dict[str, Callable[[], ForwardProcess]]:
    """Every family, by the name of its component, on three words."""
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
    name: str, process: ForwardProcess, steps: Sequence[int], points: int, refused: dict[str, str]
) -> Iterator[str]:
    for label, entry in SAMPLERS.items():
        sampler = entry.build(4)
        try:
            sampler.needs(process, "law")
        except ArgumentError as error:
            refused.setdefault(f"{label} on {name}", str(error))
            continue
        yield row(label, entry, process, steps, points, "law", name)
        if takes_scores(sampler, process):
            yield row(f"{label}, score", entry, process, steps, points, "score", name)


def takes_scores(sampler: Sampler, process: ForwardProcess) -> bool:
    """Whether the sampler reads scores, and a head says them on the vocabulary of the process."""
    if process.vocabulary.num_levels > 1:
        return False
    try:
        sampler.needs(process, "score")
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
    """One line of a table: distances and network calls over the numbers of steps."""
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
    """The page after each process: whole tables only."""
    refused: dict[str, str] = {}
    joint = "\n".join("    " + "  ".join(f"{p:.2f}" for p in row) for row in JOINT.tolist())
    far = 0.5 * float((torch.outer(JOINT.sum(1), JOINT.sum(0)) - JOINT).abs().sum())
    parts = [
        HEAD.format(
            joint=joint,
            far=far,
            points=points,
            fine=28.0 / points,
            coarse=1.0 / (4 * points) ** 0.5,
        )
    ]
    for name in names:
        table = [
            f"\n## {name}\n",
            "| sampler | what it is | " + " | ".join(f"N = {n}" for n in steps) + " |",
        ]
        table += [
            "|---" * (len(steps) + 2) + "|",
            *rows(name, processes()[name](), steps, points, refused),
        ]
        parts += table
        yield (
            "\n".join(
                [
                    *parts,
                    "\n## Refused\n",
                    *(f"- {pair}: {reason}" for pair, reason in refused.items()),
                ]
            )
            + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(processes()), help="processes; all if not given"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="numbers of steps")
    parser.add_argument("--points", type=int, default=2**12, help="draws of a step")
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

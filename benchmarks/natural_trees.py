"""Compare trees of tokens with masked diffusion on data that have a natural tree.

    python benchmarks/natural_trees.py runs/natural             # all data, seeds 0, 1, 2
    python benchmarks/natural_trees.py runs/natural --data digits --seeds 0 --set train.steps=400
    python benchmarks/natural_trees.py runs/natural --clock     # also `ddiff clock` of each tree
    python benchmarks/natural_trees.py runs/natural --first 2   # masks and the natural tree only

| data | tokens | groups | rows of 64 tokens |
| --- | --- | --- | --- |
| `digits` | 17 grey levels | brightness, ink or not | bundled images of digits |
| `code` | 1,024 byte pairs | kinds of tokens | standard library of Python |
| `dna` | 64 codons | amino acids, classes of side chains | 1,853 genes of a bacterium |
| `music` | 54 pitches, hold, rest | pitch classes, scale or not | 405 chorales by J. S. Bach |

The script downloads `dna` and `music` with pip into the subdirectory `data`, and prepares them as
rows. `natural_data/genes.py` and `natural_data/chorales.py` describe the rows and the licences.
Genes that share 8 codons, and chorales that share three bars of the melody, are all for training or
all for validation. The numbers of steps are 18 epochs at most: digits overfit beyond.

The runs of a data set differ only in the tree and the seed. A tree and masked diffusion of the same
seed have the same batches, and are evaluated with the same random numbers. The script can be
stopped and started again: finished runs are not repeated. It prints Markdown tables. Negative
differences mean that the tree has the smaller bound. A difference has two 95 % intervals: over
seeds (Student), and over groups of validation documents, for the mean over the seeds (Student,
without the correction for skewness of `ddiff eval`). With `--clock`, further tables have the bounds
of the found clocks, on the half of the validation documents that did not determine the path.
`ddiff clock` chose the best of two or three clocks on this half, so that these bounds are slightly
too small. It puts every other row into the half, so that both halves have rows of the same genes,
chorales and writers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from natural_data import chorales, genes
from natural_data.rows import LENGTH, RowFiles, Source, prepare
from natural_data.trees import format_groups, shuffle_symbols
from numpy.typing import NDArray

import ddiff
from ddiff.errors import CheckpointError
from ddiff.evaluation.intervals import student95
from ddiff.evaluation.level_clocks import ReferencedObjective, split_documents
from ddiff.evaluation.ratio import RatioEstimate
from ddiff.run_dir.clock_record import ClockRecord, read_clock
from ddiff.runs.clock import log_token_frequencies
from ddiff.runs.evaluation import score_texts
from ddiff.runs.kinds import ClockSource

SEEDS = (0, 1, 2)
FLAT = "flat"
NEAR_PATH = 'objective.times={kind="occupancy", spread=0.5}'  # prepares for other clocks
DRAWS = 8  # of times and noise per document, in the paired differences
# Bounds on clocks near the diagonal have ten times the variance, because few positions are at
# clusters.
CLOCK_DRAWS = 32


class Trained(NamedTuple):
    """A tree of a data set: recipe, and overrides of recipe keys."""

    recipe: str
    settings: tuple[str, ...] = ()


class Compared(NamedTuple):
    """Data set with its trees.

    Attributes:
        trees: name of each tree -> run. `FLAT` is masked diffusion.
        block: number of consecutive documents that the intervals treat as one. Neighbouring images
            of digits are of one writer, and the validation images are of few writers: intervals
            over documents are too narrow there.
        source: data to download, whose rows have groups that the intervals treat as one; None for
            data that the recipes read.
    """

    trees: Mapping[str, Trained]
    block: int = 1
    source: Source | None = None


def _groups(text: str) -> tuple[str, ...]:
    return (f"vocabulary.groups={text}",)


def _symbol_groups(groups: Sequence[str | Sequence[str]]) -> tuple[str, ...]:
    return (f'vocabulary={{kind="patterns", groups={format_groups(groups)}}}',)


def _clusters(sizes: str) -> tuple[str, ...]:
    return (f'vocabulary={{kind="clusters", sizes={sizes}}}',)


DIGITS = {
    FLAT: Trained("digits_mdlm_small"),
    # The recipe's tree: five groups of levels under "no ink" and "ink".
    "ink, brightness": Trained("digits_hdlm_small"),
    "ink, brightness, near the path": Trained("digits_hdlm_small", (NEAR_PATH,)),
    "brightness": Trained(
        "digits_hdlm_small", _groups('["0", "[1-4]", "[5-8]", "[9a-c]", "[d-g]"]')
    ),
    "ink": Trained("digits_hdlm_small", _groups('["0", "[1-9a-g]"]')),
    # The same sizes with groups of distant levels: the effect of the shape of the tree.
    "ink, distant levels": Trained(
        "digits_hdlm_small", _groups('[["0"], ["[159d]", "[26ae]", "[37bf]", "[48cg]"]]')
    ),
    "k-means 5 and 2": Trained("digits_hdlm_small", _clusters("[5, 2]")),
}
CODE = {
    FLAT: Trained("code_mdlm_small"),
    # The recipe's tree: 13 kinds under layout, words and signs.
    "kinds": Trained("code_hdlm_small"),
    "kinds, near the path": Trained("code_hdlm_small", (NEAR_PATH,)),
    "layout, words, signs": Trained(
        "code_hdlm_small",
        _groups(r"""['<\|eos\|>|Ġ*Ċ[ĠĊ]*|Ġ+', 'Ġ?[A-Za-z]+|Ġ?_+|Ġ?[0-9]+', '.*']"""),
    ),
    "k-means 13 and 3": Trained("code_hdlm_small", _clusters("[13, 3]")),
    "k-means 32": Trained("code_hdlm_small", _clusters("[32]")),
}


def _compare_symbols(
    symbols: str, steps: int, trees: Mapping[str, tuple[str, ...]]
) -> dict[str, Trained]:
    """Add masked diffusion, and the settings of rows of symbols, to trees of these symbols."""
    shared = (
        f'tokenizer={{kind="alphabet", symbols="{symbols}"}}',
        f"train.steps={steps}",
    )
    trained = {FLAT: Trained("mdlm_small", shared)}
    for name, settings in trees.items():
        trained[name] = Trained("hdlm_small", (*shared, *settings))
    return trained


_CLASSES = genes.find_class_groups()
_NATURAL_DNA = _symbol_groups(_CLASSES)
DNA = _compare_symbols(
    genes.SYMBOLS,
    3000,  # 14 epochs
    {
        # 21 amino acids (with stop) under nonpolar, polar, acidic, basic and stop.
        "amino acids, classes": _NATURAL_DNA,
        "amino acids, classes, near the path": (*_NATURAL_DNA, NEAR_PATH),
        "amino acids": _symbol_groups(list(genes.find_amino_acid_groups().values())),
        "classes": _symbol_groups(["".join(members) for members in _CLASSES]),
        "unrelated codons": _symbol_groups(shuffle_symbols(_CLASSES)),
        "k-means 21 and 5": _clusters("[21, 5]"),
    },
)

_NOT_PITCHES = [[chorales.HOLD], [chorales.REST]]
_SCALE = chorales.find_scale_groups()
_NATURAL_MUSIC = _symbol_groups([*_NOT_PITCHES, *_SCALE])
MUSIC = _compare_symbols(
    chorales.SYMBOLS,
    1300,  # 18 epochs
    {
        # Hold, rest and 12 pitch classes under hold, rest, notes of the scale and other notes.
        "pitch classes, scale": _NATURAL_MUSIC,
        "pitch classes, scale, near the path": (*_NATURAL_MUSIC, NEAR_PATH),
        "pitch classes": _symbol_groups(
            [chorales.HOLD, chorales.REST, *chorales.find_pitch_class_groups()]
        ),
        "scale": _symbol_groups([chorales.HOLD, chorales.REST, *map("".join, _SCALE)]),
        "unrelated pitches": _symbol_groups([*_NOT_PITCHES, *shuffle_symbols(_SCALE)]),
        "k-means 14 and 4": _clusters("[14, 4]"),
    },
)

DATA = {
    "digits": Compared(DIGITS, block=50),
    "code": Compared(CODE),
    "dna": Compared(DNA, source=genes.SOURCE),
    "music": Compared(MUSIC, source=chorales.SOURCE),
}


class Bounds(NamedTuple):
    """Nats and tokens of each group of documents, both [G], from one run."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())


def find_run_dir(folder: Path, data: str, tree: str, seed: int) -> Path:
    words = "".join(letter if letter.isalnum() else " " for letter in tree).split()
    return folder / f"{data}_{'_'.join(words)}_seed{seed}"


def name_files(files: RowFiles) -> tuple[str, ...]:
    """Return the settings with which a recipe reads files of rows."""
    train = json.dumps([str(files.train)])
    validation = json.dumps([str(files.validation)])
    return (f'data={{kind="symbols", length={LENGTH}, files={train}, validation={validation}}}',)


def train(place: Path, trained: Trained, seed: int, settings: Sequence[str]) -> None:
    """Run a recipe, unless the run is finished."""
    given = (f"run_dir={place}", f"seed={seed}", *trained.settings, *settings)
    command = [sys.executable, "-m", "ddiff", "run", trained.recipe]
    for text in given:
        command += ["--set", text]
    subprocess.run(command, check=True)


def score(place: Path, groups: int | Sequence[int] = 1, clock: ClockSource | None = None) -> Bounds:
    """Evaluate a run on groups of validation documents, with equal random numbers in all runs.

    Args:
        place: directory of the run.
        groups: number of consecutive documents in a group, or the group of each document.
        clock: with a clock, only the documents that did not determine the path of `ddiff clock` are
            evaluated, with more draws, and for the found clock with the estimate of `ddiff clock`.
    """
    run = ddiff.load(place, clock=clock or "recipe")
    recipe = run.recipe
    model = run.model
    if clock == "found":
        log_p = log_token_frequencies(run)
        objective: Any = ReferencedObjective(run.objective, run.process, log_p)
        objective.module = run.objective.module  # `score_texts` switches off its dropout
        model = replace(model, objective=objective)
    documents = recipe.data.build(length=recipe.length, seed=recipe.seed, cache=None)
    texts = documents.validation["text"][:]
    numbers = np.arange(len(texts))
    group_of = numbers // groups if isinstance(groups, int) else np.array(groups)
    if clock is not None:
        numbers = split_documents(numbers)[1]
    draws = DRAWS if clock is None else CLOCK_DRAWS
    nats = []
    tokens = []
    for group in np.unique(group_of[numbers]):
        places = np.flatnonzero(group_of[numbers] == group)
        # Every group has other random numbers: their errors would otherwise not average out.
        evaluate = recipe.evaluate.model_copy(update={"seed": int(places[0])})
        group_recipe = replace(recipe, evaluate=evaluate)
        group_texts = [texts[number] for number in numbers[places]]
        found = score_texts(model, group_recipe, run.tokenizer, group_texts, draws, {})
        nats.append(found.nelbo_nats_per_token * found.tokens)
        tokens.append(found.tokens)
    return Bounds(np.array(nats), np.array(tokens, np.float64))


def describe_difference(trees: Sequence[Bounds], flat: Sequence[Bounds]) -> tuple[str, str, str]:
    """Return the mean difference, and half the widths of its intervals over seeds and documents.

    `trees` and `flat` hold the runs of the same seeds, in the same order.
    """
    by_seed = [tree.mean - other.mean for tree, other in zip(trees, flat, strict=True)]
    mean = statistics.fmean(by_seed)
    over_seeds = "–"
    if len(by_seed) > 1:
        standard = statistics.stdev(by_seed) / math.sqrt(len(by_seed))
        over_seeds = f"{student95(len(by_seed) - 1) * standard:.4f}"
    differences = [tree.nats - other.nats for tree, other in zip(trees, flat, strict=True)]
    averaged = np.mean(differences, axis=0)[:, None]
    total = RatioEstimate.of(averaged, flat[0].tokens).total
    over_documents = "–" if total is None else f"{total.half_width:.4f}"
    return f"{mean:+.4f}", over_seeds, over_documents


def print_table(data: str, bounds: Mapping[str, Sequence[Bounds]], seeds: Sequence[int]) -> None:
    titles = [data, *(f"seed {seed}" for seed in seeds)]
    titles += ["minus flat", "± over seeds", "± over documents"]
    lines = [titles, ["---"] * len(titles)]
    for tree, found in bounds.items():
        values = [f"{item.mean:.4f}" for item in found]
        difference = ("–",) * 3 if tree == FLAT else describe_difference(found, bounds[FLAT])
        lines.append([tree, *values, *difference])
    for line in lines:
        print(f"| {' | '.join(line)} |")
    print(flush=True)


def find_clock(place: Path) -> ClockRecord:
    """Return clock.json of a run. `ddiff clock` writes the file if it is missing or out of date.

    Raises SystemExit if the search did not read all documents: `score` would then evaluate some of
    those that determined the path.
    """
    try:
        run = ddiff.load(place, clock="found")
    except CheckpointError:
        subprocess.run([sys.executable, "-m", "ddiff", "clock", str(place)], check=True)
        run = ddiff.load(place, clock="found")
    record = read_clock(place)
    used = record.protocol["measured_documents"] + record.protocol["compared_documents"]
    count = len(np.unique(run.data.validation_rows.first_documents()))
    if used != count:
        raise SystemExit(
            f"{place / 'clock.json'} is a search with {used} of {count} documents. Repeat "
            f"`ddiff clock {place}` without --rows."
        )
    return record


def print_clocks(places: Sequence[Path]) -> None:
    """Print the bounds of the clocks of runs on the documents that did not determine the path.

    The intervals of `ddiff clock` are left out, because they take each row as a document.
    """
    print("| run | clock | nats/token | minus recipe's clock |")
    print("| --- | --- | --- | --- |")
    for place in places:
        for found in find_clock(place).bounds:
            change = found.minus_recipe.value
            print(f"| {place.name} | {found.name} | {found.bound.value:.4f} | {change:+.4f} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="directory of the runs")
    parser.add_argument("--data", choices=list(DATA), nargs="+", default=list(DATA))
    parser.add_argument(
        "--first",
        type=int,
        metavar="N",
        help="only the first N trees of each data set: masked diffusion, the natural tree, ...",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of all recipes")
    parser.add_argument("--clock", action="store_true", help="find the clock of each tree")
    given = parser.parse_args()
    for data in given.data:
        compare(data, DATA[data], given)


def compare(data: str, compared: Compared, given: argparse.Namespace) -> None:
    """Train and evaluate the trees of a data set, and print the tables."""
    settings = list(given.set)
    groups: int | Sequence[int] = compared.block
    if compared.source is not None:
        files = prepare(data, compared.source, given.folder / "data")
        settings = [*name_files(files), *settings]
        groups = files.read_groups()
    trees = dict(itertools.islice(compared.trees.items(), given.first))
    places: dict[str, list[Path]] = {tree: [] for tree in trees}
    # All trees of a seed are trained before the next seed, so that an early table is complete.
    for seed in given.seeds:
        for tree, trained in trees.items():
            place = find_run_dir(given.folder, data, tree, seed)
            train(place, trained, seed, settings)
            places[tree].append(place)
    bounds = {}
    for tree, found in places.items():
        bounds[tree] = [score(place, groups) for place in found]
    print_table(data, bounds, given.seeds)
    if not given.clock:
        return
    print_clocks([place for tree, found in places.items() if tree != FLAT for place in found])
    for tree, found in places.items():
        clock: ClockSource = "recipe" if tree == FLAT else "found"
        bounds[tree] = [score(place, groups, clock) for place in found]
    print_table(f"{data}, found clock, half of the documents", bounds, given.seeds)


if __name__ == "__main__":
    main()

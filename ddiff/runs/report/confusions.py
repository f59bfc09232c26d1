"""Wrong predictions of a network, in sentences and tables of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ddiff.runs.report.clusters import TokenTree, show_token
from ddiff.runs.report.markup import EMPTY, Markup, element, join
from ddiff.runs.report.run_files import ReportedRun
from ddiff.runs.report.tables import format_share, make_table, run_label

MOST_PAIRS = 10  # pairs of a table
MOST_MISTAKES = 3  # mistakes of one node
FEWEST = 5  # positions of a node below which its mistakes are not shown


@dataclass(frozen=True)
class LevelConfusion:
    """Number of positions with each true and predicted node of one level (0: tokens).

    `pairs` has triples (true, predicted, number of positions).
    """

    level: int
    pairs: Sequence[tuple[int, int, int]]

    @cached_property
    def positions(self) -> int:
        """Number of counted positions."""
        return sum(count for _, _, count in self.pairs)

    @cached_property
    def totals(self) -> Counter[int]:
        """Number of positions of each true node."""
        totals: Counter[int] = Counter()
        for true, _, count in self.pairs:
            totals[true] += count
        return totals

    @property
    def accuracy(self) -> float:
        """Share of positions with the right prediction."""
        right = sum(count for true, predicted, count in self.pairs if true == predicted)
        return right / self.positions

    @property
    def chance(self) -> float:
        """Accuracy of always predicting the most frequent node."""
        return max(self.totals.values()) / self.positions

    @cached_property
    def _wrong(self) -> list[tuple[int, int, int]]:
        return [pair for pair in self.pairs if pair[0] != pair[1]]

    def mistakes_of(self, true: int) -> list[tuple[int, int, int]]:
        """Return the wrong predictions at the positions of a true node, most frequent first."""
        chosen = [pair for pair in self._wrong if pair[0] == true]
        return sorted(chosen, key=lambda pair: (-pair[2], pair[1]))

    def typical_mistakes(self) -> list[tuple[int, int, int]]:
        """Return the wrong predictions that are more frequent than by chance.

        By chance, the wrong predictions of a true node are distributed like all wrong predictions.
        The largest difference from this number comes first. Otherwise, frequent predictions would
        fill the list.
        """
        predicted: Counter[int] = Counter()
        missed: Counter[int] = Counter()
        for true, guess, count in self._wrong:
            predicted[guess] += count
            missed[true] += count
        total = sum(missed.values())
        excess = {}
        for true, guess, count in self._wrong:
            excess[true, guess] = count - missed[true] * predicted[guess] / total
        ranked = sorted(self._wrong, key=lambda pair: (-excess[pair[:2]], pair))
        return [pair for pair in ranked if excess[pair[:2]] > 0]

    def accuracy_of(self, true: int) -> float:
        """Return the share of the positions of a true node with the right prediction."""
        right = sum(count for node, guess, count in self.pairs if node == true == guess)
        return right / self.totals[true]


def make_confusions(
    found: Sequence[tuple[ReportedRun, TokenTree, Sequence[LevelConfusion]]],
) -> Markup:
    """Return the most frequent mistakes of each run."""
    cards = []
    for run, tree, levels in found:
        for level in reversed(levels):
            cards.append(_make_level(run, tree, level))
    if not cards:
        return EMPTY
    note = element(
        "p",
        "Rows of the validation text are noised, and the most likely prediction at each noised "
        "position is compared with the text: nodes of the highest level at masks, tokens at the "
        "lowest nodes. The tables have the mistakes that exceed their frequency by chance most.",
        _class="note",
    )
    return join([note, element("div", *cards, _class="cards")])


def _make_level(run: ReportedRun, tree: TokenTree, found: LevelConfusion) -> Markup:
    """Return a sentence on the accuracy of a level and a table of its mistakes."""
    what = name_level(tree, found.level)
    sentence = [
        f"The most likely {what} is right at ",
        element("b", format_share(found.accuracy, 1)),
        f" of {found.positions:,} positions. The most frequent {what} is right at ",
        f"{format_share(found.chance, 1)}.",
    ]
    rows = []
    for true, predicted, count in found.typical_mistakes()[:MOST_PAIRS]:
        share = f"{format_share(count / found.totals[true])} of {found.totals[true]:,}"
        rows.append([show_node(tree, true), show_node(tree, predicted), share])
    table = make_table(["in the text", "predicted", "share"], rows)
    heading = element("h3", run_label(run))
    return element("div", heading, element("p", *sentence), table, _class="card confusion")


def name_level(tree: TokenTree, level: int) -> str:
    """Return the name of a node of a level in sentences."""
    if level == 0:
        return "token"
    return "cluster" if len(tree.parents) == 2 else f"node of level {level}"


def show_node(tree: TokenTree, node: int) -> Markup:
    """Return the text of a token or the typical tokens of a node."""
    level = tree.level_of(node)
    if level == 0:
        return element("code", show_token(tree.words[node]))
    return element("span", tree.name_state(node), _class=f"node l{min(level, 3)}")


def describe_mistakes(tree: TokenTree, found: LevelConfusion | None, node: int) -> Markup:
    """Return a line on the predictions at the positions of one node, or empty text."""
    if found is None or found.totals[node] < FEWEST:
        return EMPTY
    total = found.totals[node]
    parts: list[object] = [
        f"predicted right at {format_share(found.accuracy_of(node))} of {total:,} masks"
    ]
    mistakes = found.mistakes_of(node)[:MOST_MISTAKES]
    for number, (_, predicted, count) in enumerate(mistakes):
        parts.append("; wrongly as " if number == 0 else ", ")
        parts.append(show_node(tree, predicted))
        parts.append(f" {format_share(count / total)}")
    return element("p", *parts, _class="note mistakes")

"""Figures of edited texts: distance to the source, diversity, attribute, geometry and cost.

All figures are computed without a download. Texts are sequences of tokens (ids or strings).
Classifiers and embeddings are given by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddiff.errors import ArgumentError

Tokens = Sequence[Hashable]
Classifier = Callable[[Sequence[str]], Sequence[Any]]
"""classify(texts) -> one class per text."""

# ---------------------------------------------------------------------- distance to the source


def edit_distance(first: Tokens, second: Tokens) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and replacements."""
    above = list(range(len(second) + 1))
    for row, token in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second):
            replaced = above[column] + int(token != other)
            current.append(min(replaced, above[column + 1] + 1, current[-1] + 1))
        above = current
    return above[-1]


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Return corpus BLEU-4 in [0,1], without smoothing (Papineni et al. 2002).

    `references[i]` are the references of `candidates[i]`. The result is 0 if no 4-gram of the
    candidates is in their references.
    """
    from torchmetrics.functional.text import bleu_score  # slow import

    # The library splits strings at spaces, so every token is written as its number.
    numbers: dict[Hashable, str] = {}

    def write(tokens: Tokens) -> str:
        return " ".join(numbers.setdefault(token, str(len(numbers))) for token in tokens)

    targets = [[write(reference) for reference in each] for each in references]
    return float(bleu_score([write(tokens) for tokens in candidates], targets))


def rouge_l(candidate: Tokens, reference: Tokens) -> float:
    """Return ROUGE-L: the F1 score of the longest common subsequence (Lin 2004).

    The precision is its length divided by that of the candidate, and the recall its length divided
    by that of the reference. The result is 0 if one text is empty.
    """
    common = _common_length(candidate, reference)
    return 2.0 * common / max(len(candidate) + len(reference), 1)


def _common_length(first: Tokens, second: Tokens) -> int:
    """Return the length of the longest common subsequence."""
    above = [0] * (len(second) + 1)
    for token in first:
        current = [0]
        for column, other in enumerate(second):
            if token == other:
                current.append(above[column] + 1)
            else:
                current.append(max(above[column + 1], current[-1]))
        above = current
    return above[-1]


def untouched_share(
    sources: Sequence[Tokens], results: Sequence[Tokens], edited: Sequence[Sequence[int]]
) -> float:
    """Return the share of the positions outside `edited` that keep their token.

    `edited[i]` are the sampled positions of text i. A correct editor has the share 1. The share is
    also 1 if every position is edited.
    """
    kept = 0
    total = 0
    for source, result, positions in zip(sources, results, edited, strict=True):
        if len(source) != len(result):
            raise ArgumentError(
                "untouched_share: a source and its result must have equal lengths; got "
                f"{len(source)} and {len(result)} tokens."
            )
        others = set(range(len(source))) - set(positions)
        total += len(others)
        kept += sum(source[place] == result[place] for place in others)
    return kept / total if total else 1.0


# ---------------------------------------------------------------------- diversity


def distinct_n(texts: Sequence[Tokens], n: int) -> float:
    """Return the number of different n-grams divided by the number of all n-grams of the texts.

    The result is 0 if no text has n tokens.
    """
    if n < 1:
        raise ArgumentError(f"distinct_n: n must be at least 1; got {n}.")
    grams: list[tuple[Hashable, ...]] = []
    for tokens in texts:
        grams += [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def self_bleu(texts: Sequence[Tokens]) -> float:
    """Return the mean BLEU-4 of each text with all other texts as references.

    Low values mean diverse texts. Raises ArgumentError for fewer than two texts.
    """
    if len(texts) < 2:
        raise ArgumentError(f"self_bleu: needs at least two texts; got {len(texts)}.")
    scores = []
    for place, tokens in enumerate(texts):
        others = [other for number, other in enumerate(texts) if number != place]
        scores.append(bleu([tokens], [others]))
    return float(np.mean(scores))


# ---------------------------------------------------------------------- attribute and geometry


def attribute_accuracy(texts: Sequence[str], targets: Sequence[Any], classify: Classifier) -> float:
    """Return the share of texts to which the classifier gives their target class."""
    found = list(classify(texts))
    if not len(texts) == len(targets) == len(found) or not found:
        raise ArgumentError(
            "attribute_accuracy: needs one target and one class per text; got "
            f"{len(texts)} texts, {len(targets)} targets and {len(found)} classes."
        )
    return sum(bool(a == b) for a, b in zip(found, targets)) / len(found)


def path_smoothness(embeddings: ArrayLike) -> float:
    """Return the mean cosine similarity of consecutive embeddings [n,d] along a path.

    The embeddings are those of texts that were generated at consecutive target vectors.
    """
    rows = _path("path_smoothness", embeddings)
    units = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return float((units[:-1] * units[1:]).sum(-1).mean())


def monotone_share(attribute: ArrayLike) -> float:
    """Return the share of consecutive points of a path whose attribute does not decrease.

    `attribute` [n] is for example the probability of the target class at each point. A random order
    of different values has an expected share of 1/2.
    """
    values = _path("monotone_share", np.asarray(attribute, np.float64).reshape(-1, 1))[:, 0]
    return float((np.diff(values) >= 0.0).mean())


def silhouette(vectors: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean silhouette of vectors [n,d] with class labels [n], in [-1,1].

    The silhouette of a vector is (b - a) / max(a, b). Here a is its mean Euclidean distance to the
    other vectors of its class, and b the smallest mean distance to another class (Rousseeuw 1987).
    The silhouette is 0 for the only vector of a class. Raises ArgumentError for one class.
    """
    rows = np.asarray(vectors, np.float64)
    classes, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2 or len(place) != len(rows):
        raise ArgumentError(
            "silhouette: needs one label per vector and at least two classes; got "
            f"{len(rows)} vectors, {len(place)} labels and {len(classes)} classes."
        )
    sums = _distance_sums(rows, place, len(classes))
    every = np.arange(len(rows))
    own_size = sizes[place]
    inside = sums[every, place] / np.maximum(own_size - 1, 1)
    means = sums / sizes
    means[every, place] = np.inf
    outside = means.min(-1)
    # Identical vectors of two classes have a = b = 0, and the silhouette 0.
    larger = np.maximum(np.maximum(inside, outside), np.finfo(np.float64).tiny)
    scores = np.where(own_size > 1, (outside - inside) / larger, 0.0)
    return float(scores.mean())


def _distance_sums(
    rows: NDArray[np.float64], place: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Return the sum [n,count] of the distances of each vector to the vectors of each class."""
    member = np.eye(count)[place]
    # One vector at a time, since an array of all pairs has n^2 d numbers.
    return np.stack([np.linalg.norm(rows - row, axis=-1) @ member for row in rows])


def _path(name: str, values: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ArgumentError(
            f"{name}: the path must be an array [n,d] of at least two points; got an array of the "
            f"shape {list(rows.shape)}."
        )
    return rows


# ---------------------------------------------------------------------- summary


def summarize_edits(
    edits: Sequence[Mapping[str, Any]],
    sources: Sequence[Tokens],
    *,
    seconds: float | None = None,
    targets: Sequence[Any] | None = None,
    classify: Classifier | None = None,
) -> dict[str, float]:
    """Return the figures of a list of edits that `Run.edit` returned.

    Args:
        edits: dicts with `text`, `ids`, `edited` and `nfe`.
        sources: token ids of the source of each edit.
        seconds: duration of all edits; adds `tokens_per_second`.
        targets: target class of each edit. With `classify`, it adds `attribute_accuracy`.
        classify: function from texts to classes.
    """
    if not edits or len(edits) != len(sources):
        raise ArgumentError(
            "summarize_edits: needs at least one edit and one source per edit; got "
            f"{len(edits)} edits and {len(sources)} sources."
        )
    ids = [edit["ids"] for edit in edits]
    pairs = list(zip(ids, sources))
    figures = {
        "untouched_share": untouched_share(sources, ids, [edit["edited"] for edit in edits]),
        "edited_share": sum(len(edit["edited"]) for edit in edits) / sum(map(len, sources)),
        "edit_distance": float(np.mean([edit_distance(*pair) for pair in pairs])),
        "bleu": bleu(ids, [[source] for source in sources]),
        "rouge_l": float(np.mean([rouge_l(*pair) for pair in pairs])),
        "distinct_1": distinct_n(ids, 1),
        "distinct_2": distinct_n(ids, 2),
        "nfe": float(np.mean([edit["nfe"] for edit in edits])),
    }
    if len(ids) > 1:
        figures["self_bleu"] = self_bleu(ids)
    if seconds is not None:
        figures["tokens_per_second"] = sum(map(len, ids)) / seconds
    if targets is not None and classify is not None:
        texts = [edit["text"] for edit in edits]
        figures["attribute_accuracy"] = attribute_accuracy(texts, targets, classify)
    return figures

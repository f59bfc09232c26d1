"""Generated conversations about two numbers, for examples and tests."""

from __future__ import annotations

import numpy as np

from ddiff.data.conversations import conversation_table
from ddiff.data.documents import Documents
from ddiff.errors import ArgumentError


def make_number_questions(
    train: int, validation: int, *, largest: int = 99, seed: int = 0
) -> Documents:
    """Generate `train` and `validation` conversations about pairs of numbers up to `largest`.

    All questions differ. Raises ArgumentError if there are too few pairs of numbers.
    """
    total = train + validation
    most = 2 * largest * (largest - 1)  # ordered pairs of different numbers, two questions each
    if total > most:
        raise ArgumentError(
            f"make_number_questions: numbers up to {largest} give {most} questions; got {train} "
            f"for training and {validation} for validation. Increase largest."
        )
    chosen = np.random.default_rng(seed).permutation(most)[:total]
    conversations = [_make_conversation(int(number), largest) for number in chosen]
    return Documents(
        conversation_table(conversations[:train]), conversation_table(conversations[train:])
    )


def _make_conversation(number: int, largest: int) -> list[dict[str, str]]:
    """Return question number `number` and its answer."""
    pair, asks_larger = divmod(number, 2)
    first, rest = divmod(pair, largest - 1)
    first += 1
    second = rest + 1
    if second >= first:
        second += 1  # the two numbers differ
    word = "larger" if asks_larger else "smaller"
    winner = max(first, second) if asks_larger else min(first, second)
    loser = first + second - winner
    return [
        {"role": "user", "content": f"Which number is {word}, {first} or {second}?"},
        {"role": "assistant", "content": f"{winner} is {word} than {loser}."},
    ]

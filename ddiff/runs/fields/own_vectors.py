"""Notes on fields whose vectors are computed from the text of the same sample.

A vector f(x) of the text x contains information on x. A term of the text given f(x), clean or
noisy, is then no likelihood of the text. Given x, f(x) is known, so that its density has no limit:
the bound of the vector falls without a lower limit as the model gets better.
"""

from __future__ import annotations

from collections.abc import Mapping

from ddiff.core.paths import HeldAt, Hold, Leg, LegPath


def describe_own_vectors(path: LegPath, sources: Mapping[str, str]) -> dict[str, str]:
    """Return a note for each moving field whose part of a bound needs one, by name.

    A text is noted if it moves while its own vector is not at its prior and not absent, and a
    vector if it moves while its text is neither. The sum over both is a bound of the joint density.

    Args:
        path: path of the evaluation.
        sources: name of each field of vectors that is computed from a text -> name of the text.
    """
    notes = {}
    for vector, text in sources.items():
        of_vector = path.legs[vector]
        of_text = path.legs[text]
        if _is_informative(of_vector, of_text):
            notes[text] = f"given its own {vector}: no likelihood of the text"
        if _is_informative(of_text, of_vector):
            notes[vector] = f"density of a function of {text}: no lower limit"
    return notes


def _is_informative(other: Leg | Hold | HeldAt, moving: Leg | Hold | HeldAt) -> bool:
    """Return True if a field moves while another one still has information on the sample."""
    if not isinstance(moving, Leg):
        return False
    if isinstance(other, Leg):
        return other.stop > moving.start
    return other not in ("prior", "absent")

"""Conformance checks of an encoder of texts: shape and independence of its vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ddiff.data.encoding import Encoder, get_positions
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law


class EncoderCase(NamedTuple):
    """Encoder to check, and texts that it can encode."""

    encoder: Encoder
    texts: Sequence[str]


@law("encoder: one vector of dim numbers per text", tolerance=0.0)
def vectors_have_the_shape(case: EncoderCase) -> Iterator[Gap]:
    """Check the shape [n,D] or [n,P,D] of the vectors, and that a vector is finite or all NaN.

    Tolerance 0: shapes are integers.
    """
    vectors = torch.as_tensor(case.encoder.encode(case.texts))
    positions = get_positions(case.encoder)
    middle = [] if positions is None else [positions]
    expected = [len(case.texts), *middle, case.encoder.dim]
    yield compare(torch.tensor(vectors.dim()), float(len(expected)), {"dimensions": ""})
    if vectors.dim() == len(expected):
        shape = torch.tensor(vectors.shape)
        yield compare(shape, torch.tensor(expected, dtype=torch.float64), {"shape": ""})
    has_values = vectors.isfinite().all(-1) | vectors.isnan().all(-1)
    yield compare(has_values.double(), 1.0, {"finite or all NaN": ""})


@law("encoder: the vector of a text does not depend on other texts", tolerance=1e-4)
def vectors_are_independent(case: EncoderCase) -> Iterator[Gap]:
    """Check that a text has the same vector in another order, and without the other texts.

    NaN counts as 0. Errors are relative to 1 + the value. Tolerance 1e-4: float32 rounding, which
    depends on the size of a batch.
    """

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return torch.as_tensor(case.encoder.encode(texts)).double().nan_to_num(nan=0.0)

    together = encode(case.texts)
    scale = 1.0 + together.abs()
    backwards = encode(list(reversed(case.texts))).flip(0)
    yield compare(backwards, together, {"order": "reversed"}, relative_to=scale)
    for row, text in enumerate(case.texts):
        yield compare(encode([text])[0], together[row], {"text": row}, relative_to=scale[row])


ENCODER_LAWS: tuple[Law, ...] = (vectors_have_the_shape, vectors_are_independent)


def check_encoder(encoder: Encoder, texts: Sequence[str]) -> list[LawReport]:
    """Apply every conformance check of encoders. `texts` are texts that are not blank."""
    return evaluate_laws(EncoderCase(encoder, texts), ENCODER_LAWS)

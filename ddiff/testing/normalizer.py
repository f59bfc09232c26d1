"""Conformance checks of a normalizer: a linear map with an inverse, which a checkpoint restores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ddiff.core.normalizer import Normalizer
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law


class NormalizerCase(NamedTuple):
    """Normalizer to check.

    Attributes:
        normalizer: the fitted normalizer.
        data: vectors [n,D] float64 on which it was fitted.
        load: function that rebuilds the normalizer from its tensors; None: saving is not checked.
    """

    normalizer: Normalizer
    data: Tensor
    load: Callable[[Mapping[str, Tensor]], Normalizer] | None = None


def _scale(x: Tensor) -> Tensor:
    return 1.0 + x.abs()


@law("normalizer: encode inverts decode", tolerance=1e-9)
def encode_inverts_decode(case: NormalizerCase) -> Iterator[Gap]:
    """Check that encode(decode(z)) = z, and decode(encode(x)) = x if no dimension is dropped.

    A normalizer without `log_volume` drops dimensions. Errors are relative to 1 + the value.
    Tolerance 1e-9: float64 rounding.
    """
    normalizer = case.normalizer
    z = normalizer.encode(case.data)
    yield compare(normalizer.encode(normalizer.decode(z)), z, {"encode": ""}, relative_to=_scale(z))
    if normalizer.log_volume is not None:
        x = case.data
        yield compare(normalizer.decode(z), x, {"decode": ""}, relative_to=_scale(x))


@law("normalizer: encode and decode are linear", tolerance=1e-9)
def maps_are_linear(case: NormalizerCase) -> Iterator[Gap]:
    """Check that the middle of two vectors is mapped to the middle of their images.

    The process and the bound assume a linear map. Errors are relative to 1 + the value. Tolerance
    1e-9: float64 rounding.
    """
    z = case.normalizer.encode(case.data)
    for name, function, values in (
        ("encode", case.normalizer.encode, case.data),
        ("decode", case.normalizer.decode, z),
    ):
        middle = (values[1:] + values[:-1]) / 2.0
        images = function(values)
        expected = (images[1:] + images[:-1]) / 2.0
        yield compare(function(middle), expected, {"map": name}, relative_to=_scale(expected))


@law("normalizer: log_volume = ln of the volume that decode multiplies with", tolerance=1e-8)
def volume_is_the_determinant(case: NormalizerCase) -> Iterator[Gap]:
    """Check that log_volume is ln |det A| for decode(z) = A z + b.

    A is computed from the images of the unit vectors. A normalizer that drops dimensions has no
    volume. Tolerance 1e-8: float64 rounding of the determinant.
    """
    volume = case.normalizer.log_volume
    if volume is None:
        return
    width = case.normalizer.width
    origin = case.normalizer.decode(torch.zeros(width, dtype=torch.float64))
    units = torch.eye(width, dtype=torch.float64)
    matrix = case.normalizer.decode(units) - origin
    expected = torch.linalg.slogdet(matrix).logabsdet
    got = torch.tensor(volume, dtype=torch.float64)
    yield compare(got, expected, {"log_volume": ""}, relative_to=_scale(expected))


@law("normalizer: loading restores the map", tolerance=0.0)
def survives_saving(case: NormalizerCase) -> Iterator[Gap]:
    """Check that the normalizer that `load` makes of `tensors` maps vectors in the same way.

    Tolerance 0: the same tensors give the same numbers.
    """
    if case.load is None:
        return
    loaded = case.load(case.normalizer.tensors())
    z = case.normalizer.encode(case.data)
    yield compare(loaded.encode(case.data), z, {"encode": "after loading"})
    yield compare(loaded.decode(z), case.normalizer.decode(z), {"decode": "after loading"})


NORMALIZER_LAWS: tuple[Law, ...] = (
    encode_inverts_decode,
    maps_are_linear,
    volume_is_the_determinant,
    survives_saving,
)


def check_normalizer(
    normalizer: Normalizer,
    data: Tensor,
    load: Callable[[Mapping[str, Tensor]], Normalizer] | None = None,
) -> list[LawReport]:
    """Apply every conformance check of normalizers.

    Args:
        normalizer: normalizer that was fitted on `data`.
        data: vectors [n,D] float64.
        load: function that rebuilds the normalizer from its tensors; None: saving is not checked.
    """
    return evaluate_laws(NormalizerCase(normalizer, data, load), NORMALIZER_LAWS)

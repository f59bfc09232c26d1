"""Numbers that identify the forward processes of several fields in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from ddiff.core.field import Fields
from ddiff.core.gaussian import GaussianProcess
from ddiff.runs.noising import TIMES, sample_noising


def sample_noising_of_fields(fields: Fields) -> list[float]:
    """Return numbers of the processes of all fields, in the order of the fields.

    For a field of tokens, these are probabilities (`sample_noising`). For a field of vectors, they
    are the factor of the signal and the standard deviation of the noise at several times.
    """
    found: list[float] = []
    for field in fields.values():
        process: Any = field.process
        if isinstance(process, GaussianProcess):
            t = torch.tensor(TIMES, dtype=torch.float64)
            found += process.signal(t).tolist()
            found += process.deviation(t).tolist()
        else:
            found += sample_noising(process)
    return found

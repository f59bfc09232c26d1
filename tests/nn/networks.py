"""Networks whose parameters all have an effect."""

from __future__ import annotations

import torch
from torch import nn


def randomize_zeros(model: nn.Module) -> None:
    """Fill the parameters that start at zero with random numbers, so that all of them matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)

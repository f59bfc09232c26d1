"""Exponential moving average of the weights, for evaluation and sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from ddiff.errors import ArgumentError, CheckpointError
from ddiff.training.optimizers import to_local


@final
class ExponentialMovingAverage:
    """Average w of the trained parameters p: w <- d w + (1 - d) p after each step.

    At the n-th step d = min(decay, (1 + n) / (10 + n)), so that the first weights are soon
    forgotten. Averages have the device and sharding of their parameters, in float32 at least.
    ArgumentError unless the decay is in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ArgumentError(
                f"ExponentialMovingAverage: decay must be in (0, 1), such as 0.9999; got {decay}."
            )
        self.decay = decay
        self._parameters: dict[str, nn.Parameter] = {}
        self.weights: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._parameters[name] = parameter
                self.weights[name] = _widen(parameter.detach()).clone()
        # The count lives on the device, since it is decided there whether a step was taken.
        device = next(iter(self._parameters.values())).device
        self.updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Average the current parameters in, unless the step was skipped: `finite` (0-d bool)."""
        taken = finite.to(torch.float64)
        ramp = (1.0 + self.updates) / (10.0 + self.updates)
        # A factor of 0 and no branch: whether the step was taken is known on the device only.
        share = taken * (1.0 - ramp.clamp(max=self.decay))
        self.updates += taken
        for name, average in self.weights.items():
            own = to_local(average)
            parameter = _widen(to_local(self._parameters[name].detach()))
            own.lerp_(parameter, share.to(own.dtype))

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Give the module the averages inside the block, and its own bits back after it."""
        own: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            own[name] = to_local(parameter.detach()).clone()
        self._copy_to_module(self.weights)
        try:
            yield
        finally:
            self._copy_to_module(own)

    @torch.no_grad()
    def _copy_to_module(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            to_local(parameter).copy_(to_local(weights[name]))

    def to_tree(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"updates": self.updates, "weights": self.weights}

    @torch.no_grad()
    def load_tree(self, tree: dict[str, Any]) -> None:
        """Load what `to_tree` returned; CheckpointError if it is the average of another model."""
        if tree["weights"].keys() != self.weights.keys():
            differing = sorted(tree["weights"].keys() ^ self.weights.keys())
            raise CheckpointError(
                "The moving average in the checkpoint is of another model: "
                f"{', '.join(differing[:3])} differ."
            )
        self.updates.copy_(tree["updates"])
        for name, average in self.weights.items():
            average.copy_(tree["weights"][name])


def _widen(weight: Tensor) -> Tensor:
    # In bfloat16 an update of 1e-4 would be rounded away.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype)

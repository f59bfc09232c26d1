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
    """Exponential moving average w of the trained parameters p.

    After optimizer step n, counted from 1, the average is updated as w <- d w + (1 - d) p, where d
    = min(decay, (1 + n) / (10 + n)). The smaller d of the first steps makes the average forget the
    initial weights soon. Averages have the device and the sharding of the parameters. Their
    precision is at least float32. Raises ArgumentError unless `decay` is in (0, 1).
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
        # The count is a tensor on the device, because the device decides whether a step is taken.
        device = next(iter(self._parameters.values())).device
        self.updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Update the averages with the current parameters.

        `finite` is a 0-d bool tensor. If it is False, the optimizer step was skipped, and the
        averages do not change.
        """
        taken = finite.to(torch.float64)
        ramp = (1.0 + self.updates) / (10.0 + self.updates)
        # A skipped step has the factor 0 instead of a branch, because the host does not know
        # whether the step was taken.
        share = taken * (1.0 - ramp.clamp(max=self.decay))
        self.updates += taken
        for name, average in self.weights.items():
            own = to_local(average)
            parameter = _widen(to_local(self._parameters[name].detach()))
            own.lerp_(parameter, share.to(own.dtype))

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Context manager in which the averages replace the parameters of the module.

        After the block the parameters are bitwise identical to those before it.
        """
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
        """Return the averages and their number of updates, for a checkpoint."""
        return {"updates": self.updates, "weights": self.weights}

    @torch.no_grad()
    def load_tree(self, tree: dict[str, Any]) -> None:
        """Load a tree that `to_tree` returned.

        Raises CheckpointError if the tree has averages of other parameters.
        """
        if tree["weights"].keys() != self.weights.keys():
            differing = sorted(tree["weights"].keys() ^ self.weights.keys())
            raise CheckpointError(
                "The moving average in the checkpoint belongs to another model: only one of the "
                f"two has the parameters {', '.join(differing[:3])}. Resume with the recipe that "
                "the run was trained with."
            )
        self.updates.copy_(tree["updates"])
        for name, average in self.weights.items():
            average.copy_(tree["weights"][name])


def _widen(weight: Tensor) -> Tensor:
    # bfloat16 has 8 bits of precision: it would round an update of relative size 1e-4 to nothing.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype)

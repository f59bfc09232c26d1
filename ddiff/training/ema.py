"""A moving average of the weights: what is evaluated is steadier than what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from ddiff.errors import ArgumentError, CheckpointError
from ddiff.training.optimizers import local


@final
class ExponentialMovingAverage:
    """w <- d w + (1 - d) p after each step, d = min(decay, (1 + n) / (10 + n)) for the n-th, so that the first weights are
    soon forgotten.

    The average lies where its parameters lie, sharded as they are, in float32 at least. ArgumentError when the decay is not
    in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ArgumentError(
                f"ExponentialMovingAverage: decay must be in (0, 1), such as 0.9999; got {decay}."
            )
        self.decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights = {name: _wide(p.detach()).clone() for name, p in self._parameters.items()}
        device = next(iter(self._parameters.values())).device
        self.updates = torch.zeros(
            (), dtype=torch.float64, device=device
        )  # there, as steps are decided there

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Take the parameters in as they are now; nothing where `finite` (0-d bool) says that no step was taken."""
        taken = finite.to(torch.float64)
        share = taken * (1.0 - ((1.0 + self.updates) / (10.0 + self.updates)).clamp(max=self.decay))
        self.updates += taken
        for name, average in self.weights.items():
            mine = local(average)
            mine.lerp_(_wide(local(self._parameters[name].detach())), share.to(mine.dtype))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the average into the module for a while; afterwards the parameters are the same bits as before."""
        kept = {name: local(p.detach()).clone() for name, p in self._parameters.items()}
        self._install({name: local(average) for name, average in self.weights.items()})
        try:
            yield
        finally:
            self._install(kept)

    @torch.no_grad()
    def _install(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            local(parameter).copy_(weights[name])

    def to_tree(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.weights}

    @torch.no_grad()
    def load_tree(self, tree: dict[str, Any]) -> None:
        """Go on from what `to_tree` gave; CheckpointError when it is the average of another model."""
        if tree["weights"].keys() != self.weights.keys():
            differing = sorted(tree["weights"].keys() ^ self.weights.keys())[:3]
            raise CheckpointError(
                f"The average in the checkpoint is of another model: {', '.join(differing)} differ."
            )
        self.updates.copy_(tree["updates"])
        for name, average in self.weights.items():
            average.copy_(tree["weights"][name])


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))

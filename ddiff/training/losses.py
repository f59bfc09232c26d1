"""Training losses of the rows of a batch. The reported bound never uses them."""

from __future__ import annotations

from typing import Generic, TypeVar, final

from torch import Tensor

from ddiff.core.prediction import Prediction
from ddiff.core.process import ForwardProcess
from ddiff.core.times import Noisy, Times
from ddiff.errors import ArgumentError

Process = TypeVar("Process", bound=ForwardProcess)


class TrainingLoss(Generic[Process]):
    """Loss of a row: a weight without the network times a divergence of the predicted distribution.

    The defaults are those of the bound; a subclass overrides what differs. `Process` is the family
    that it supports.

    Shapes: [r] rows, with clean tokens `x0`, states `zt` and times `t` (float64).
    """

    name: str | None = None
    """If set, the mean of the loss is logged as `loss_{name}_nats_per_token`."""

    def weight(
        self,
        process: Process,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return the weights [r], per unit of a row's own time; called once for all rows."""
        return process.weight(x0, zt, t)

    def divergence(
        self,
        process: Process,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return the divergences [r] in nats; called for each chunk of rows."""
        return process.divergence(prediction, x0, zt, t)

    def select_rows(
        self,
        process: Process,
        noisy: Noisy,
        times: Times,
    ) -> Tensor:
        """Select other rows than those that the bound charges: bool [B,L].

        A row without a speed (times.speed = 0) counts with speed 1.
        """
        raise NotImplementedError

    @property
    def has_own_divergence(self) -> bool:
        """Whether the subclass overrides `divergence`."""
        return type(self).divergence is not TrainingLoss.divergence

    @property
    def has_own_rows(self) -> bool:
        """Whether the subclass overrides `select_rows`."""
        return type(self).select_rows is not TrainingLoss.select_rows


@final
class ElboLoss(TrainingLoss[ForwardProcess]):
    """The bound itself."""


@final
class ClippedLoss(TrainingLoss[ForwardProcess]):
    """The bound with its weight clipped to [smallest, largest]: steadier gradients, not a bound.

    The weight is the total true reverse rate, so that the same chain has the same loss in every
    family. Keep `smallest` at 0 for processes with uniform noise: a clean token weighs almost
    nothing near t = 0, and its divergence grows as 1/t.
    """

    def __init__(self, smallest: float = 0.0, largest: float = 2.0) -> None:
        if not 0.0 <= smallest <= largest:
            raise ArgumentError(
                "ClippedLoss: 0 <= smallest <= largest must hold; "
                f"got smallest = {smallest}, largest = {largest}."
            )
        self.smallest = smallest
        self.largest = largest

    def weight(
        self,
        process: ForwardProcess,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        return process.weight(x0, zt, t).clamp(self.smallest, self.largest)

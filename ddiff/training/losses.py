"""Training losses per row of a batch. The reported bound does not depend on the training loss."""

from __future__ import annotations

from typing import Generic, TypeVar, final

from torch import Tensor

from ddiff.core.prediction import Prediction
from ddiff.core.process import ForwardProcess
from ddiff.core.times import Noisy, Times
from ddiff.errors import ArgumentError

Process = TypeVar("Process", bound=ForwardProcess)


class TrainingLoss(Generic[Process]):
    """Training loss of a row (position): a weight times a divergence of the prediction.

    The weight does not depend on the network. The methods of this class compute the weight and the
    divergence of the bound (NELBO). A subclass overrides at least one method. `Process` is the type
    of forward process that the loss supports.

    For r rows, the arguments are the clean tokens `x0` [r], the states `zt` [r] and the noise times
    `t` [r] (float64).
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
        """Return the weight of each row, a tensor [r], per unit of the noise time t of the row.

        Called once per batch, for all rows.
        """
        return process.weight(x0, zt, t)

    def divergence(
        self,
        process: Process,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return the divergence of each row in nats, a tensor [r].

        Called once per chunk of rows, with the predicted distribution of the chunk.
        """
        return process.divergence(prediction, x0, zt, t)

    def select_rows(
        self,
        process: Process,
        noisy: Noisy,
        times: Times,
    ) -> Tensor:
        """Return a bool tensor [B,L], True at the rows that enter the training loss.

        Overriding this method is optional. By default, the rows scored by the bound enter the loss.
        The loss of a selected row is multiplied by its speed (`times.speed`), or by 1 if its speed
        is 0.
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
    """The bound (NELBO) as the training loss."""


@final
class ClippedLoss(TrainingLoss[ForwardProcess]):
    """The bound as training loss, with its weight clipped to [smallest, largest].

    Clipping reduces the variance of the gradients. The clipped loss is not a bound. The weight is
    the total rate of the true reverse process, so that two implementations of the same Markov chain
    have the same loss. Keep `smallest` at 0 for processes with uniform noise: near t = 0 the weight
    of a clean token goes to 0 as t, and its divergence grows as 1/t.
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

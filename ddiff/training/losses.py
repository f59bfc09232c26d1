"""Training losses of the diffusion objective, per row (position) of a batch.

The reported bound does not depend on the training loss.
"""

from __future__ import annotations

from typing import Generic, TypeVar, final

from torch import Tensor

from ddiff.core.field import FieldProcess
from ddiff.core.prediction import Prediction
from ddiff.core.process import ForwardProcess
from ddiff.core.times import Noisy, Times
from ddiff.errors import ArgumentError

Process = TypeVar("Process", bound=FieldProcess)


class TrainingLoss(Generic[Process]):
    """Training loss of a row (position): a weight times a divergence of the prediction.

    The weight does not depend on the network. In this class, weight and divergence are those of the
    bound (NELBO): the diffusion term of the bound is the integral over t of the expected value of
    weight * divergence. A subclass overrides at least one method. The type parameter `Process` is
    the type of forward process that the loss supports.

    The arguments of the methods describe r rows: clean tokens `x0` [r], states `zt` [r] and noise
    times `t` [r] (float64).
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
        """Return the loss weight of each row, a tensor [r], per unit of the noise time t.

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
        """Return the divergence of the prediction from the truth in each row, in nats [r].

        Called once per chunk of rows, with the predicted distribution of the chunk.
        """
        return process.divergence(prediction, x0, zt, t)

    def select_rows(
        self,
        process: Process,
        noisy: Noisy,
        times: Times,
    ) -> Tensor:
        """Return a bool tensor [B,L], True at the positions that enter the training loss.

        If a subclass does not override this method, the positions that can add to the bound enter
        the loss. `times.speed` is the importance weight of the draw of the noise time t. The loss
        of a selected position is multiplied by `times.speed`, or by 1 if `times.speed` is 0.

        Args:
            process: forward process.
            noisy: states of the batch.
            times: noise times of the batch.
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

    Clipping reduces the variance of the gradients. The clipped loss is not a bound.

    The weight before clipping is the total rate at which the reverse process leaves the state z_t,
    given the clean token x0. The rate is a property of the Markov chain. Two implementations of the
    same chain therefore have the same clipped loss.

    Keep `smallest` at 0 for processes with uniform noise: near t = 0 the weight of a position with
    its clean token is proportional to t, and its divergence is proportional to 1/t.
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

"""Interfaces of the parts that the trainer drives: it depends on no process, network or text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from ddiff.core.rng import CounterRng

Batch = (
    Any  # returned by `batch_at` and passed on to the objective; the trainer does not look inside
)


@dataclass(frozen=True)
class LossTerms:
    """One micro-batch's share of the global loss, with metrics to report.

    Attributes:
        loss: (local sum) / (global count), a scalar with its graph. Shares of micro-batches and
            ranks add up to the loss of the global batch.
        metrics: name -> (sum, count); divided once after everything has been added up.
    """

    loss: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    """A loss with the module whose parameters it trains."""

    module: nn.Module

    def counts(self, batch: Batch) -> Mapping[str, Tensor | float]:
        """Count the scored items of a batch, by field, from the data only.

        The trainer sums these counts over the global batch before any forward pass.
        """
        ...

    def __call__(
        self,
        batch: Batch,
        rng: CounterRng,
        denominators: Mapping[str, Tensor],
        slots: int,
    ) -> LossTerms:
        """Compute the loss of a micro-batch.

        Args:
            denominators: global counts by field (0-d float64).
            slots: rows of the global batch.
        """
        ...


class Backend(Protocol):
    """Devices and processes of a run; no other module knows them.

    Losses are shares that add up, so a backend with several processes sums gradients and does not
    average them. Rank 0 writes, reports, evaluates and samples; the others only train.
    """

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """Move the module to the device(s); to be called before an optimizer is made for it."""
        ...

    def unwrap(self, module: nn.Module) -> nn.Module:
        """Undo `wrap`, so that parameters have the same names with every backend."""
        ...

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients on their rank, for all micro-batches of a step but the last."""
        ...

    def gather_weights(self, module: nn.Module) -> AbstractContextManager[None]:
        """Make the weights outside the blocks whole, for an evaluation between two steps."""
        ...

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum each value over the ranks; every rank gets the result."""
        ...

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale gradients down to `max_norm` if they exceed it; return the norm before (0-d)."""
        ...

    def main_process_first(self) -> AbstractContextManager[None]:
        """Run the block on rank 0, then on the others, which find what it has put into caches."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def close(self) -> None:
        """Leave the group of processes; on all ranks, after the wrapped module is released."""
        ...


class Optimizer(Protocol):
    """The part of `torch.optim.Optimizer` that the trainer uses."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class ConditionalOptimizer(Optimizer, Protocol):
    """An optimizer that decides on the device whether a step is taken."""

    def step_if(self, finite: Tensor) -> None:
        """Take a step if `finite` (0-d bool) is true; otherwise change nothing."""
        ...


class Tracker(Protocol):
    """A second destination of the figures that `metrics.jsonl` has in any case."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...

"""What the trainer asks of the parts that it drives. It knows no process, no network and no text: only these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from ddiff.core.rng import CounterRng

Batch = Any  # whatever `batch_at` gives and the objective takes; the trainer only hands it on


@dataclass(frozen=True)
class LossTerms:
    """One micro-batch's share of the global loss, and what to report of it.

    `loss` is (local sum) / (global count), a scalar with its graph: shares of micro-batches and ranks add up to the
    loss of the global batch. `metrics` are name -> (sum, count), divided once after everything has been added up.
    """

    loss: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    """A loss with the module whose parameters it trains."""

    module: nn.Module

    def counts(self, batch: Batch) -> Mapping[str, Tensor | float]:
        """field -> number of scored items, from the data alone: summed over the global batch before any forward."""
        ...

    def __call__(
        self, batch: Batch, rng: CounterRng, denominators: Mapping[str, Tensor], slots: int
    ) -> LossTerms:
        """`denominators`: global counts per field (0-d float64); `slots`: rows of the global batch."""
        ...


class Backend(Protocol):
    """Where the work runs: devices and processes are known here and nowhere else.

    Losses are shares that add up, so a backend with several processes *sums* gradients, it does not average them. Rank 0
    writes, reports, evaluates and samples; the others only train.
    """

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this backend's device(s); call it before an optimizer is made of its parameters."""
        ...

    def unwrap(self, module: nn.Module) -> nn.Module:
        """What was wrapped: the names of its parameters are those of every other backend."""
        ...

    def accumulating(self, module: nn.Module) -> AbstractContextManager[None]:
        """Entered for all micro-batches of a step but the last: gradients stay on their rank until then."""
        ...

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each value summed over the ranks; the same on every rank."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """The global gradient norm (0-d) before clipping; gradients are scaled to `max_norm` when they exceed it."""
        ...

    def first(self) -> AbstractContextManager[None]:
        """Rank 0 goes through the block alone, then all the others: what it has put into the cache they find there."""
        ...

    def barrier(self) -> None: ...

    def close(self) -> None:
        """Called on all ranks, once nobody holds the wrapped module; the process goes on alone."""
        ...


class Optimizer(Protocol):
    """The part of `torch.optim.Optimizer` that the trainer uses; any of those will do."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Tracker(Protocol):
    """A second home for the figures that `metrics.jsonl` keeps anyway."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...

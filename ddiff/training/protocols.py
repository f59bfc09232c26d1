"""Interfaces of objective, backend, optimizer and tracker for the trainer.

The trainer depends only on these interfaces, not on a diffusion process, network or data format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from ddiff.core.rng import CounterRng

Batch = Any  # batch that `batch_at` returns and the objective takes


@dataclass(frozen=True)
class LossTerms:
    """Contribution of a micro-batch to the loss of the global batch, and its metrics.

    Attributes:
        loss: (sum over the micro-batch) / (count over the global batch), a scalar with gradient.
            The losses of all micro-batches and ranks add up to the loss of the global batch.
        metrics: name -> (sum, count). Sums and counts of all micro-batches and ranks are added up
            before the division.
    """

    loss: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    """Training loss together with the module whose parameters are trained."""

    module: nn.Module

    def counts(self, batch: Batch) -> Mapping[str, Tensor | float]:
        """Return the numbers of scored items of a batch by name, such as the number of tokens.

        The counts must depend on the data only, not on the network.
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
            denominators: name -> sum of `counts` over the global batch, a 0-d float64 tensor.
            slots: number of sequences in the global batch.
        """
        ...


class Backend(Protocol):
    """Interface to the devices and processes of a run.

    The losses of the ranks add up to the global loss, so a backend with several processes sums
    gradients and does not average them. Rank 0 writes and reports. All ranks train, evaluate and
    sample. A backend with several processes initializes torch.distributed.
    """

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """Move `module` to the device of this process, and wrap it for parallel training.

        Call this method before building the optimizer.
        """
        ...

    def unwrap(self, module: nn.Module) -> nn.Module:
        """Undo `wrap`, so that parameters have the same names with every backend."""
        ...

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context manager that skips the sum of gradients over the ranks.

        The trainer uses this context manager for all micro-batches of a step except the last one.
        """
        ...

    def gather_weights(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context manager that gathers the weights that are in no block, for evaluation.

        Blocks (the units of sharding, such as transformer layers) gather their own weights in every
        forward pass.
        """
        ...

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum each value over all ranks, and return the sums on every rank."""
        ...

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale the gradients so that their total norm is at most `max_norm`.

        Return the norm before clipping, a 0-d tensor. If `max_norm` is None, the gradients are not
        changed.
        """
        ...

    def main_process_first(self) -> AbstractContextManager[None]:
        """Context manager that runs the block on rank 0 first, then on the other ranks.

        The other ranks can then read the files that rank 0 has cached.
        """
        ...

    def barrier(self) -> None:
        """Wait until every rank has called `barrier`."""
        ...

    def close(self) -> None:
        """Destroy the process group.

        Call this method on all ranks, after the wrapped module is released.
        """
        ...


class Optimizer(Protocol):
    """Subset of the methods of `torch.optim.Optimizer` that the trainer uses."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class ConditionalOptimizer(Optimizer, Protocol):
    """Optimizer whose step can depend on a tensor on the device, without a synchronization."""

    def step_if(self, finite: Tensor) -> None:
        """Take a step if the 0-d bool tensor `finite` is True.

        Otherwise parameters and optimizer state remain unchanged.
        """
        ...


class Tracker(Protocol):
    """Logger of training metrics, such as wandb, in addition to `metrics.jsonl`.

    After a kill, a run resumes from its newest checkpoint and logs the metrics of the steps since
    that checkpoint again. A tracker must replace or ignore them, so that no step is in a curve
    twice. A tracker that is also a `ResultTracker` receives the results of the run.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of training or validation at a step."""
        ...

    def close(self) -> None:
        """Send or write everything that was logged."""
        ...


@dataclass(frozen=True)
class RunResults:
    """Results of a trained run: evaluation, samples, pictures and report.

    Attributes:
        figures: name -> value, such as "evaluation/ppl". The ends of a confidence interval have the
            names "evaluation/ppl/low" and "evaluation/ppl/high".
        samples: samples with the same keys in the same order. The values are numbers and texts.
        pictures: PNG files with grids of samples.
        report: HTML file that `ddiff report` wrote, or None.
    """

    figures: Mapping[str, float]
    samples: Sequence[Mapping[str, int | float | str]] = ()
    pictures: Sequence[Path] = ()
    report: Path | None = None


@runtime_checkable
class ResultTracker(Tracker, Protocol):
    """Tracker that also receives the results of a run. Other trackers receive only metrics."""

    def log_results(self, step: int, results: RunResults) -> None:
        """Log the results of the weights of a step, before `close` and after the metrics."""
        ...

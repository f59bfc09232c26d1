"""The diffusion objective: the bound's densities, weighted for training as a training loss says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, cast, final

import torch
from torch import Tensor

from ddiff.core.elbo import Ask, Likelihood, NelboTerms, corrupt, nelbo
from ddiff.core.law import CleanLaw
from ddiff.core.noise import Noise
from ddiff.core.process import ForwardProcess
from ddiff.core.times import TimeRule
from ddiff.nn.denoiser import Context, Denoiser, asking, rest_law
from ddiff.nn.heads import Question
from ddiff.training.protocols import LossTerms

if TYPE_CHECKING:
    from ddiff.data.batch import Batch


class TrainingLoss(Protocol):
    """What a row costs in training: a weight that no network enters, times what is read of the law.

    The bound never calls it.
    """

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] per unit of the row's own t; computed once for all rows."""

    def divergence(self, process: ForwardProcess, law: CleanLaw, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] nats; called chunk by chunk."""


@final
class ElboLoss:
    """The density itself: the training loss is the bound."""

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return process.weight(x0, zt, t)

    def divergence(self, process: ForwardProcess, law: CleanLaw, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return process.divergence(law, x0, zt, t)


@final
class ClippedLoss:
    """The density with its weight held in [smallest, largest]: steadier gradients, no longer the bound."""

    def __init__(self, smallest: float = 0.0, largest: float = 2.0) -> None:
        self.smallest, self.largest = smallest, largest

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return process.weight(x0, zt, t).clamp(self.smallest, self.largest)

    def divergence(self, process: ForwardProcess, law: CleanLaw, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return process.divergence(law, x0, zt, t)


@final
class DiffusionObjective:
    """Trains a denoiser on a process: `loss` weighs the rows, `times` draws when they are read.

    `module` is what the trainer and its backend hold: the denoiser, or a wrapper that forwards to it.
    """

    def __init__(self, process: ForwardProcess, denoiser: Denoiser, loss: TrainingLoss, times: TimeRule) -> None:
        self.process, self.denoiser, self.loss, self.times = process, denoiser, loss, times
        self.module: torch.nn.Module = denoiser

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"tokens": batch.scored.sum()}

    def __call__(self, batch: Batch, noise: Noise, denominators: Mapping[str, Tensor], slots: int) -> LossTerms:
        """(sum of the rows' loss over this micro-batch) / (tokens of the global batch), in nats per token."""
        process, x0 = self.process, batch.ids
        times = self.times.draw(noise, batch.index, slots, x0.shape[1])
        noisy = corrupt(process, x0, times, batch.scored, noise, "diffusion")
        reads = (times.speed > 0) & ~noisy.clean & process.active(noisy.zt)
        rows = reads.reshape(-1).nonzero().squeeze(-1)
        x_rows, z_rows, t_rows, speed = (v.reshape(-1)[rows] for v in (x0, noisy.zt, noisy.t, times.speed))

        asked = (x_rows, z_rows, t_rows)
        loss_weight = speed * self.loss.weight(process, *asked)
        bound_weight = speed * process.weight(*asked)

        def question(law: CleanLaw, idx: Tensor) -> tuple[Tensor, ...]:
            chunk = [values[idx] for values in asked]
            loss = self.loss.divergence(process, law, *chunk)  # first: a law keeps what it computes, with its graph
            with torch.no_grad():
                density = bound_weight[idx] * process.divergence(law, *chunk)
            return loss_weight[idx] * loss, density

        node, fn = process.scope(z_rows), cast(Question, question)
        if self.denoiser.given == "all":
            node, fn = torch.full_like(z_rows, process.vocabulary.root), rest_law(question, process, z_rows, t_rows)
        total, _, density = self.module(noisy.zt, noisy.t, context_of(batch), rows, node, fn)
        tokens = denominators["tokens"]
        return LossTerms(total / tokens.to(total.dtype), self._metrics(density, z_rows, batch))

    def _metrics(self, density: Tensor, z_rows: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        count = batch.scored.sum()
        metrics = {"nelbo_diffusion_nats_per_token": (density.sum(), count)}
        level = self.process.vocabulary.level_of(z_rows)
        if self.process.vocabulary.num_levels > 1:
            for l in range(1, self.process.vocabulary.num_levels + 1):
                metrics[f"nelbo_level{l}_nats_per_token"] = ((density * (level == l)).sum(), count)
        return metrics

    def ask(self, batch: Batch) -> Ask:
        """How samplers and the bound ask the denoiser about these rows."""
        return asking(self.denoiser, self.process, context_of(batch))

    def nll(self, batch: Batch, noise: Noise, slot: Tensor, slots: int | Tensor, times: TimeRule) -> Likelihood:
        """One unbiased draw of the bound for every position of the batch; no training weight enters it."""
        terms = nelbo(self.process, self.ask(batch), batch.ids, batch.scored, times, noise, slot, slots)
        named = {"closing": terms.closing, "diffusion": terms.diffusion, "decoding": terms.decoding}
        return Likelihood(named, self._by_level(terms))

    def _by_level(self, terms: NelboTerms) -> dict[str, Tensor]:
        level = self.process.vocabulary.level_of(terms.noisy.zt)
        return {
            f"level{l}": torch.where(level == l, terms.diffusion, 0.0)
            for l in range(self.process.vocabulary.num_levels + 1)
            if l > 0 or self.process.vocabulary.num_levels == 0
        }


def context_of(batch: Batch) -> Context:
    """What the backbone is told of a batch; None where nothing is padded or packed, so that attention goes unmasked."""
    valid = None if bool(batch.valid.all()) else batch.valid
    return Context(valid, batch.document if batch.packed else None, batch.conditions)

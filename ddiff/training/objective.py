"""The diffusion objective: the bound's densities, weighted for training as a training loss says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast, final

import torch
from torch import Tensor

from ddiff.core.elbo import Likelihood, NelboTerms, Network, corrupt, nelbo
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy, TimeRule, Times
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Denoiser, as_network
from ddiff.nn.heads import Question
from ddiff.training.context import build_context, drop_conditions
from ddiff.training.device import get_device, to_device
from ddiff.training.protocols import LossTerms

if TYPE_CHECKING:
    from ddiff.data.batch import Batch


class TrainingLoss(Protocol):
    """What a row costs in training: a weight that no network enters, times what is read of the law.

    The bound never calls it. What is read is the process's own divergence, unless the loss has a method
    `divergence(process, law, x0, zt, t) -> [r]` nats, called chunk by chunk. A loss that wants other rows than those that
    the bound charges chooses them in a method `reads(process, noisy, times) -> bool [B,L]`; rows that have no speed of
    their own count with speed 1. A loss that is no bound may bear a `name`: its sum is then logged as
    `loss_{name}_nats_per_token`.
    """

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] per unit of the row's own t; computed once for all rows."""


@final
class ElboLoss:
    """The density itself: the training loss is the bound."""

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return process.weight(x0, zt, t)


@final
class ClippedLoss:
    """The density with its weight held in [smallest, largest]: steadier gradients, no longer the bound.

    The weight is the total true reverse rate, so that this is the same loss for the same chain in every family. Keep
    `smallest` at 0 where tokens are noise: a clean token weighs almost nothing near t = 0, and its divergence grows as 1/t.
    """

    def __init__(self, smallest: float = 0.0, largest: float = 2.0) -> None:
        if not 0.0 <= smallest <= largest:
            raise ArgumentError(
                f"ClippedLoss: 0 <= smallest <= largest must hold; got smallest = {smallest}, largest = {largest}."
            )
        self.smallest, self.largest = smallest, largest

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return process.weight(x0, zt, t).clamp(self.smallest, self.largest)


DECODING_SHARE = (
    0.1  # of the sequences of a batch, where the process does not close at the clean end
)


class _Drawn(NamedTuple):
    """Rows [k] of a batch: flat positions, clean words, states, times, and the factors of bound and loss; `decodes`
    marks those that are read for the decoding term (None: no row)."""

    noisy: Noisy
    rows: Tensor
    x0: Tensor
    zt: Tensor
    t: Tensor
    bound_weight: Tensor
    loss_weight: Tensor
    decodes: Tensor | None


@final
class DiffusionObjective:
    """Trains a denoiser on a process: `loss` weighs the rows, `times` draws when they are read.

    Where the process does not close at the clean end, a `decoding_share` of the sequences is read at the first times,
    for the decoding term, and counts for all: the bound charges that term, so the loss trains it.
    `module` is what the trainer and its backend hold: the denoiser, or a wrapper that forwards to it.
    """

    def __init__(
        self,
        process: ForwardProcess,
        denoiser: Denoiser,
        loss: TrainingLoss,
        times: TimeRule,
        decoding_share: float | None = None,
    ) -> None:
        if decoding_share is None:  # a bound that charges a last draw has to train it
            decoding_share = (
                0.0 if process.closes_at_clean or hasattr(loss, "reads") else DECODING_SHARE
            )
        if not 0.0 <= decoding_share < 1.0:
            raise ArgumentError(
                f"DiffusionObjective: decoding_share must be in [0, 1); got {decoding_share}."
            )
        self.process, self.denoiser, self.loss, self.times = process, denoiser, loss, times
        self.decoding_share = decoding_share
        self.module: torch.nn.Module = denoiser

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"tokens": batch.scored.sum()}

    def __call__(
        self, batch: Batch, rng: CounterRng, denominators: Mapping[str, Tensor], slots: int
    ) -> LossTerms:
        """(sum of the rows' loss over this micro-batch) / (tokens of the global batch), in nats per token."""
        reading, process, device = self.denoiser.reading, self.process, get_device(self.module)
        # All that depends on what was drawn is found where the batch is, on the host: the device is never waited for.
        drawn = self._draw(batch, rng, slots)
        node = reading.scope(process.scope(drawn.zt), process)
        context = drop_conditions(build_context(batch), self.denoiser.condition_dropout, rng)
        prepared = reading.prepared(process, drawn.zt, drawn.t)
        drawn, context, prepared = to_device((drawn, context, prepared), device)
        tokens = denominators["tokens"]
        fn = reading.question(self._question(drawn, tokens), process, drawn.zt, drawn.t, prepared)
        loss, _, density = self.module(drawn.noisy, context, drawn.rows, node, fn)
        metrics = self._metrics(density, drawn.zt, batch)
        if name := getattr(self.loss, "name", None):
            metrics[f"loss_{name}_nats_per_token"] = (loss.detach() * tokens, batch.scored.sum())
        return LossTerms(loss, metrics)

    def _draw(self, batch: Batch, rng: CounterRng, slots: int) -> _Drawn:
        """The rows of a batch that are read, and what each stands for."""
        process, x0, share = self.process, batch.ids, self.decoding_share
        clock = process.information_time
        times = self.times.draw(clock, rng, batch.index, slots, x0.shape[1])
        decodes = torch.zeros_like(batch.scored)
        if share > 0.0:
            # neighbours in the batch, from a random first one: their times, and so the times of all others, are spread out
            chosen = ((batch.index / slots + rng.shared("ends")) % 1.0 < share).unsqueeze(-1)
            first, _ = self.times.ends(clock, rng, batch.index, slots, x0.shape[1])
            times, decodes = _mixed(chosen, first, times, share), decodes | chosen
        noisy = corrupt(process, x0, times, batch.scored, rng, "diffusion")
        charged = (times.speed > 0) & ~noisy.clean & (process.active(noisy.zt) | decodes)
        choose = getattr(self.loss, "reads", None)
        reads = charged if choose is None else choose(process, noisy, times) & batch.scored
        rows = reads.reshape(-1).nonzero().squeeze(-1)
        x_rows, z_rows, t_rows, speed, is_charged, is_decoded = (
            v.reshape(-1)[rows] for v in (x0, noisy.zt, noisy.t, times.speed, charged, decodes)
        )
        asked = (x_rows, z_rows, t_rows)
        exact = process.weight(*asked)
        weight = (
            exact if isinstance(self.loss, ElboLoss) else self.loss.weight(process, *asked)
        )  # not the same twice
        bound = torch.where(is_charged, speed * exact, 0.0)
        loss = torch.where(speed > 0, speed, 1.0) * weight
        if share > 0.0:
            bound, loss = (torch.where(is_decoded, speed, weight) for weight in (bound, loss))
        return _Drawn(
            noisy, rows, x_rows, z_rows, t_rows, bound, loss, is_decoded if share > 0.0 else None
        )

    def _question(self, drawn: _Drawn, tokens: Tensor) -> Question:
        """(this row's share of the loss, its density) of a chunk; the shares are of the mean over `tokens`."""
        process, weight = self.process, drawn.loss_weight / tokens

        def question(dist: CleanDistribution, idx: Tensor) -> tuple[Tensor, ...]:
            chunk = (drawn.x0[idx], drawn.zt[idx], drawn.t[idx])
            loss, divergence = self._read(dist, chunk)
            if drawn.decodes is not None:
                decodes = drawn.decodes[idx]
                loss = torch.where(decodes, process.decode_nll(dist, *chunk), loss)
                divergence = torch.where(
                    decodes, 0.0, divergence
                )  # the diffusion term alone is reported
            return weight[idx] * loss, drawn.bound_weight[idx] * divergence

        return cast(Question, question)

    def _read(
        self, dist: CleanDistribution, chunk: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What the loss reads of the law, with its graph, and the bound's divergence without one: one reading mostly."""
        if (read := getattr(self.loss, "divergence", None)) is None:
            divergence = self.process.divergence(dist, *chunk)
            return divergence, divergence.detach()
        loss = read(
            self.process, dist, *chunk
        )  # first: a law keeps what it computes, with its graph
        with torch.no_grad():
            return loss, self.process.divergence(dist, *chunk)

    def _metrics(
        self, density: Tensor, z_rows: Tensor, batch: Batch
    ) -> dict[str, tuple[Tensor, Tensor]]:
        count = batch.scored.sum()
        metrics = {"nelbo_diffusion_nats_per_token": (density.sum(), count)}
        level = self.process.vocabulary.level_of(z_rows)
        if self.process.vocabulary.num_levels > 1:
            for l in range(1, self.process.vocabulary.num_levels + 1):
                metrics[f"nelbo_level{l}_nats_per_token"] = ((density * (level == l)).sum(), count)
        return metrics

    def network(self, batch: Batch) -> Network:
        """How samplers and the bound ask the denoiser about these rows."""
        return as_network(self.denoiser, self.process, build_context(batch))

    def nll(
        self, batch: Batch, rng: CounterRng, slot: Tensor, slots: int | Tensor, times: TimeRule
    ) -> Likelihood:
        """One unbiased draw of the bound for every position of the batch; no training weight enters it."""
        terms = nelbo(
            self.process, self.network(batch), batch.ids, batch.scored, times, rng, slot, slots
        )
        named = {"closing": terms.closing, "diffusion": terms.diffusion, "decoding": terms.decoding}
        return Likelihood(named, self._by_level(terms))

    def _by_level(self, terms: NelboTerms) -> dict[str, Tensor]:
        level = self.process.vocabulary.level_of(terms.noisy.zt)
        return {
            f"level{l}": torch.where(level == l, terms.diffusion, 0.0)
            for l in range(self.process.vocabulary.num_levels + 1)
            if l > 0 or self.process.vocabulary.num_levels == 0
        }


def _mixed(chosen: Tensor, first: Times, times: Times, share: float) -> Times:
    """Times of which the sequences `chosen` [B,1] are those of `first`; each kind counts for its share."""
    pick = lambda a, b: a if a is None else torch.where(chosen, a, b)  # noqa: E731
    return Times(
        torch.where(chosen, first.t, times.t),
        torch.where(chosen, first.speed / share, times.speed / (1.0 - share)),
        torch.where(chosen, first.clean, times.clean),
        pick(first.waiting, times.waiting),
        pick(first.block, times.block),
        times.paired,
    )

"""Diffusion objective: the densities of the bound, weighted by a training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import torch
from torch import Tensor

from ddiff.core.elbo import Likelihood, NelboTerms, Network, corrupt, nelbo
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy, TimeRule, Times
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Denoiser, as_network
from ddiff.nn.heads import HeadCallback
from ddiff.training.context import build_context, drop_conditions
from ddiff.training.device import get_device, to_device
from ddiff.training.losses import ElboLoss, TrainingLoss
from ddiff.training.protocols import LossTerms

if TYPE_CHECKING:
    from ddiff.data.batch import Batch

DECODING_SHARE = 0.1  # of the sequences of a batch, if the process is still noisy at t = 0


class _Rows(NamedTuple):
    """The k rows of a batch that a step reads.

    `rows` [k]: positions in the flattened batch; `x0`, `zt`, `t` [k]: their clean tokens, states
    and times; `bound_weight`, `loss_weight` [k]: factors of the bound and of the loss;
    `is_decoded` [k] bool: rows of the decoding term (None: no row).
    """

    noisy: Noisy
    rows: Tensor
    x0: Tensor
    zt: Tensor
    t: Tensor
    bound_weight: Tensor
    loss_weight: Tensor
    is_decoded: Tensor | None


@final
class DiffusionObjective:
    """Train a denoiser on a process: `times` draws the times of the rows, `loss` weights them.

    If the process does not close at the clean end, the bound has a decoding term, -ln P(x | z) at
    the first times. Then a `decoding_share` of the sequences of a batch is read at the first times
    and counts for all of them; the other sequences are read at drawn times.

    `module` is what the trainer and its backend hold: the denoiser, or a wrapper around it.
    """

    bound = "NELBO"

    def __init__(
        self,
        process: ForwardProcess,
        denoiser: Denoiser,
        loss: TrainingLoss[Any],
        times: TimeRule,
        decoding_share: float | None = None,
    ) -> None:
        if decoding_share is None:
            has_decoding_term = not process.closes_at_clean and not loss.has_own_rows
            decoding_share = DECODING_SHARE if has_decoding_term else 0.0
        if not 0.0 <= decoding_share < 1.0:
            raise ArgumentError(
                f"DiffusionObjective: decoding_share must be in [0, 1); got {decoding_share}."
            )
        self.process = process
        self.denoiser = denoiser
        self.loss = loss
        self.times = times
        self.decoding_share = decoding_share
        self.module: torch.nn.Module = denoiser

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"tokens": batch.scored.sum()}

    def __call__(
        self,
        batch: Batch,
        rng: CounterRng,
        denominators: Mapping[str, Tensor],
        slots: int,
    ) -> LossTerms:
        """Return (sum of the rows' losses) / (tokens of the global batch), in nats per token."""
        process = self.process
        parameterization = self.denoiser.parameterization
        # Everything that depends on what was drawn is computed on the host, where the batch is: a
        # step must not wait for the device to learn, for example, how many rows there are.
        drawn = self._draw(batch, rng, slots)
        node = parameterization.scope(process.scope(drawn.zt), process)
        context = drop_conditions(build_context(batch), self.denoiser.condition_dropout, rng)
        prepared = parameterization.prepare(process, drawn.zt, drawn.t)
        parts = (drawn, context, prepared)
        drawn, context, prepared = to_device(parts, get_device(self.module))
        tokens = denominators["tokens"]
        fn = parameterization.wrap_callback(
            self._question(drawn, tokens), process, drawn.zt, drawn.t, prepared
        )
        loss, _, density = self.module(drawn.noisy, context, drawn.rows, node, fn)
        metrics = self._metrics(density, drawn.zt, batch)
        if self.loss.name is not None:
            total = loss.detach() * tokens
            metrics[f"loss_{self.loss.name}_nats_per_token"] = (total, batch.scored.sum())
        return LossTerms(loss, metrics)

    def _draw(
        self,
        batch: Batch,
        rng: CounterRng,
        slots: int,
    ) -> _Rows:
        """Draw times and noisy states of a batch and select the rows that are read."""
        process = self.process
        times, decodes = self._draw_times(batch, rng, slots)
        noisy = corrupt(process, batch.ids, times, batch.scored, rng, "diffusion")
        can_change = process.active(noisy.zt) | decodes
        charged = (times.speed > 0) & ~noisy.clean & can_change
        selected = charged
        if self.loss.has_own_rows:
            selected = self.loss.select_rows(process, noisy, times) & batch.scored
        rows = selected.reshape(-1).nonzero().squeeze(-1)
        x0 = _take(batch.ids, rows)
        zt = _take(noisy.zt, rows)
        t = _take(noisy.t, rows)
        speed = _take(times.speed, rows)
        is_decoded = _take(decodes, rows)
        exact = process.weight(x0, zt, t)
        weight = exact
        if not isinstance(self.loss, ElboLoss):  # whose weight is not computed twice
            weight = self.loss.weight(process, x0, zt, t)
        bound_weight = torch.where(_take(charged, rows), speed * exact, 0.0)
        loss_weight = torch.where(speed > 0, speed, 1.0) * weight
        if self.decoding_share == 0.0:
            return _Rows(noisy, rows, x0, zt, t, bound_weight, loss_weight, None)
        # A row of the decoding term weighs its speed, which is 1/share.
        bound_weight = torch.where(is_decoded, speed, bound_weight)
        loss_weight = torch.where(is_decoded, speed, loss_weight)
        return _Rows(noisy, rows, x0, zt, t, bound_weight, loss_weight, is_decoded)

    def _draw_times(
        self,
        batch: Batch,
        rng: CounterRng,
        slots: int,
    ) -> tuple[Times, Tensor]:
        """Draw the times of a batch; also return [B,L] bool, the positions of the decoding term."""
        share = self.decoding_share
        clock = self.process.information_time
        length = batch.ids.shape[1]
        times = self.times.draw(clock, rng, batch.index, slots, length)
        decodes = torch.zeros_like(batch.scored)
        if share == 0.0:
            return times, decodes
        # The decoded sequences are neighbours in the batch, from a random first one. Times are
        # stratified by slot, so the times of the other sequences stay spread out.
        place = (batch.index / slots + rng.uniform_per_group("ends")) % 1.0
        chosen = (place < share).unsqueeze(-1)
        first, _ = self.times.ends(clock, rng, batch.index, slots, length)
        return _merge_times(chosen, first, times, share), decodes | chosen

    def _question(self, drawn: _Rows, tokens: Tensor) -> HeadCallback:
        """Build the callback on the predicted distribution of a chunk of rows.

        It returns the row's share of the mean loss over `tokens`, and its density in the bound.
        """
        process = self.process
        weight = drawn.loss_weight / tokens

        def question(dist: CleanDistribution, idx: Tensor) -> tuple[Tensor, ...]:
            x0 = drawn.x0[idx]
            zt = drawn.zt[idx]
            t = drawn.t[idx]
            loss, divergence = self._divergences(dist, x0, zt, t)
            if drawn.is_decoded is not None:
                is_decoded = drawn.is_decoded[idx]
                decode_nll = process.decode_nll(dist, x0, zt, t)
                loss = torch.where(is_decoded, decode_nll, loss)
                # Only the diffusion term is reported.
                divergence = torch.where(is_decoded, 0.0, divergence)
            return weight[idx] * loss, drawn.bound_weight[idx] * divergence

        return cast(HeadCallback, question)

    def _divergences(
        self,
        dist: CleanDistribution,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence of the loss with its graph and that of the bound without one."""
        if not self.loss.has_own_divergence:
            divergence = self.process.divergence(dist, x0, zt, t)
            return divergence, divergence.detach()
        # The loss comes first: a distribution caches what it computes, and the cache needs a graph.
        loss = self.loss.divergence(self.process, dist, x0, zt, t)
        with torch.no_grad():
            return loss, self.process.divergence(dist, x0, zt, t)

    def _metrics(
        self, density: Tensor, zt: Tensor, batch: Batch
    ) -> dict[str, tuple[Tensor, Tensor]]:
        count = batch.scored.sum()
        metrics = {"nelbo_diffusion_nats_per_token": (density.sum(), count)}
        vocabulary = self.process.vocabulary
        if vocabulary.num_levels > 1:
            level = vocabulary.level_of(zt)
            for l in range(1, vocabulary.num_levels + 1):
                total = (density * (level == l)).sum()
                metrics[f"nelbo_level{l}_nats_per_token"] = (total, count)
        return metrics

    def network(self, batch: Batch) -> Network:
        """Return the denoiser as the network that samplers and the bound query for this batch."""
        return as_network(self.denoiser, self.process, build_context(batch))

    def nll(
        self,
        batch: Batch,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        times: TimeRule,
    ) -> Likelihood:
        """Draw the bound once for every position of the batch, without training weights."""
        network = self.network(batch)
        terms = nelbo(self.process, network, batch.ids, batch.scored, times, rng, slot, slots)
        named = {
            "closing": terms.closing,
            "diffusion": terms.diffusion,
            "decoding": terms.decoding,
        }
        return Likelihood(named, self._by_level(terms))

    def _by_level(self, terms: NelboTerms) -> dict[str, Tensor]:
        vocabulary = self.process.vocabulary
        level = vocabulary.level_of(terms.noisy.zt)
        # Level 0, the tokens, is charged only if there is no level above them.
        first = 1 if vocabulary.num_levels else 0
        return {
            f"level{l}": torch.where(level == l, terms.diffusion, 0.0)
            for l in range(first, vocabulary.num_levels + 1)
        }


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """Select rows [k] of values [B,L]."""
    return values.reshape(-1)[rows]


def _merge_times(
    chosen: Tensor,
    first: Times,
    times: Times,
    share: float,
) -> Times:
    """Take the times of the sequences `chosen` [B,1] from `first`, all others from `times`.

    The speeds are divided by the share of each kind, so that each kind counts for all sequences.
    """
    speed = torch.where(chosen, first.speed / share, times.speed / (1.0 - share))
    return Times(
        torch.where(chosen, first.t, times.t),
        speed,
        torch.where(chosen, first.clean, times.clean),
        _choose(chosen, first.at_prior, times.at_prior),
        _choose(chosen, first.block, times.block),
        times.paired,
    )


def _choose(chosen: Tensor, first: Any, second: Any) -> Any:
    return None if first is None else torch.where(chosen, first, second)

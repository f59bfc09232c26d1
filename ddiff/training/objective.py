"""Diffusion objective: training loss and reported bound (NELBO) of a denoiser on a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import torch
from torch import Tensor

from ddiff.core.elbo import Likelihood, NelboTerms, Network, corrupt, nelbo
from ddiff.core.information import find_time_bins
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy, TimeRule, Times
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.network import as_network
from ddiff.nn.parameterization import HeadCallback
from ddiff.training.context import build_context, drop_conditions
from ddiff.training.device import get_device, to_device
from ddiff.training.losses import ElboLoss, TrainingLoss
from ddiff.training.protocols import LossTerms

if TYPE_CHECKING:
    from ddiff.data.batch import Batch

DECODING_SHARE = 0.1  # share of sequences for the decoding term, if states are still noisy at t = 0


class _Rows(NamedTuple):
    """The k rows (positions) of a batch at which a training step evaluates the head.

    `noisy`: states of the whole batch. `rows` [k]: indices of the rows in the flattened batch.
    `x0`, `zt`, `t` [k]: clean tokens, states and noise times of the rows. `bound_weight`,
    `loss_weight` [k]: factors of a row's divergence in the bound and in the training loss.
    `is_decoded` [k] bool: True at rows of the decoding term (see `DiffusionObjective`); None if no
    row estimates this term.
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
    """Training objective of a denoiser on a forward process.

    If states are still noisy at t = 0 (`process.closes_at_clean` is false), the bound has a
    decoding term: -ln P(x | z), where x is the clean sequence and z its noisy state at the smallest
    noise time. Randomly chosen sequences of the batch then estimate the decoding term, with weight
    1 / decoding_share. The other sequences estimate the diffusion term at random noise times, with
    weight 1 / (1 - decoding_share).

    Args:
        loss: training loss of each row (position).
        times: draws a noise time for each position.
        decoding_share: fraction of the sequences of a batch, in [0, 1), that estimate the decoding
            term. None: 0.1 if the bound has a decoding term and `loss` does not override
            `select_rows`, otherwise 0.

    The attribute `module` is the module that the trainer calls: the denoiser, or the backend's
    wrapper of the denoiser.
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
        if times.has_detours and not process.has_level_paths:
            raise ArgumentError(
                f"DiffusionObjective: {type(times).__name__} draws the occupancies of levels, so "
                "the process must be a tree of two or more levels above the tokens; got "
                f'{process}. Use times = "flat".'
            )
        self.process = process
        self.denoiser = denoiser
        self.loss = loss
        self.times = times
        self.decoding_share = decoding_share
        self.module: torch.nn.Module = denoiser

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"tokens": batch.tokens.sum()}

    def __call__(
        self,
        batch: Batch,
        rng: CounterRng,
        denominators: Mapping[str, Tensor],
        slots: int,
    ) -> LossTerms:
        """Return the loss of a micro-batch, in nats per token.

        The loss is the sum of the losses of all rows, divided by `denominators["tokens"]`, the
        number of scored tokens of the global batch. `slots` is the number of sequences of the
        global batch.
        """
        process = self.process
        parameterization = self.denoiser.parameterization
        # Row selection and weights are computed on the host, where the batch is. On a device, the
        # host would have to wait for the number of selected rows.
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
            metrics[f"loss_{self.loss.name}_nats_per_token"] = (total, batch.tokens.sum())
        return LossTerms(loss, metrics)

    def _draw(
        self,
        batch: Batch,
        rng: CounterRng,
        slots: int,
    ) -> _Rows:
        """Draw noise times and noisy states, and select the rows at which the head is evaluated.

        `slots`: number of sequences of the global batch.
        """
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
        if times.detour is not None:
            process = process.along(times.detour.take(rows))
        exact = process.weight(x0, zt, t)
        weight = exact
        if not isinstance(self.loss, ElboLoss):  # the weight of ElboLoss is `exact`
            weight = self.loss.weight(process, x0, zt, t)
        bound_weight = torch.where(_take(charged, rows), speed * exact, 0.0)
        loss_weight = torch.where(speed > 0, speed, 1.0) * weight
        if self.decoding_share == 0.0:
            return _Rows(noisy, rows, x0, zt, t, bound_weight, loss_weight, None)
        # For a row of the decoding term, `speed` is its weight 1/decoding_share.
        bound_weight = torch.where(is_decoded, speed, bound_weight)
        loss_weight = torch.where(is_decoded, speed, loss_weight)
        return _Rows(noisy, rows, x0, zt, t, bound_weight, loss_weight, is_decoded)

    def _draw_times(
        self,
        batch: Batch,
        rng: CounterRng,
        slots: int,
    ) -> tuple[Times, Tensor]:
        """Draw the noise times of a batch.

        Returns the noise times, and a bool tensor [B,L], True at the positions that estimate the
        decoding term. `slots`: number of sequences of the global batch.
        """
        share = self.decoding_share
        clock = self.process.information_time
        length = batch.ids.shape[1]
        times = self.times.draw(clock, rng, batch.index, slots, length)
        decodes = torch.zeros_like(batch.scored)
        if share == 0.0:
            return times, decodes
        # The sequences of the decoding term are consecutive in the batch, from a random first
        # sequence. Noise times are stratified by slot, so the noise times of the other sequences
        # remain evenly spread.
        place = (batch.index / slots + rng.uniform_per_group("ends")) % 1.0
        chosen = (place < share).unsqueeze(-1)
        first, _ = self.times.ends(clock, rng, batch.index, slots, length)
        return _merge_times(chosen, first, times, share), decodes | chosen

    def _question(self, drawn: _Rows, tokens: Tensor) -> HeadCallback:
        """Build the callback that computes loss and bound from the predicted distributions of rows.

        The head calls it for chunks of the rows `drawn`. For each row the callback returns two
        numbers: the row's loss divided by `tokens` (the tokens of the global batch), and the row's
        contribution to the diffusion term of the bound in nats.
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
                # The metrics of a training step contain only the diffusion term.
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
        """Return the divergences of the training loss and those of the bound, one per row.

        Only the divergence of the training loss has a gradient. `dist`: predicted distributions of
        the rows.
        """
        if not self.loss.has_own_divergence:
            divergence = self.process.divergence(dist, x0, zt, t)
            return divergence, divergence.detach()
        # The training loss is computed first, because the distribution caches intermediate tensors.
        # Tensors that are cached under no_grad would have no gradient.
        loss = self.loss.divergence(self.process, dist, x0, zt, t)
        with torch.no_grad():
            return loss, self.process.divergence(dist, x0, zt, t)

    def _metrics(
        self, density: Tensor, zt: Tensor, batch: Batch
    ) -> dict[str, tuple[Tensor, Tensor]]:
        count = batch.tokens.sum()
        metrics = {"nelbo_diffusion_nats_per_token": (density.sum(), count)}
        vocabulary = self.process.vocabulary
        if vocabulary.num_levels > 1:
            level = vocabulary.level_of(zt)
            for l in range(1, vocabulary.num_levels + 1):
                total = (density * (level == l)).sum()
                metrics[f"nelbo_level{l}_nats_per_token"] = (total, count)
        return metrics

    def network(self, batch: Batch) -> Network:
        """Return the denoiser as a network, with the context of `batch`.

        Samplers and the evaluation of the bound query this network.
        """
        return as_network(self.denoiser, self.process, build_context(batch))

    def nll(
        self,
        batch: Batch,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        times: TimeRule,
    ) -> Likelihood:
        """Estimate the bound at every position of `batch`, with one draw of noise times and states.

        Row b gets a noise time in the stratum `slot[b]` of `slots` strata, drawn by `times`. The
        training loss, its weights and `decoding_share` have no effect.
        """
        network = self.network(batch)
        terms = nelbo(self.process, network, batch.ids, batch.scored, times, rng, slot, slots)
        bins = find_time_bins(self.process.information_time, terms.noisy.t)
        return Likelihood(terms.by_name(), self._by_level(terms), bins)

    def _by_level(self, terms: NelboTerms) -> dict[str, Tensor]:
        vocabulary = self.process.vocabulary
        level = vocabulary.level_of(terms.noisy.zt)
        # The bound scores states of level 0 (tokens) only if the vocabulary has no higher level.
        first = 1 if vocabulary.num_levels else 0
        return {
            f"level{l}": torch.where(level == l, terms.diffusion, 0.0)
            for l in range(first, vocabulary.num_levels + 1)
        }


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """Return the k entries of `values` [B,L] at the flattened indices `rows` [k]."""
    return values.reshape(-1)[rows]


def _merge_times(
    chosen: Tensor,
    first: Times,
    times: Times,
    share: float,
) -> Times:
    """Combine the noise times for the decoding term and for the diffusion term in one batch.

    `share` is the fraction of the sequences that estimate the decoding term. These sequences have
    `chosen` [B,1] True: they get the noise times `first`, and their weights `Times.speed` are
    divided by `share`. The other sequences estimate the diffusion term: they get the noise times
    `times`, and their weights are divided by 1 - share.
    With these divisors, each of the two groups estimates a sum over the whole batch.
    """
    speed = torch.where(chosen, first.speed / share, times.speed / (1.0 - share))
    return Times(
        torch.where(chosen, first.t, times.t),
        speed,
        torch.where(chosen, first.clean, times.clean),
        _choose(chosen, first.at_prior, times.at_prior),
        _choose(chosen, first.block, times.block),
        times.paired,
        # The decoding term starts where the detour starts, so that both terms are of one path.
        detour=times.detour,
    )


def _choose(chosen: Tensor, first: Any, second: Any) -> Any:
    return None if first is None else torch.where(chosen, first, second)

"""Objective of samples of several fields: training loss and bound along a path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from ddiff.core.elbo import Likelihood, is_active
from ddiff.core.field import Field, Fields
from ddiff.core.fields import JointNetwork, corrupt_fields, joint_nelbo, mark_absent
from ddiff.core.paths import Path
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy, Times
from ddiff.core.training_paths import TrainingPath, draw_training
from ddiff.errors import ArgumentError, suggest
from ddiff.nn.joint_denoiser import FieldQuery, JointContext, JointDenoiser
from ddiff.nn.joint_network import JointDenoiserNetwork
from ddiff.training.device import get_device, to_device
from ddiff.training.objective import DECODING_SHARE
from ddiff.training.protocols import LossTerms

if TYPE_CHECKING:
    from ddiff.data.fields_batch import FieldsBatch


Normalization = Literal["item", "sample"]


class _Rows(NamedTuple):
    """The k rows of one field at which a training step evaluates the head.

    `rows` [k]: indices of the flat positions. `x0`, `zt`, `t` [k,...]: clean values, states and
    times. `bound_weight`, `loss_weight` [k]: factors of a row's divergence in the bound and in the
    training loss. `is_decoded` [k] bool: rows of the decoding term; None if no row estimates it.
    """

    rows: Tensor
    x0: Tensor
    zt: Tensor
    t: Tensor
    node: Tensor
    bound_weight: Tensor
    loss_weight: Tensor
    is_decoded: Tensor | None


@final
class FieldsObjective:
    """Training objective of a denoiser of several fields.

    The loss is the sum over fields of weight * (sum of the row losses) / (a number of the global
    batch), which `normalization` selects:

    - "item": the items of the field. Items are tokens for a field of tokens, and numbers for a
      field of vectors, so the unit is nats per item. Short fields count as much as long ones.
    - "sample": the samples, also those without the field. The unit is nats per sample. With losses
      of the bound and weights 1, the mean of the loss is the bound of a sample of all fields,
      without the terms that have no network (the closing term and the decoder of vectors).

    The weights do not enter a bound.

    The bound of a token process that is still noisy at t = 0 has a decoding term. Some samples of
    every leg on which such a field moves train this term, with the weight 1 / decoding_share, and
    the other samples the diffusion term (see `DiffusionObjective`). The decoder of vectors has
    nothing to train.

    Args:
        fields: fields of a sample; `positions` is replaced by the length of each batch.
        denoiser: network with one stream and one head per field.
        path: path or training rule from which training draws times.
        losses: training loss of every field.
        weights: factor of the loss of each field; 1 for fields that are not named.
        decoding_share: share of the samples that train the decoding term of a field, for every
            field that has one. 0 turns the term off. None: 0.1, or 0 if the loss of the field
            overrides `select_rows`.
        normalization: "item" or "sample".
    """

    bound = "NELBO"

    def __init__(
        self,
        fields: Fields,
        denoiser: JointDenoiser,
        path: TrainingPath,
        losses: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        decoding_share: float | None = None,
        normalization: Normalization = "item",
    ) -> None:
        if normalization not in get_args(Normalization):
            raise ArgumentError(
                f"FieldsObjective: normalization must be one of "
                f"{', '.join(get_args(Normalization))}; got {normalization!r}."
                + suggest(normalization, get_args(Normalization))
            )
        self.fields = dict(fields)
        self.denoiser = denoiser
        self.path = path
        self.losses = dict(losses)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in fields}
        self.normalization = normalization
        self.module: torch.nn.Module = denoiser
        _check_fields(self.fields, denoiser, self.losses, weights or {})
        self.decoding = _decoding_shares(self.fields, self.losses, decoding_share)

    def counts(self, batch: FieldsBatch) -> Mapping[str, Tensor]:
        """Return the number of items of every field of a batch: tokens, or numbers of vectors."""
        return {name: field.count_items() for name, field in batch.fields.items()}

    def __call__(
        self,
        batch: FieldsBatch,
        rng: CounterRng,
        denominators: Mapping[str, Tensor],
        slots: int,
    ) -> LossTerms:
        """Return the loss of a micro-batch; see the class for its unit."""
        fields = self.sized_fields(batch)
        # Times, states, rows and weights are computed on the host, where the batch is.
        times, decodes = draw_training(
            self.path, fields, rng, batch.index, slots, _find_present(batch), self.decoding
        )
        values = {name: field.values for name, field in batch.fields.items()}
        scored = {name: field.scored for name, field in batch.fields.items()}
        state = corrupt_fields(fields, values, times, scored, rng, "diffusion")
        state = mark_absent(state, batch.absent())
        rows = {}
        prepared = {}
        for name, field in fields.items():
            rows[name] = self._select_rows(
                name, field, batch, state[name], times[name], decodes.get(name)
            )
            parameterization = self.denoiser.parameterizations[name]
            prepared[name] = parameterization.prepare(field.process, rows[name].zt, rows[name].t)
        parts = (state, _context(batch), rows, prepared)
        state, context, rows, prepared = to_device(parts, get_device(self.module))
        queries = {}
        for name in fields:
            divisor = torch.full_like(denominators[name], slots)
            if self.normalization == "item":
                # A field without any item in the global batch has no rows and no loss.
                divisor = denominators[name].clamp(min=1.0)
            queries[name] = self._query(name, rows[name], prepared[name], divisor)
        results = self.module(state, context, queries)
        loss = torch.stack([total for total, *_ in results.values()]).sum()
        metrics = {}
        for name, (_, _, density) in results.items():
            unit = batch.fields[name].unit
            metrics[f"{name}_nelbo_diffusion_nats_per_{unit}"] = (
                density.sum(),
                batch.fields[name].count_items(),
            )
        return LossTerms(loss, metrics)

    def _select_rows(
        self,
        name: str,
        field: Field,
        batch: FieldsBatch,
        noisy: Noisy,
        times: Times,
        decodes: Tensor | None,
    ) -> _Rows:
        """Select the rows of a field that have a loss, with their weights.

        `decodes` [B] bool: samples that estimate the decoding term of the field; None: no sample.
        """
        process = field.process
        loss = self.losses[name]
        scored = batch.fields[name].scored
        can_change = is_active(process, noisy.zt)
        if decodes is not None:
            can_change = can_change | decodes.unsqueeze(-1)
        charged = (times.speed > 0) & ~noisy.clean & can_change & scored
        selected = charged
        if loss.has_own_rows:
            moves = (times.speed > 0).any(-1, keepdim=True)
            selected = loss.select_rows(process, noisy, times) & moves & scored
        rows = selected.reshape(-1).nonzero().squeeze(-1)
        x0 = batch.fields[name].values.flatten(0, 1)[rows]
        zt = noisy.zt.flatten(0, 1)[rows]
        t = noisy.t.reshape(-1)[rows]
        speed = times.speed.reshape(-1)[rows]
        is_decoded = None
        bound_weight = speed * process.weight(x0, zt, t)
        bound_weight = torch.where(charged.reshape(-1)[rows], bound_weight, 0.0)
        loss_weight = torch.where(speed > 0, speed, 1.0) * loss.weight(process, x0, zt, t)
        if decodes is not None:
            is_decoded = decodes.unsqueeze(-1).expand_as(charged).reshape(-1)[rows]
            # The speed of a row of the decoding term is its weight.
            bound_weight = torch.where(is_decoded, speed, bound_weight)
            loss_weight = torch.where(is_decoded, speed, loss_weight)
        node = self.denoiser.parameterizations[name].scope(process.scope(zt), process)
        return _Rows(rows, x0, zt, t, node, bound_weight, loss_weight, is_decoded)

    def _query(self, name: str, drawn: _Rows, prepared: Any, divisor: Tensor) -> FieldQuery:
        """Build the callback of one field: loss and bound term of each row."""
        process = self.fields[name].process
        loss = self.losses[name]
        weight = drawn.loss_weight * self.weights[name] / divisor

        def on_prediction(prediction: Any, idx: Tensor) -> tuple[Tensor, ...]:
            arguments = (drawn.x0[idx], drawn.zt[idx], drawn.t[idx])
            own = loss.divergence(process, prediction, *arguments)
            if loss.has_own_divergence:
                with torch.no_grad():
                    divergence = process.divergence(prediction, *arguments)
            else:
                divergence = own.detach()
            if drawn.is_decoded is not None:
                is_decoded = drawn.is_decoded[idx]
                own = torch.where(is_decoded, process.decode_nll(prediction, *arguments), own)
                # The metrics of a training step contain only the diffusion term.
                divergence = torch.where(is_decoded, 0.0, divergence)
            return weight[idx] * own, drawn.bound_weight[idx] * divergence

        parameterization = self.denoiser.parameterizations[name]
        callback = parameterization.wrap_callback(
            on_prediction, process, drawn.zt, drawn.t, prepared
        )
        return drawn.rows, drawn.node, callback

    # ------------------------------------------------------------------ evaluation

    def network(self, batch: FieldsBatch) -> JointNetwork:
        """Return the denoiser as a joint network, with the context of `batch`."""
        return JointDenoiserNetwork(self.denoiser, self.sized_fields(batch), _context(batch))

    def nll(
        self,
        batch: FieldsBatch,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        path: Path,
    ) -> dict[str, Likelihood]:
        """Estimate the bound along a path, by field, with one draw of times and states.

        The training loss and its weights have no effect. A field that the path holds has terms 0.
        """
        values = {name: field.values for name, field in batch.fields.items()}
        scored = {name: field.scored for name, field in batch.fields.items()}
        terms = joint_nelbo(
            self.sized_fields(batch),
            self.network(batch),
            values,
            scored,
            path,
            rng,
            slot,
            slots,
            batch.absent(),
        )
        return {name: Likelihood(each.by_name(), {}) for name, each in terms.items()}

    def sized_fields(self, batch: FieldsBatch) -> Fields:
        """Return the fields with the numbers of positions of a batch."""
        sized = {}
        for name, field in self.fields.items():
            sized[name] = field._replace(positions=batch.fields[name].values.shape[1])
        return sized


def _context(batch: FieldsBatch) -> JointContext:
    """Collect padding and conditions of a batch for the network."""
    return JointContext(batch.padding(), dict(batch.conditions))


def _check_fields(
    fields: Fields,
    denoiser: JointDenoiser,
    losses: Mapping[str, Any],
    weights: Mapping[str, float],
) -> None:
    for what, names in (("losses", losses), ("heads of the denoiser", denoiser.heads)):
        if set(names) != set(fields):
            raise ArgumentError(
                f"FieldsObjective: the {what} must name every field once, {sorted(fields)}; got "
                f"{sorted(names)}."
            )
    unknown = sorted(set(weights) - set(fields))
    if unknown or any(not weight >= 0 for weight in weights.values()):
        raise ArgumentError(
            f"FieldsObjective: weights must be numbers from 0 for fields {sorted(fields)}; got "
            f"{dict(weights)}."
        )


def _find_present(batch: FieldsBatch) -> dict[str, Tensor] | None:
    """Return the samples that have a scored position of each field, bool [B].

    None: every sample has all fields.
    """
    present = {
        name: (field.scored & ~field.absent.unsqueeze(-1)).any(-1)
        for name, field in batch.fields.items()
    }
    return None if all(bool(samples.all()) for samples in present.values()) else present


def _decoding_shares(
    fields: Fields, losses: Mapping[str, Any], share: float | None
) -> dict[str, float]:
    """Return the share of samples for the decoding term of every field that trains one."""
    shares = {}
    start = torch.zeros(1, dtype=torch.float64)
    for name, field in fields.items():
        process = field.process
        if process.closes_at_clean or not bool(process.end_needs_network(start)):
            continue
        if share is None:
            shares[name] = 0.0 if losses[name].has_own_rows else DECODING_SHARE
        else:
            shares[name] = share
    if any(not share >= 0.0 for share in shares.values()) or not sum(shares.values()) < 1.0:
        raise ArgumentError(
            f"FieldsObjective: decoding_share must be at least 0, and below 1 for all of "
            f"{', '.join(shares)} together; got {share}."
        )
    return {name: share for name, share in shares.items() if share > 0.0}

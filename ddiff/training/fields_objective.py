"""Objective of samples of several fields: training loss and bound along a path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from ddiff.core.elbo import Likelihood, is_active
from ddiff.core.field import Field, Fields
from ddiff.core.fields import JointNetwork, JointNoisy, corrupt_fields, joint_nelbo, mark_absent
from ddiff.core.paths import Path
from ddiff.core.rng import CounterRng
from ddiff.core.training_paths import TrainingPath, draw_training
from ddiff.errors import ArgumentError
from ddiff.nn.joint_denoiser import FieldQuery, JointContext, JointDenoiser
from ddiff.nn.joint_network import JointDenoiserNetwork
from ddiff.training.device import get_device, to_device
from ddiff.training.protocols import LossTerms

if TYPE_CHECKING:
    from ddiff.data.fields_batch import FieldsBatch


class _Rows(NamedTuple):
    """The k rows of one field at which a training step evaluates the head.

    `rows` [k]: indices of the flat positions. `x0`, `zt`, `t` [k,...]: clean values, states and
    times. `bound_weight`, `loss_weight` [k]: factors of a row's divergence in the bound and in the
    training loss.
    """

    rows: Tensor
    x0: Tensor
    zt: Tensor
    t: Tensor
    node: Tensor
    bound_weight: Tensor
    loss_weight: Tensor


@final
class FieldsObjective:
    """Training objective of a denoiser of several fields.

    The loss is the sum over fields of weight * (sum of the row losses) / (items of the field in the
    global batch). Items are tokens for a field of tokens, and numbers for a field of vectors, so
    that the unit is nats per item in both. The weights do not enter a bound.

    Args:
        fields: fields of a sample; `positions` is replaced by the length of each batch.
        denoiser: network with one stream and one head per field.
        path: path or training rule from which training draws times.
        losses: training loss of every field.
        weights: factor of the loss of each field; 1 for fields that are not named.
    """

    bound = "NELBO"

    def __init__(
        self,
        fields: Fields,
        denoiser: JointDenoiser,
        path: TrainingPath,
        losses: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.fields = dict(fields)
        self.denoiser = denoiser
        self.path = path
        self.losses = dict(losses)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in fields}
        self.module: torch.nn.Module = denoiser
        _check_fields(self.fields, denoiser, self.losses, weights or {})

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
        times = draw_training(self.path, fields, rng, batch.index, slots)
        values = {name: field.values for name, field in batch.fields.items()}
        scored = {name: field.scored for name, field in batch.fields.items()}
        state = corrupt_fields(fields, values, times, scored, rng, "diffusion")
        state = mark_absent(state, batch.absent())
        rows = {}
        prepared = {}
        for name, field in fields.items():
            rows[name] = self._select_rows(name, field, batch, state, times[name].speed)
            parameterization = self.denoiser.parameterizations[name]
            prepared[name] = parameterization.prepare(field.process, rows[name].zt, rows[name].t)
        parts = (state, _context(batch), rows, prepared)
        state, context, rows, prepared = to_device(parts, get_device(self.module))
        queries = {}
        for name in fields:
            # A field without any item in the global batch has no rows and no loss.
            items = denominators[name].clamp(min=1.0)
            queries[name] = self._query(name, rows[name], prepared[name], items)
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
        self, name: str, field: Field, batch: FieldsBatch, state: JointNoisy, speed: Tensor
    ) -> _Rows:
        """Select the rows of a field that the bound scores, with their weights."""
        process = field.process
        noisy = state[name]
        may_add = (speed > 0) & ~noisy.clean & is_active(process, noisy.zt)
        selected = may_add & batch.fields[name].scored
        rows = selected.reshape(-1).nonzero().squeeze(-1)
        x0 = batch.fields[name].values.flatten(0, 1)[rows]
        zt = noisy.zt.flatten(0, 1)[rows]
        t = noisy.t.reshape(-1)[rows]
        rate = speed.reshape(-1)[rows]
        node = self.denoiser.parameterizations[name].scope(process.scope(zt), process)
        return _Rows(
            rows=rows,
            x0=x0,
            zt=zt,
            t=t,
            node=node,
            bound_weight=rate * process.weight(x0, zt, t),
            loss_weight=rate * self.losses[name].weight(process, x0, zt, t),
        )

    def _query(self, name: str, drawn: _Rows, prepared: Any, items: Tensor) -> FieldQuery:
        """Build the callback of one field: loss and bound term of each row."""
        process = self.fields[name].process
        loss = self.losses[name]
        weight = drawn.loss_weight * self.weights[name] / items

        def on_prediction(prediction: Any, idx: Tensor) -> tuple[Tensor, ...]:
            arguments = (drawn.x0[idx], drawn.zt[idx], drawn.t[idx])
            own = loss.divergence(process, prediction, *arguments)
            if loss.has_own_divergence:
                with torch.no_grad():
                    divergence = process.divergence(prediction, *arguments)
            else:
                divergence = own.detach()
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
    for name, field in fields.items():
        ends = torch.zeros(1, dtype=torch.float64)
        if not field.process.closes_at_clean and bool(field.process.end_needs_network(ends)):
            raise ArgumentError(
                f'FieldsObjective: the process of "{name}" is still noisy at t = 0, and training '
                "of its decoding term is not supported for several fields. Use a process whose "
                "state at t = 0 is the clean token, such as masked diffusion."
            )

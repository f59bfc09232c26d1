"""A denoiser of several fields as the joint network of samplers and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddiff.core.field import Fields
from ddiff.core.fields import JointNoisy, is_same_state
from ddiff.core.network import Predicts
from ddiff.core.process import Query, RowFunction
from ddiff.nn.joint_denoiser import JointContext, JointDenoiser


class JointDenoiserNetwork:
    """Joint network made from a denoiser: network(state) returns one query per field.

    All queries of one joint state share one evaluation of the denoiser, which runs at the first
    query. A state that equals the last evaluated state is not evaluated again. Dropout follows the
    mode of the denoiser: call `.eval()` first. `generate_fields` counts the evaluations.
    """

    def __init__(
        self, denoiser: JointDenoiser, fields: Fields, context: JointContext | None = None
    ) -> None:
        self.denoiser = denoiser
        self.fields = fields
        self.context = context or JointContext()
        self._last: _Evaluation | None = None

    @property
    def predicts(self) -> Mapping[str, Predicts]:
        """Kind of prediction of every field."""
        parameterizations = self.denoiser.parameterizations
        return {name: parameterizations[name].predicts for name in self.fields}

    def __call__(self, state: JointNoisy) -> Mapping[str, Query]:
        evaluation = _Evaluation(self, state)
        return {name: _FieldQuery(evaluation, name) for name in state}


class _Evaluation:
    """Evaluation of one joint state, made when it is first needed."""

    def __init__(self, network: JointDenoiserNetwork, state: JointNoisy) -> None:
        self.network = network
        self.state = dict(state)
        self._hidden: dict[str, Tensor] | None = None

    def hidden(self, name: str) -> Tensor:
        """Return the hidden states [B*n,width] of a field."""
        if self._hidden is None:
            last = self.network._last
            if (
                last is not None
                and last._hidden is not None
                and is_same_state(last.state, self.state)
            ):
                self._hidden = last._hidden
            else:
                network = self.network
                self._hidden = network.denoiser.hidden_states(self.state, network.context)
            self.network._last = self
        return self._hidden[name]


class _FieldQuery:
    """Query of one field of a joint state."""

    def __init__(self, evaluation: _Evaluation, name: str) -> None:
        self.evaluation = evaluation
        self.name = name

    @torch.no_grad()
    def __call__(self, rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        network = self.evaluation.network
        noisy = self.evaluation.state[self.name]
        process = network.fields[self.name].process
        parameterization = network.denoiser.parameterizations[self.name]

        def on_chunk(prediction: Any, idx: Tensor) -> Any:
            return fn(prediction, *(value[idx] for value in per_row))

        zt = noisy.zt.flatten(0, 1)[rows]
        t = noisy.t.flatten()[rows]
        prepared = parameterization.prepare(process, zt, t)
        callback = parameterization.wrap_callback(on_chunk, process, zt, t, prepared)
        hidden = self.evaluation.hidden(self.name).index_select(0, rows)
        node = parameterization.scope(node, process)
        return network.denoiser.query_head(self.name, hidden, node, callback)

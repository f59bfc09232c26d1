"""Joint networks during sampling: counting, sharing of evaluations, and guidance per field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from ddiff.core.fields import JointNetwork, JointNoisy, hold, is_same_state
from ddiff.core.network import CountingNetwork, EvaluationCount, Predicts
from ddiff.core.paths import Hold
from ddiff.core.process import Query
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError
from ddiff.sampling.shaping import check_weight, guide_query


class Guidance(NamedTuple):
    """Classifier-free guidance of one field by other fields.

    Attributes:
        weight: 0 ignores the other fields, 1 is the plain prediction, and above 1 the field follows
            the other fields more closely.
        without: the fields that the unconditional prediction leaves out. "absent": no position
            attends to the field. "prior": the field is a draw from its prior.
    """

    weight: float
    without: Mapping[str, Hold]


@final
class JointCounter:
    """Joint network that counts the evaluations of a batch.

    All queries of one joint state are one evaluation. A state without a query counts nothing. A
    network that recognizes states which it has already evaluated may run less often.

    Args:
        network: the network to count.
        predicts: prediction of every field.
        batch: number of samples B.

    Attributes:
        count: number of evaluations so far, in total and of each sample.
    """

    def __init__(self, network: JointNetwork, predicts: Mapping[str, Predicts], batch: int) -> None:
        self.network = network
        self.predicts = predicts
        self.batch = batch
        self.count = EvaluationCount(batch)

    def __call__(self, state: JointNoisy) -> Mapping[str, Query]:
        queries = self.network(state)
        evaluated = torch.zeros(self.batch, dtype=torch.bool)
        counted = {}
        for name, query in queries.items():
            counted[name] = self.count.wrap_query(query, state[name].t.shape[1], evaluated)
        return counted


@final
class HeldNetwork(CountingNetwork):
    """Network of one field, with all other fields held at their states.

    The count is that of the joint network.

    Args:
        network: joint network.
        counter: counter of the evaluations of `network`.
        state: joint state with the states of the other fields.
        name: the field that the network reads and predicts.
    """

    def __init__(
        self, network: JointNetwork, counter: JointCounter, state: JointNoisy, name: str
    ) -> None:
        super().__init__(counter.count)
        self.predicts = counter.predicts[name]
        self._held = hold(network, state, name)

    def __call__(self, noisy: Noisy) -> Query:
        return self._held(noisy)


@final
class SharedState:
    """Joint network that evaluates the joint state `state` once, for the steps of all fields.

    Other states are evaluated as usual, for example in the second stage of `HeunSampler`.
    """

    def __init__(self, network: JointNetwork, state: JointNoisy) -> None:
        self.network = network
        self.state = state
        self.queries = network(state)

    def __call__(self, state: JointNoisy) -> Mapping[str, Query]:
        if is_same_state(state, self.state):
            return self.queries
        return self.network(state)


@final
class GuidedJointNetwork:
    """Joint network whose predictions of some fields are guided by other fields.

    The prediction of a guided field mixes the prediction of the joint state with the prediction of
    a second joint state, in which the fields of `Guidance.without` are absent or at the prior. See
    `guide_query` for the formulas. Fields that are guided without the same fields share the second
    evaluation.

    Args:
        network: joint network.
        guidance: guidance of each guided field.
        noise: prior draws of the fields that are left out, tokens [B,n] or vectors [B,n,d].
    """

    def __init__(
        self,
        network: JointNetwork,
        guidance: Mapping[str, Guidance],
        noise: Mapping[str, Tensor],
    ) -> None:
        self.network = network
        self.guidance = guidance
        self.noise = noise

    def __call__(self, state: JointNoisy) -> Mapping[str, Query]:
        plain = self.network(state)
        queries = dict(plain)
        null_queries: dict[frozenset[tuple[str, Hold]], Mapping[str, Query]] = {}
        for name, (weight, without) in self.guidance.items():
            key = frozenset(without.items())
            if key not in null_queries:
                null_state = self._leave_out(state, without)
                # Before their leg the fields are at the prior, and nothing is left out.
                is_same = is_same_state(null_state, state)
                null_queries[key] = plain if is_same else self.network(null_state)
            queries[name] = guide_query(plain[name], null_queries[key][name], weight)
        return queries

    def _leave_out(self, state: JointNoisy, without: Mapping[str, Hold]) -> JointNoisy:
        """Return the joint state in which some fields are absent or at the prior."""
        changed = dict(state)
        for name, left_out in without.items():
            noisy = state[name]
            absent = noisy.absent
            if left_out == "absent":
                absent = torch.ones_like(noisy.clean[:, 0])
            changed[name] = noisy._replace(
                zt=self.noise[name],
                t=torch.ones_like(noisy.t),
                clean=torch.zeros_like(noisy.clean),
                absent=absent,
            )
        return changed


def check_guidance(
    guidance: Mapping[str, Guidance], predicts: Mapping[str, Predicts], caller: str
) -> None:
    """Raise ArgumentError if a guidance names unknown fields, or cannot be applied."""
    for name, (weight, without) in guidance.items():
        check_weight(f'{caller}: guidance of "{name}"', weight)
        unknown = {name, *without} - set(predicts)
        if unknown:
            raise ArgumentError(
                f"{caller}: guidance names {', '.join(sorted(unknown))}, but the fields are "
                f"{', '.join(predicts)}."
            )
        if not without or name in without:
            raise ArgumentError(
                f'{caller}: guidance of "{name}" must leave out other fields than "{name}"; got '
                f"without = {dict(without)}."
            )
        for other, left_out in without.items():
            if left_out not in ("absent", "prior"):
                raise ArgumentError(
                    f'{caller}: guidance of "{name}" must leave out "{other}" by "absent" or '
                    f'"prior"; got {left_out!r}.'
                )
        if predicts[name] == "score":
            raise ArgumentError(
                f'{caller}: guidance of "{name}" mixes distributions of tokens or means of '
                "vectors; this denoiser predicts a score. Sample without guidance."
            )

"""Output parameterizations: conversion of a head's output to the prediction that formulas use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, final

import torch
from torch import Tensor

from ddiff.core.network import Predicts
from ddiff.core.prediction import CleanDistribution, DenseDistribution, drop_own_evidence

if TYPE_CHECKING:
    from ddiff.core.process import ForwardProcess

HeadCallback = Callable[[CleanDistribution, Tensor], Tensor | tuple[Tensor, ...]]
"""fn(prediction, idx [k]) -> [k] or a tuple of [k,...], for one chunk of rows."""

ParameterizationName = Literal["rest", "all"]


class Parameterization(Protocol):
    """Adapts a callback on the predicted distribution or score to the raw output of a head."""

    @property
    def predicts(self) -> Predicts: ...

    def prepare(self, process: ForwardProcess, zt: Tensor, t: Tensor) -> Tensor | None:
        """Return the tensor `prepared` for `wrap_callback`, from states zt [k] and times t [k].

        Training calls the method with tensors on the host, sampling with tensors on the device of
        the head.
        """

    def wrap_callback(
        self, fn: HeadCallback, process: ForwardProcess, zt: Tensor, t: Tensor, prepared: Any
    ) -> HeadCallback:
        """Return the callback for the head, which calls `fn`; all tensors are on its device."""

    def scope(self, node: Tensor, process: ForwardProcess) -> Tensor:
        """Return the query nodes [k] of the head that a prediction below `node` [k] needs."""


@final
class LeaveOneOutParameterization:
    """P(x_i | z without z_i), the form that the formulas of the engine use."""

    predicts: Predicts = "distribution"

    def prepare(self, process: ForwardProcess, zt: Tensor, t: Tensor) -> None:
        return None

    def wrap_callback(
        self, fn: HeadCallback, process: ForwardProcess, zt: Tensor, t: Tensor, prepared: Any
    ) -> HeadCallback:
        return fn

    def scope(self, node: Tensor, process: ForwardProcess) -> Tensor:
        return node


@final
class FullConditionalParameterization:
    """Full conditional P(x_i | z), which is divided by q_t(z_i | x_i) and normalized.

    Plain cross-entropy at positions that are not masked trains the full conditional.
    """

    predicts: Predicts = "distribution"

    def prepare(self, process: ForwardProcess, zt: Tensor, t: Tensor) -> None:
        return None

    def wrap_callback(
        self, fn: HeadCallback, process: ForwardProcess, zt: Tensor, t: Tensor, prepared: Any
    ) -> HeadCallback:
        def on_full_conditional(
            dist: CleanDistribution, idx: Tensor
        ) -> Tensor | tuple[Tensor, ...]:
            evidence = process.log_likelihood(zt[idx], t[idx])
            log_p = drop_own_evidence(dist.log_mass(0), evidence)
            return fn(DenseDistribution(log_p, process.vocabulary), idx)

        return on_full_conditional

    def scope(self, node: Tensor, process: ForwardProcess) -> Tensor:
        # The evidence changes the probability of every token, so the whole vocabulary is needed.
        return torch.full_like(node, process.vocabulary.root)


PARAMETERIZATIONS: Mapping[ParameterizationName, Parameterization] = {
    "rest": LeaveOneOutParameterization(),
    "all": FullConditionalParameterization(),
}

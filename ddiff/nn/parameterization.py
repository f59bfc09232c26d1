"""Output parameterizations: convert the output of a head to the prediction that formulas use.

The formulas of the bound and of samplers use the distribution P(x_i | z without z_i), or a score. A
formula is a callback that takes such a prediction. The output of a head may be another quantity,
such as P(x_i | z). A parameterization wraps the callback of a formula in a function that takes the
output of the head, converts it, and calls the callback.
"""

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
    """Interface of parameterizations, which adapt a callback to the output of a head.

    `predicts` is the kind of prediction that the callback takes: a distribution or a score.
    """

    @property
    def predicts(self) -> Predicts: ...

    def prepare(self, process: ForwardProcess, zt: Tensor, t: Tensor) -> Tensor | None:
        """Compute values per row for `wrap_callback`, from states zt [k] and times t [k].

        The result is the argument `prepared` of `wrap_callback`, and may be None. Training calls
        this method with tensors on the host, sampling with tensors on the device of the head.
        """

    def wrap_callback(
        self, fn: HeadCallback, process: ForwardProcess, zt: Tensor, t: Tensor, prepared: Any
    ) -> HeadCallback:
        """Return a callback for the head, which converts the output of the head and calls `fn`.

        zt [k] are the states and t [k] the times of all rows, and `prepared` is the result of
        `prepare`. All tensors are on the device of the head.
        """

    def scope(self, node: Tensor, process: ForwardProcess) -> Tensor:
        """Return the query nodes [k] with which the head must be called.

        Row i needs the prediction below the tree node node[i]. To compute this prediction, the
        parameterization may need the output of the head below a higher node.
        """


@final
class LeaveOneOutParameterization:
    """Parameterization of heads that predict P(x_i | z without z_i); nothing is converted."""

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
    """Parameterization of heads that predict the full conditional P(x_i | z).

    z is the noisy sequence. Cross-entropy at positions that are not masked trains this
    distribution. `wrap_callback` divides the full conditional by q_t(z_i | x_i) and normalizes,
    which gives P(x_i | z without z_i).
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

"""The chunked loss of every process and head equals the dense bound, in value and gradient.

The training step causes no synchronization with the device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_gidd.process import GeneralizedInterpolation
from ddiff_hdlm.process import HierarchicalDiffusion
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid
from ddiff_mdlm.process import MaskedDiffusion
from dense_heads import KINDS, dense_distribution, make_head
from torch import Tensor, nn

from ddiff.core.components import MixtureProcess
from ddiff.core.dense import DenseProcess
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes
from ddiff.core.tree import TreeProcess
from ddiff.data.batch import Batch
from ddiff.nn.denoiser import Backbone, Context, Denoiser
from ddiff.nn.heads import Head
from ddiff.training.losses import ElboLoss
from ddiff.training.objective import DiffusionObjective

FAMILIES = (
    TreeProcess,
    MaskedDiffusion,
    HierarchicalDiffusion,
    GeneralizedInterpolation,
    MixtureProcess,
    EpsilonHybrid,
    GammaHybrid,
    DenseProcess,
)
PROCESSES = {
    f"{family.__name__}-{i}": p for family in FAMILIES for i, p in enumerate(family.examples())
}
ROWS = 40


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROCESSES)
def test_training_gradient_of_every_head_equals_that_of_dense_bound(name: str, kind: str) -> None:
    """Compare with the integrand of the bound computed from rates and marginals, by autograd.

    The two losses share no formula. Both are float64 sums of fewer than a hundred terms. Ratios of
    marginals near t = 0 are as large as 1e3, so the relative tolerance is 1e-9.
    """
    torch.manual_seed(3)
    process, close = PROCESSES[name], {"rtol": 1e-9, "atol": 1e-9}
    head = make_head(kind, process.vocabulary, scale=0.7)
    head.chunk_logits = 30  # chunks of a few rows
    x0, zt, t = drawn(process)
    hidden = torch.randn(len(x0), head.width, dtype=torch.float64, requires_grad=True)
    weight = process.weight(x0, zt, t)

    def question(dist: CleanDistribution, idx: Tensor) -> Tensor:
        return weight[idx] * process.divergence(dist, x0[idx], zt[idx], t[idx])

    total, each = head.total(hidden, process.scope(zt), question)
    dense = ForwardProcess.density(process, dense_distribution(head, hidden), x0, zt, t)
    torch.testing.assert_close(each, dense.detach(), **close)
    for ours, expected in zip(
        gradients(total, hidden, head), gradients(dense.sum(), hidden, head), strict=True
    ):
        torch.testing.assert_close(ours, expected, **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [name for name in PROCESSES if "Dense" not in name]
)  # dense processes are test oracles and may synchronize
def test_training_step_of_every_head_and_process_runs_on_meta_tensors(
    name: str, kind: str, no_sync_guard: Any
) -> None:
    """A "meta" tensor has no values, so code that needs a value on the host raises an error."""
    process = PROCESSES[name]
    head = make_head(kind, process.vocabulary)
    head.chunk_logits = 30
    objective = DiffusionObjective(
        process, Denoiser(Rows(process, head), head).to("meta"), ElboLoss(), FlatTimes()
    )
    ids = torch.randint(process.vocabulary.num_tokens, (8, 5))
    every, index = torch.ones_like(ids, dtype=torch.bool), torch.arange(8)
    batch = Batch(ids, every, every, torch.zeros_like(ids), index, packed=False, conditions={})
    step = lambda: objective(batch, CounterRng(0, 0, index, 5), {"tokens": torch.tensor(40.0)}, 8)  # noqa: E731
    step()
    with no_sync_guard():
        terms = step()
        terms.loss.backward()
    assert terms.loss.is_meta
    assert head.table.grad is not None


class Rows(Backbone):
    """Backbone without attention, whose hidden states depend only on ids."""

    def __init__(self, process: ForwardProcess, head: Head) -> None:
        super().__init__()
        self.width = head.width
        self.table = nn.Embedding(process.vocabulary.num_states, head.width, dtype=torch.float64)

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        return self.table(ids)


def drawn(process: ForwardProcess) -> tuple[Tensor, Tensor, Tensor]:
    """Return random (tokens, noisy states, times in (0, 1)); every state adds to the bound."""
    x0 = torch.randint(process.vocabulary.num_tokens, (ROWS,))
    t = 0.05 + 0.9 * torch.rand(ROWS, dtype=torch.float64)
    zt = process.sample(x0, t, torch.rand(ROWS, process.uniforms_per_sample, dtype=torch.float64))
    charged = process.active(zt)
    return x0[charged], zt[charged], t[charged]


def gradients(value: Tensor, hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, [hidden, head.table, head.bias])

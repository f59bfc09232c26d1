"""The plain and hand-written implementations of the benchmark are correct."""

from __future__ import annotations

import pytest
import torch
from handwritten import ChunkedCrossEntropy
from models import CLUSTERS, Case, Size, cluster_sizes, process_of, vocabulary_of
from plain import plain_family

from ddiff import DenseDistribution

SMALL = Size(20, width=8, layers=1, heads=1, length=16, batch=4)


@pytest.mark.parametrize("family", ["mdlm", "gidd", "hdlm"])
def test_reference_benchmark_loss_equals_the_bound_integrand_of_ddiff(family: str) -> None:
    """The plain loss is float32, and ddiff's integrand of the bound is float64.

    The tolerance is 1e-4, because the loss weights are as large as some hundreds.
    """
    torch.manual_seed(0)
    case = Case(family, SMALL)
    side, process = plain_family(case), process_of(case, vocabulary_of(case))
    x0, t = torch.randint(20, (4, 16)), torch.tensor([0.1, 0.4, 0.7, 0.9])
    zt, q = side.add_noise(x0, t)
    logits = torch.randn(4, 16, side.model.head.out_features)
    log_p = logits[..., :20].double().log_softmax(-1).reshape(-1, 20)
    expected = process.density(
        DenseDistribution(log_p, process.vocabulary),
        x0.flatten(),
        zt.flatten(),
        t.double().repeat_interleave(16),
    )
    expected = torch.where(process.active(zt.flatten()), expected, 0.0).reshape(4, 16)
    ours = side.loss(logits.clone(), x0, zt, t, q)
    assert len(zt.unique()) > 3
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mdlm", "gidd", "hdlm"])
def test_reference_benchmark_sampler_leaves_no_mask_in_its_samples(family: str) -> None:
    """Samples contain no clusters, except for hdlm, whose plain sampler moves one level a step."""
    torch.manual_seed(0)
    side, steps = plain_family(Case(family, SMALL)), 8
    zt = side.start((4, 16))
    with torch.no_grad():
        for k in range(steps):
            t, s = 1.0 - k / steps, 1.0 - (k + 1) / steps
            zt = side.move(side.model(zt, torch.full((4,), t)), zt, t, s)
    assert (zt < (side.mask if family == "hdlm" else 20)).all()


def test_handwritten_benchmark_loss_equals_torch_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, table = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (40, 7))
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(7, (40,)), torch.rand(40, dtype=torch.float64)
    by_hand = ChunkedCrossEntropy.apply(hidden, table, bias, target, weight)
    dense = (
        weight
        * torch.nn.functional.cross_entropy(hidden @ table.t() + bias, target, reduction="none")
    ).sum()
    torch.testing.assert_close(by_hand, dense)
    inputs = (hidden, table, bias)
    for ours, expected in zip(
        torch.autograd.grad(by_hand, inputs), torch.autograd.grad(dense, inputs), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_benchmark_clusters_have_the_least_and_largest_size_of_the_hdlm_clusters() -> None:
    """Compare with the 128 clusters of GPT-2's tokens that were published with HDLM.

    These clusters have 24 to 1801 tokens. The mean size of a token's cluster, over all tokens, is
    626 tokens.
    """
    sizes = torch.tensor(cluster_sizes(50257, CLUSTERS[50257])).double()
    assert sizes.sum() == 50257
    assert int(sizes.min()) == 24
    assert 1750 < sizes.max() < 1850
    assert (sizes.square().sum() / sizes.sum()).item() == pytest.approx(626, rel=0.05)

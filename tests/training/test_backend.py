"""Backend of a single process and its device."""

from __future__ import annotations

import pytest
import torch
from ddiff_core.backends import Single
from torch import nn

from ddiff.distributed.single import SingleBackend
from ddiff.errors import ArgumentError
from ddiff.plugin.config import ComponentConfig


def test_auto_device_is_cuda_if_available() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    component = Single.build(ComponentConfig(), device="auto", processes=1)
    assert SingleBackend().device.type == component.device.type == expected


@pytest.mark.parametrize(
    ("device", "reason"),
    [("mps", "float64"), ("cuda:99", "CUDA devices"), ("gpu", 'got "gpu"')],
)
def test_resolve_device_refuses_unusable_devices(device: str, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        SingleBackend(device)


def test_single_backend_refuses_more_than_one_process() -> None:
    with pytest.raises(ArgumentError, match='kind = "single" runs one process; got processes = 2'):
        Single.build(ComponentConfig(), device="cpu", processes=2)


def test_single_backend_sum_is_identity_and_clipping_bounds_the_norm() -> None:
    backend = SingleBackend("cpu")
    assert (backend.rank, backend.world_size) == (0, 1)
    assert backend.sum({"a": torch.tensor(2.0)}) == {"a": torch.tensor(2.0)}
    parameters = [
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(1)),
        nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0, 4.0]), torch.tensor([4.0])
    assert backend.clip_grad_norm(parameters, None) == 6.0
    assert backend.clip_grad_norm(parameters, 3.0) == 6.0
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.0, 2.0]), rtol=1e-5, atol=0)
    assert backend.clip_grad_norm(parameters, 100.0) == pytest.approx(3.0, rel=1e-5)

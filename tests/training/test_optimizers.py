"""Optimizers: parameter groups, and Muon compared with torch and with its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_core.optimizers import AdamW
from ddiff_core.optimizers import Muon as MuonComponent
from torch import Tensor, nn
from toy import Net

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.training.optimizers import (
    Muon,
    _iterate_gram,
    _iterate_matrix,
    adamw,
    muon,
    orthogonalize,
    split_parameters,
    step_if,
)

# (a, b, c) of p(A) = a I + b A + c A A, as in torch.optim.Muon.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Everything(nn.Module):
    """Module with a parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embedding.weight
        self.block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.positions = nn.Parameter(torch.zeros(3, 4))
        self.positions.is_table = True  # type: ignore[attr-defined]
        self.filters = nn.Conv1d(2, 2, 3)
        self.head = nn.ModuleDict({"levels": nn.Linear(4, 7)})
        self.head.is_table = True  # type: ignore[assignment]
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_split_parameters_separates_hidden_matrices_from_all_others() -> None:
    hidden, others = split_parameters(Everything())
    assert set(hidden) == {"block.0.weight"}
    assert set(others) == {
        "embedding.weight",
        "positions",
        "block.0.bias",
        "block.1.weight",
        "block.1.bias",
        "filters.weight",
        "filters.bias",
        "head.levels.weight",
        "head.levels.bias",
    }


def test_muon_assigns_all_but_hidden_matrices_to_adamw() -> None:
    module = Everything()
    optimizer = muon(module)
    reached = {id(p) for group in optimizer.parts["muon"].param_groups for p in group["params"]}
    assert reached == {id(module.block[0].weight)}
    everyone = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everyone) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_adamw_decays_only_hidden_matrices_by_default() -> None:
    for make in (adamw, muon):
        module = Everything()
        hidden, _ = split_parameters(module)
        decaying = {
            id(p) for g in make(module).param_groups if g["weight_decay"] for p in g["params"]
        }
        assert decaying == {id(p) for p in hidden.values()}


def test_adamw_with_decay_all_decays_all_parameters() -> None:
    module = Everything()
    groups = adamw(module, weight_decay=0.02, eps=1e-9, decay="all").param_groups
    decaying = {
        id(p) for g in groups if g["weight_decay"] == 0.02 and g["eps"] == 1e-9 for p in g["params"]
    }
    assert decaying == {id(p) for p in module.parameters() if p.requires_grad}


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_orthogonalize_keeps_singular_vectors_with_singular_values_near_1(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = orthogonalize(matrix, COEFFICIENTS, 5, 1e-7)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ result @ v.T
    # An odd matrix polynomial keeps the singular vectors. These coefficients map the singular
    # values s to values between 0.7 and 1.2.
    torch.testing.assert_close(core, torch.diag(core.diag()), rtol=0, atol=1e-12)
    assert (s / s.norm()).min() > 0.01
    assert core.diag().min() > 0.6
    assert core.diag().max() < 1.3


def steps_of(make: type[torch.optim.Optimizer], shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    optimizer = make([parameter], lr=0.1, weight_decay=0.3, momentum=0.8)  # type: ignore[call-arg]
    for _ in range(4):
        parameter.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(6, 3), (3, 6)])
def test_muon_on_a_cpu_equals_torch_muon_up_to_bfloat16_rounding(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch computes in bfloat16 (8 bits of precision). Four steps, each 0.1 times a matrix of norm
    # below 3, differ by a few times 2^-8.
    torch.testing.assert_close(
        steps_of(Muon, shape), steps_of(torch.optim.Muon, shape), rtol=0, atol=0.02
    )
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", orthogonalize)
    torch.testing.assert_close(
        steps_of(Muon, shape), steps_of(torch.optim.Muon, shape), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("make", [adamw, muon])
def test_optimizer_resumes_from_its_saved_state(make: type, tmp_path: object) -> None:
    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    torch.manual_seed(0)
    net = Net()
    optimizer = make(net)
    steps(net, optimizer, 0, 3)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(3, net.state_dict(), {"optimizer": optimizer.state_dict()})
    steps(net, optimizer, 3, 6)

    found = checkpoints.load(3)
    other = Net()
    found.restore(other)
    fresh = make(other)
    fresh.load_state_dict(found.read_state()["optimizer"])
    steps(other, fresh, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


@pytest.mark.parametrize("component", [AdamW, MuonComponent])
def test_optimizer_component_passes_every_key_to_the_optimizer(component: type) -> None:
    keys = {"AdamW": {"lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.7}}
    keys["Muon"] = {
        "lr": 0.5,
        "momentum": 0.6,
        "weight_decay": 0.7,
        "table_lr": 0.25,
        "table_betas": (0.1, 0.2),
    }
    config = component.Config(**keys[component.__name__])  # type: ignore[attr-defined]
    groups = component.build(config, module=Net()).param_groups  # type: ignore[attr-defined]
    assert groups[0]["lr"] == 0.5
    assert groups[0]["weight_decay"] == 0.7
    assert groups[-1]["betas"] == (0.1, 0.2)
    assert groups[-1]["lr"] == (0.25 if component is MuonComponent else 0.5)
    assert groups[0].get("momentum", 0.6) == 0.6


@pytest.mark.parametrize("make", [adamw, muon])
def test_optimizer_reduces_the_distance_to_a_target_network_tenfold(make: type) -> None:
    torch.manual_seed(0)
    net, target = Net(), Net()
    optimizer, ids = make(net), torch.arange(5)[None]
    first = None
    for _ in range(150):
        loss = (net(ids) - target(ids).detach()).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


@pytest.mark.parametrize(
    "made",
    [
        lambda net: adamw(net),
        lambda net: muon(net),
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),  # no step_if
    ],
    ids=["adamw", "muon", "sgd"],
)
def test_optimizer_step_on_non_finite_gradient_changes_nothing(
    made: Any,
) -> None:
    nets = [Net().double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    plain, deciding = made(nets[0]), made(nets[1])
    for broken in (False, True, False):
        for net in nets:
            torch.manual_seed(3)
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
        if broken:
            for parameter in nets[1].parameters():
                parameter.grad.fill_(torch.nan)
        else:
            plain.step()
        step_if(torch.tensor(not broken), deciding)
        for one, two in zip(*(net.state_dict().values() for net in nets)):
            # float64: a multiplication by a 0-d tensor may be rounded in another order
            torch.testing.assert_close(two, one, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_iterations_on_the_gram_matrix_equal_iterations_on_the_matrix(dtype: torch.dtype) -> None:
    """Both forms agree for a spectrum that falls to 1e-4 of its largest value."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(256, 64, generator=generator, dtype=torch.float64)).Q
    matrix = (left * torch.logspace(0, -4, 64, dtype=torch.float64)) @ right.T
    matrix = matrix / matrix.norm()
    expected = _iterate_matrix(matrix, COEFFICIENTS, 5)
    result = _iterate_gram(matrix.to(dtype), COEFFICIENTS, 5).to(torch.float64)
    # The Gram matrix has squared singular values. In float32, the error of a small singular value
    # is therefore larger than float32's rounding error: about 1e-4 of the norm.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    assert float((result - expected).norm() / expected.norm()) < tolerance

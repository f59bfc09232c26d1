"""Optimizers: parameter groups, and Muon compared with torch and with its definition."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from ddiff_core.optimizers import AdamW, AdamW8bit
from ddiff_core.optimizers import Muon as MuonComponent
from torch import Tensor, nn
from toy import Net

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.errors import ArgumentError, DataError
from ddiff.recipe.resolve import read_recipe
from ddiff.runs.memory import training_bytes
from ddiff.training.optimizers import (
    Muon,
    _iterate_gram,
    _iterate_matrix,
    adamw,
    adamw_8bit,
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


# ---------------------------------------------------------------------- 8-bit moments


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the optimizer of bitsandbytes by AdamW of torch, which has the same arguments."""
    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = torch.optim.AdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_adamw_8bit_gets_the_groups_and_settings_of_adamw(stand_in: None, decay: str) -> None:
    keys = {"lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.7, "eps": 1e-3, "decay": decay}
    net = Net()
    eight = AdamW8bit.build(AdamW8bit.Config(**keys), module=net).param_groups  # type: ignore[arg-type]
    plain = AdamW.build(AdamW.Config(**keys), module=net).param_groups  # type: ignore[arg-type]
    assert len(eight) == len(plain) == 2
    for one, other in zip(eight, plain):
        assert all(a is b for a, b in zip(one["params"], other["params"], strict=True))
        for key in ("lr", "betas", "weight_decay", "eps"):
            assert one[key] == other[key]


def test_adamw_8bit_without_bitsandbytes_names_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DataError, match=r'pip install "discrete-diffusion\[8bit\]"'):
        adamw_8bit(Net())


def test_adamw_8bit_refuses_sharded_parameters(
    stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddiff.training.optimizers._is_sharded", lambda tensor: True)
    with pytest.raises(ArgumentError, match="bitsandbytes cannot update"):
        adamw_8bit(Net())


def test_memory_check_counts_the_two_bytes_of_8_bit_moments() -> None:
    # gradient, moments and moving average: 4 + 4 + 4 and 4 + 2 + 4 bytes
    for kind, expected in (("adamw", 12.0), ("adamw_8bit", 10.0)):
        settings = [f"train.optimizer={kind}", "train.ema=0.9"]
        assert training_bytes(read_recipe("mdlm_small", settings=settings)) == expected


class Wide(nn.Module):
    """One matrix with 8-bit moments (64 x 64 = 4096 numbers), and a bias with float32 moments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)


def set_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_8bit_steps_equal_those_of_adamw_up_to_the_rounding_of_moments() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net, other = Wide(), Wide()
    other.load_state_dict(net.state_dict())
    start = net.layer.weight.detach().clone()
    eight, plain = adamw_8bit(net), adamw(other)
    for step in range(5):
        set_gradients(net, step)
        set_gradients(other, step)
        eight.step()
        plain.step()
    state = eight.state[net.layer.weight]  # type: ignore[attr-defined]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    moved = (other.layer.weight - start).norm()
    # An 8-bit moment has a relative error of a few percent; without updates the ratio would be 1.
    assert (net.layer.weight - other.layer.weight).norm() < 0.1 * moved
    torch.testing.assert_close(net.layer.bias, other.layer.bias, rtol=1e-5, atol=1e-6)


def test_adamw_8bit_resumes_from_a_checkpoint(tmp_path: object) -> None:
    pytest.importorskip("bitsandbytes")
    net, other = Wide(), Wide()
    first, second = adamw_8bit(net), adamw_8bit(other)
    set_gradients(net, 0)
    first.step()
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, net.state_dict(), {"optimizer": first.state_dict()})
    found = checkpoints.load(1)
    found.restore(other)
    second.load_state_dict(found.read_state()["optimizer"])
    for module, optimizer in ((net, first), (other, second)):
        set_gradients(module, 1)
        optimizer.step()
    assert torch.equal(net.layer.weight, other.layer.weight)
    assert torch.equal(net.layer.bias, other.layer.bias)

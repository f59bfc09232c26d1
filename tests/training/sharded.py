"""Programs that save and load checkpoints of a sharded model on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ddiff.checkpoint.checkpoints import Checkpoint, Checkpoints
from ddiff.distributed.data_parallel import DistributedBackend
from ddiff.errors import CheckpointError

STEP = 7


class Uneven(nn.Module):
    """Model whose parameters are sharded unequally: some shards of a rank are empty.

    It has tied tables of 5 rows, a matrix of 1 row, a scale and a buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.gate = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.ones(7))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("counts", torch.arange(5))


def made(seed: int, *, sharded: bool) -> tuple[Uneven, torch.optim.AdamW]:
    torch.manual_seed(seed)
    net = Uneven()
    if sharded:
        fully_shard(net.hidden)
        fully_shard(net)
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


def take_step(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Take an optimizer step with gradients that depend only on `number` and parameter names."""
    for place, parameter in enumerate(net.parameters()):
        generator = torch.Generator().manual_seed(100 * number + place)
        gradient = torch.randn(tuple(parameter.shape), generator=generator)
        if isinstance(parameter, DTensor):
            parameter.grad = distribute_tensor(
                gradient, parameter.device_mesh, parameter.placements
            )
        else:
            parameter.grad = gradient
    optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def parts(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Gather model, optimizer state and exponential moving average as unsharded tensors."""
    state = optimizer.state_dict()["state"]
    moments = {
        f"{i}.{name}": value for i, values in state.items() for name, value in values.items()
    }
    return {name: whole(value) for name, value in (net.state_dict() | moments).items()}


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Any]:
    averages = {name: (parameter * 2).detach() for name, parameter in net.named_parameters()}
    state = {"optimizer": optimizer.state_dict(), "ema": {"updates": 2, "weights": averages}}
    return state | {"random": {"cpu": torch.tensor([rank])}}


def trained(sharded: bool, rank: int = 0) -> tuple[Uneven, torch.optim.AdamW, dict[str, Any]]:
    net, optimizer = made(0, sharded=sharded)
    for number in range(2):
        take_step(net, optimizer, number)
    return net, optimizer, state_of(net, optimizer, rank)


def save_in_shards(folder: str) -> None:
    """Save a checkpoint asynchronously, and take another step before it is written."""
    backend = DistributedBackend("cpu")
    net, optimizer, state = trained(sharded=True, rank=backend.rank)
    checkpoints = Checkpoints(folder)
    checkpoints.save_async(STEP, net.state_dict(), state)
    with torch.no_grad():
        for tensor in (*net.parameters(), *state["ema"]["weights"].values(), net.counts):
            tensor.mul_(0)
    take_step(net, optimizer, 9)
    assert checkpoints.steps() == [STEP]
    del net, optimizer, state
    backend.close()


def load_in_shards(folder: str, expected: str) -> None:
    """Load a checkpoint into a model that is sharded over these ranks, and take a step.

    The tensors must equal those in the file `expected`.
    """
    backend = DistributedBackend("cpu")
    net, optimizer = made(1, sharded=True)
    found = Checkpoints(folder).newest()
    assert found is not None
    goes_on(net, optimizer, found, torch.load(expected))
    ema = found.read_state(like=net.parameters())["ema"]["weights"]
    for name, parameter in net.named_parameters():
        assert ema[name].placements == parameter.placements
        assert ema[name].device_mesh == parameter.device_mesh
    del net, optimizer, ema
    backend.close()


def goes_on(
    net: nn.Module, optimizer: torch.optim.Optimizer, found: Checkpoint, expected: dict[str, Any]
) -> None:
    found.restore(net)
    state = found.read_state(like=net.parameters())
    optimizer.load_state_dict(state["optimizer"])
    assert state["random"]["cpu"].tolist() == [0], "all ranks must get the random state of rank 0"
    for name, value in state["ema"]["weights"].items():
        assert torch.equal(whole(value), expected["ema"][name]), name
    same(parts(net, optimizer), expected["saved"])
    take_step(net, optimizer, 2)
    same(parts(net, optimizer), expected["after"])


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


class Full:
    """File system that raises "No space left" for files of shards."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def open(self, path: str, mode: str) -> Any:
        if mode == "wb" and "rank_00001" in path:
            raise OSError(28, "No space left on device")
        return self._fs.open(path, mode)


def fail_on_one_rank(folder: str) -> None:
    """Save while rank 1 cannot write its shard, and then save again.

    `wait` raises on all ranks, and no marker file is written. The second save succeeds.
    """
    backend = DistributedBackend("cpu")
    net, optimizer, state = trained(sharded=True)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, net.state_dict(), state)
    good, checkpoints._fs = checkpoints._fs, Full(checkpoints._fs)
    checkpoints.save_async(2, net.state_dict(), state)
    with pytest.raises(
        CheckpointError,
        match=r"step_00000002 could not be written \(OSError.*No space.* on rank 1\)",
    ):
        checkpoints.save_async(3, net.state_dict(), state)
    assert checkpoints.steps() == [1]
    checkpoints._fs = good
    checkpoints.save(3, net.state_dict(), state)
    assert checkpoints.steps() == [1, 3]
    assert {path.name for path in Path(folder).iterdir()} == {"step_00000001", "step_00000003"}
    del net, optimizer, state
    backend.close()

"""Sharded checkpoints load on other numbers of processes, with bitwise identical results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from sharded import (
    STEP,
    fail_on_one_rank,
    goes_on,
    load_in_shards,
    made,
    parts,
    save_in_shards,
    take_step,
    trained,
)

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.errors import CheckpointError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File with the tensors of a single process when it saves, and one step later."""
    net, optimizer, state = trained(sharded=False)
    saved = parts(net, optimizer)
    take_step(net, optimizer, 2)
    file = tmp_path_factory.mktemp("expected") / "expected.pt"
    torch.save(
        {"saved": saved, "after": parts(net, optimizer), "ema": state["ema"]["weights"]}, file
    )
    return file


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(2, save_in_shards, str(folder))
    return folder


def test_single_process_loads_a_sharded_checkpoint(saved: Path, expected: Path) -> None:
    wanted = torch.load(expected)
    found = Checkpoints(saved).newest()
    assert found is not None
    goes_on(*made(1, sharded=False), found, wanted)
    weights = Checkpoints(saved).read_weights()
    assert weights.keys() == trained(sharded=False)[0].state_dict().keys()
    for name, value in weights.items():
        assert torch.equal(value, wanted["saved"][name])
    averages = Checkpoints(saved).read_weights(average=True)
    assert torch.equal(averages["head.weight"], wanted["ema"]["embedding.weight"]), (
        "tied weights have different averages"
    )
    assert torch.equal(averages["counts"], weights["counts"]), "a buffer was averaged"
    assert torch.equal(averages["scale"], wanted["ema"]["scale"])


def test_sharded_checkpoint_loads_on_another_number_of_ranks(saved: Path, expected: Path) -> None:
    on_ranks(3, load_in_shards, str(saved), str(expected))


def test_unsharded_checkpoint_loads_into_a_sharded_model(tmp_path: Path, expected: Path) -> None:
    net, _, state = trained(sharded=False)
    Checkpoints(tmp_path).save(STEP, net.state_dict(), state)
    on_ranks(2, load_in_shards, str(tmp_path), str(expected))


def test_save_writes_shards_on_each_rank_and_other_tensors_on_rank_0(saved: Path) -> None:
    folder = saved / f"step_{STEP:08d}"
    shards = {
        f"{part}.rank_0000{rank}.safetensors"
        for part in ("model", "optimizer", "ema")
        for rank in (0, 1)
    }
    wholes = {f"{part}.safetensors" for part in ("model", "optimizer", "random")}
    records = {"manifest.json", "state.json", "complete.json"}
    assert {path.name for path in folder.iterdir()} == shards | wholes | records
    first, second = (load_file(folder / f"model.rank_0000{rank}.safetensors") for rank in (0, 1))
    assert first["embedding.weight@0,0"].shape == (3, 4)
    assert second["embedding.weight@3,0"].shape == (2, 4)
    assert not any(name.startswith(("gate", "head")) for name in second), (
        "rank 1 has no row of `gate`, and the tied `head` is stored only once"
    )
    assert load_file(folder / "model.safetensors").keys() == {"counts"}
    manifest = json.loads((folder / "manifest.json").read_text())["tensors"]
    momentum = manifest["state.optimizer.state.1.exp_avg"]
    assert (momentum["dtype"], momentum["size"]) == ("F32", [5, 4])
    assert [(chunk["offsets"], chunk["sizes"]) for chunk in momentum["chunks"]] == [
        ([0, 0], [3, 4]),
        ([3, 0], [2, 4]),
    ]


def test_load_raises_an_error_that_names_the_damaged_or_missing_shard(
    tmp_path: Path, saved: Path
) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    file = tmp_path / "copy" / f"step_{STEP:08d}" / "model.rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.rank_00001\.safetensors is damaged"):
        Checkpoints(tmp_path / "copy").read_weights()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.rank_00001\.safetensors is missing"):
        Checkpoints(tmp_path / "copy").newest()


def test_failed_write_on_one_rank_raises_on_all_ranks(tmp_path: Path) -> None:
    on_ranks(2, fail_on_one_rank, str(tmp_path))

"""Checkpoints: saving, kills during saving, loading, and damaged files."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Net, toy_trainer

from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.errors import ArgumentError, CheckpointError

MODEL = {"weight": torch.arange(6.0).reshape(2, 3).T, "count": torch.tensor(3)}


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {"weight": torch.full((3,), float(step))}, {"step_was": step})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("root", ["{tmp}/checkpoints", "memory://checkpoints_of_a_tree"])
def test_checkpoint_restores_equal_nested_tensors(tmp_path: Path, root: str) -> None:
    state = {
        "ints": {
            0: torch.tensor(1.0, dtype=torch.float64),
            7: {"betas": (0.9, 0.999), "none": None},
        },
        "floats": [0.1, 1e-300, 3, True],
        "$odd": {"text": "x", "nested": [(1, [torch.arange(3, dtype=torch.uint8)])]},
        "empty": {},
    }
    checkpoints = Checkpoints(root.format(tmp=tmp_path))
    assert checkpoints.newest() is None
    path = checkpoints.save(12, MODEL, state)
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.path) == (12, path)
    assert same(found.read_state(), state)
    in_order = dict(sorted(MODEL.items()))  # the order of the names is not defined
    assert same(dict(sorted(found.read_weights().items())), in_order)
    assert same(dict(sorted(checkpoints.read_weights().items())), in_order)


def test_checkpoint_restores_tied_tensors_under_every_name(tmp_path: Path) -> None:
    net = Net()
    net.head.weight = net.embedding.weight
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, net.state_dict(), {})
    found = checkpoints.load(1)
    weights = found.read_weights()
    assert torch.equal(weights["head.weight"], weights["embedding.weight"])
    other = Net()
    found.restore(other)
    assert torch.equal(other.head.weight, net.embedding.weight)


def test_checkpoints_folder_keeps_only_the_newest_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5, 10, 15, 20)
    assert checkpoints.steps() == [15, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000015", "step_00000020"]
    with pytest.raises(ArgumentError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)


class Death(BaseException):
    """Exception that simulates SIGKILL, because no code under test catches BaseException."""


class Store:
    """Local file system that behaves like an object store.

    Files cannot be renamed, and a file appears only when it is complete.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)


class Mortal(Store):
    """Object store that raises `Death` before its change number `last` + 1."""

    def __init__(self, fs: Any, last: int) -> None:
        super().__init__(fs)
        self._left = last

    def _live(self) -> None:
        if self._left == 0:
            raise Death
        self._left -= 1

    def makedirs(self, *args: Any, **kwargs: Any) -> Any:
        self._live()
        return self._fs.makedirs(*args, **kwargs)

    def mv(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an object store cannot rename files")

    def pipe_file(self, *args: Any, **kwargs: Any) -> Any:
        self._live()
        return self._fs.pipe_file(*args, **kwargs)

    def rm(self, path: str, recursive: bool = False) -> Any:
        if recursive and self._left == 0:
            (Path(path) / "model.safetensors").unlink()
        self._live()
        return self._fs.rm(path, recursive=recursive)

    def open(self, path: str, mode: str) -> Any:
        if mode == "wb" and self._left == 0:
            Path(path).write_bytes(b"half of i")
        if mode == "wb":
            self._live()
        return self._fs.open(path, mode)


def test_kill_during_save_leaves_the_previous_complete_checkpoint(tmp_path: Path) -> None:
    survived = []
    for last in range(20):
        root = tmp_path / str(last)
        checkpoints = Checkpoints(root, keep=1)
        save(checkpoints, 5)
        whole, checkpoints._fs = checkpoints._fs, Mortal(checkpoints._fs, last)
        try:
            save(checkpoints, 10)
            survived.append(last)
        except Death:
            pass
        checkpoints._fs = whole
        found = checkpoints.newest()
        assert found is not None
        for step in checkpoints.steps():
            assert checkpoints.read_weights(step)["weight"].tolist() == [float(step)] * 3
        save(checkpoints, 15)
        assert [path.name for path in root.iterdir()] == ["step_00000015"], (
            "files of the killed save were not deleted"
        )
    # The changes are: the folder, three files, the marker, the old marker and its folder. The save
    # was killed before each of them.
    assert survived[0] == 7


def test_newest_checkpoint_skips_folders_without_marker_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5, 10)
    (tmp_path / "step_00000010" / "complete.json").unlink()
    assert checkpoints.newest().step == 5  # type: ignore[union-attr]
    with pytest.raises(
        CheckpointError, match=r"no complete checkpoint of step 10\. Choose one of the steps \[5\]"
    ):
        checkpoints.load(10)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "manifest.json", "state.json", "complete.json"]
)
def test_load_raises_an_error_that_names_the_truncated_file_and_the_remedy(
    tmp_path: Path, name: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5, 10)
    file = tmp_path / "step_00000010" / name
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        CheckpointError,
        match=rf"{name} .*Delete the directory .*step_00000010 to resume from step 5",
    ):
        checkpoints.newest()
    assert checkpoints.load(5).step == 5


def test_restore_raises_an_error_that_names_the_damaged_or_missing_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 5)
    file = tmp_path / "step_00000005" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    opened = checkpoints.newest()
    assert opened is not None
    for read in (
        opened.read_weights,
        lambda: opened.restore(nn.ParameterDict({"weight": torch.zeros(3)})),
    ):
        with pytest.raises(
            CheckpointError, match=r"model.safetensors is damaged.*No earlier checkpoint is left"
        ):
            read()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        checkpoints.read_weights()


def test_read_weights_without_checkpoint_raises_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint. Train the run"):
        Checkpoints(tmp_path / "nowhere").read_weights()


@pytest.mark.parametrize(("number", "age"), [(1, "an older"), (99, "a newer")])
def test_load_refuses_checkpoints_of_another_format_version(
    tmp_path: Path, number: int, age: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    marker = tmp_path / "step_00000005" / "complete.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": number}))
    with pytest.raises(
        CheckpointError,
        match=rf"format {number}; this ddiff reads only format 2: .* {age} version of ddiff",
    ):
        checkpoints.newest()


def test_restore_raises_an_error_that_names_tensors_that_differ_from_the_model(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, Net().state_dict(), {})
    wider = nn.ModuleDict({"hidden": nn.Linear(4, 9)})
    with pytest.raises(
        CheckpointError,
        match=r"hidden.weight has shape \[4, 4\], but the model needs \[9, 4\]|is not in the",
    ):
        checkpoints.load(1).restore(wider)


def test_save_raises_an_error_that_names_the_key_of_an_unsupported_value(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"state.optimizer.rule is a function"):
        checkpoints.save(1, MODEL, {"optimizer": {"rule": lambda x: x}})
    assert checkpoints.newest() is None
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_write_and_read_no_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle")

    for module, name in (
        (torch, "save"),
        (torch, "load"),
        (pickle, "dumps"),
        (pickle, "loads"),
        (pickle, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    trainer = toy_trainer(tmp_path, 6)
    trainer.fit()
    again = toy_trainer(tmp_path, 8)
    again.fit(again.checkpoints.newest())
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert file.suffix in (".json", ".jsonl", ".safetensors")
        start = file.read_bytes()[:9]
        assert start[:1] == b"{" or start[8:9] == b"{", f"{file} is neither JSON nor safetensors"


def test_checkpoint_records_fingerprints_and_origins_of_components(tmp_path: Path) -> None:
    trainer = toy_trainer(
        tmp_path, 5, origins={"process": "ddiff_x 1.0"}, fingerprints={"vocabulary": "aa"}
    )
    trainer.fit()
    state = json.loads((tmp_path / "checkpoints" / "step_00000005" / "state.json").read_text())[
        "state"
    ]
    assert state["origins"] == {"process": "ddiff_x 1.0"}
    assert state["fingerprints"] == {"vocabulary": "aa"}


def test_read_weights_of_a_missing_ema_raises_checkpoint_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    with pytest.raises(
        CheckpointError, match=r"step_00000005 holds no moving average .* without \[train\] ema"
    ):
        checkpoints.read_weights(average=True)


def test_save_async_writes_the_values_at_the_time_of_the_call(tmp_path: Path) -> None:
    """A tensor changes before the file is written; the file must contain the old values."""
    checkpoints, changed = Checkpoints(tmp_path), threading.Event()
    weight, moments = torch.ones(3), {"rate": torch.zeros(2)}

    class Waiting(Store):
        def open(self, path: str, mode: str) -> Any:
            assert mode != "wb" or changed.wait(10.0)
            return self._fs.open(path, mode)

    checkpoints._fs = Waiting(checkpoints._fs)
    checkpoints.save_async(1, {"weight": weight}, {"moments": moments})
    weight.fill_(2.0)
    moments["rate"].fill_(3.0)
    moments["rest"] = torch.zeros(1)
    changed.set()
    found = checkpoints.newest()
    assert found is not None
    assert same(found.read_weights(), {"weight": torch.ones(3)})
    assert same(found.read_state(), {"moments": {"rate": torch.zeros(2)}})


def test_checkpoint_wait_raises_the_error_of_a_failed_save(
    tmp_path: Path,
) -> None:
    class Full(Store):
        def open(self, path: str, mode: str) -> Any:
            if mode == "wb":
                raise OSError(28, "No space left on device")
            return self._fs.open(path, mode)

    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    good, checkpoints._fs = checkpoints._fs, Full(checkpoints._fs)
    checkpoints.save_async(10, MODEL, {})
    with pytest.raises(
        CheckpointError, match=r"step_00000010 could not be written \(OSError: .*No space left"
    ):
        checkpoints.wait()
    assert checkpoints.steps() == [5]
    checkpoints._fs = good
    save(checkpoints, 15)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000005", "step_00000015"]


def test_save_raises_an_error_that_names_the_key_of_a_complex_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state.optimizer.phase has dtype torch.complex64"):
        Checkpoints(tmp_path).save(
            1, MODEL, {"optimizer": {"phase": torch.zeros(2, dtype=torch.complex64)}}
        )
    assert list(tmp_path.iterdir()) == []

"""Checkpoints: safetensors and JSON, no pickle; a directory per step that counts only when it is complete.

    checkpoints/step_00000200/model.safetensors      the module's state
                              state.safetensors      every other tensor: optimizer, random state
                              state.json             everything else, with the places of those tensors
                              complete.json          size and SHA-256 of the others, written last

A checkpoint is written under another name, renamed, and only then marked complete, so a process that dies at any moment
leaves the earlier ones as they were. Paths may be anything that fsspec writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import torch as safetensors
from torch import Tensor, nn

from ddiff.errors import ArgumentError, CheckpointError

FORMAT = 1
MARKER = "complete.json"
MODEL, STATE_TENSORS, STATE = "model.safetensors", "state.safetensors", "state.json"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a run was after `step` steps: tensors of the model by name, and the tree of everything else."""

    step: int
    path: str
    model: dict[str, Tensor]
    state: dict[str, Any]

    def restore(self, module: nn.Module) -> None:
        """Load the model's tensors into `module`. Raises CheckpointError when they are those of another model."""
        load_weights(module, self.model, self.path)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load `weights` into `module`; `source` is named in the error when they do not fit."""
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not in the model" for name in weights if name not in own]
    faults += [
        f"{name} has shape {list(weights[name].shape)}, the model's has {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise CheckpointError(
            f"{source} holds another model than the one that was built: {'; '.join(faults[:3])}{more}. "
            "Load it with the recipe that it was trained with."
        )
    module.load_state_dict(weights)


@final
class Checkpoints:
    """The directory of a run's checkpoints, of which the `keep` newest stay."""

    def __init__(self, root: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise ArgumentError(f"keep must be at least 1, the checkpoint that a run goes on from; got {keep}.")
        self.keep = keep
        self._fs, self.root = fsspec.core.url_to_fs(os.fspath(root))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(
            int(match[1])
            for name in self._directories()
            if (match := _STEP.fullmatch(name)) and self._fs.exists(f"{self.root}/{name}/{MARKER}")
        )

    def save(self, step: int, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
        """Write the checkpoint of `step`, then drop those beyond the `keep` newest; its path is returned.

        `state` is a tree of dicts, lists, tuples, tensors, numbers, strings and None, and comes back as the same tree.
        """
        tensors: dict[str, Tensor] = {}
        distinct, aliases = _distinct(model)
        tree = {"step": step, "aliases": aliases, "state": _to_json(state, tensors, "state")}
        files = {
            MODEL: safetensors.save(distinct),
            STATE_TENSORS: safetensors.save(tensors),
            STATE: json.dumps(tree, indent=1).encode(),
        }
        writing, path = f"{self.root}/writing_{_name(step)}", f"{self.root}/{_name(step)}"
        self._remove(writing)
        self._fs.makedirs(writing, exist_ok=True)
        for name, data in files.items():
            self._write(f"{writing}/{name}", data)
        seals = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
        marker = json.dumps({"format": FORMAT, "step": step, "files": seals}, indent=1).encode()
        self._remove(path)
        self._fs.mv(writing, path, recursive=True)
        self._write(f"{path}/{MARKER}.part", marker)
        self._fs.mv(f"{path}/{MARKER}.part", f"{path}/{MARKER}")
        self._prune()
        return path

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None. Raises CheckpointError when its files are damaged."""
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of `step`. Raises CheckpointError when it is missing, incomplete or damaged."""
        seals = self._seals(step)
        tree = json.loads(self._read(step, STATE, seals))
        tensors = safetensors.load(self._read(step, STATE_TENSORS, seals))
        model = safetensors.load(self._read(step, MODEL, seals))
        model |= {alias: model[name] for alias, name in tree["aliases"].items()}
        return Checkpoint(step, f"{self.root}/{_name(step)}", model, _from_json(tree["state"], tensors))

    def weights(self, step: int | None = None) -> dict[str, Tensor]:
        """The model's tensors alone, of `step` or the newest: what evaluation and sampling need."""
        steps = self.steps()
        if not steps and step is None:
            raise CheckpointError(f"{self.root} holds no complete checkpoint. Train first, or name another run.")
        step = steps[-1] if step is None else step
        seals = self._seals(step)
        aliases = json.loads(self._read(step, STATE, seals))["aliases"]
        model = safetensors.load(self._read(step, MODEL, seals))
        return model | {alias: model[name] for alias, name in aliases.items()}

    def _seals(self, step: int) -> dict[str, dict[str, Any]]:
        path = f"{self.root}/{_name(step)}/{MARKER}"
        if step not in self.steps():
            raise CheckpointError(
                f"{self.root} holds no complete checkpoint of step {step}; it has those of {self.steps() or 'no step'}."
            )
        try:
            with self._fs.open(path, "rb") as file:
                marker = json.loads(file.read())
            found, seals = marker["format"], marker["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: it is no checkpoint marker. {self._remedy(step)}") from error
        if found != FORMAT:
            raise CheckpointError(f"{path} has format {found}; this ddiff reads format {FORMAT}. {self._remedy(step)}")
        return seals

    def _read(self, step: int, name: str, seals: Mapping[str, Mapping[str, Any]]) -> bytes:
        path = f"{self.root}/{_name(step)}/{name}"
        if not self._fs.exists(path):
            raise CheckpointError(f"{path} is missing though its checkpoint was completed. {self._remedy(step)}")
        with self._fs.open(path, "rb") as file:
            data = file.read()
        if len(data) != seals[name]["bytes"]:
            raise CheckpointError(
                f"{path} has {len(data)} bytes and was completed with {seals[name]['bytes']}: it was cut off or "
                f"replaced later. {self._remedy(step)}"
            )
        if _sha256(data) != seals[name]["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the recorded one. {self._remedy(step)}")
        return data

    def _remedy(self, step: int) -> str:
        earlier = [other for other in self.steps() if other < step]
        there = f"{self.root}/{_name(step)}"
        if earlier:
            return f"Delete the directory {there} to go on from step {earlier[-1]}, or start anew with --fresh."
        return f"No earlier checkpoint is left: restore {there} from a copy, or start anew with --fresh."

    def _directories(self) -> list[str]:
        if not self._fs.isdir(self.root):
            return []
        self._fs.invalidate_cache(self.root)
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self.root, detail=False)]

    def _prune(self) -> None:
        kept = {_name(step) for step in self.steps()[-self.keep :]}
        for name in self._directories():
            if name not in kept and _STEP.fullmatch(name.removeprefix("writing_")):
                self._remove(f"{self.root}/{name}")

    def _remove(self, path: str) -> None:
        if self._fs.exists(f"{path}/{MARKER}"):  # first, so that a half-removed checkpoint is an incomplete one
            self._fs.rm(f"{path}/{MARKER}")
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)

    def _write(self, path: str, data: bytes) -> None:
        with self._fs.open(path, "wb") as file:
            file.write(data)
            if isinstance(self._fs, LocalFileSystem):  # the rename must not reach the disk before what it names
                file.flush()
                os.fsync(file.fileno())


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _distinct(model: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without repetition, and alias -> name for tied ones, which safetensors does not store twice."""
    names: dict[tuple[Any, ...], str] = {}
    distinct: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in names:
            aliases[name] = names[place]
            continue
        names[place] = name
        distinct[name] = _plain(tensor)
    return distinct, aliases


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _to_json(tree: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """JSON that `_from_json` turns back into the same tree; its tensors go to `tensors` under their place in it."""
    if isinstance(tree, torch.Tensor):
        tensors[place] = _plain(tree)
        return {"$tensor": place}
    if isinstance(tree, Mapping):
        items = [(key, _to_json(value, tensors, f"{place}.{key}")) for key, value in tree.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in tree)
        return dict(items) if plain else {"$items": items}
    if isinstance(tree, list | tuple):
        values = [_to_json(value, tensors, f"{place}.{i}") for i, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"$tuple": values}
    if tree is None or isinstance(tree, str | bool | int | float):
        return tree
    raise CheckpointError(
        f"{place} is a {type(tree).__name__}, which a checkpoint cannot hold: state is made of dicts, lists, tuples, "
        "tensors, numbers, strings and None. Give the optimizer or plugin that owns it such a state_dict."
    )


def _from_json(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_from_json(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(_from_json(value, tensors) for value in tree["$tuple"])
    if "$items" in tree:
        return {key: _from_json(value, tensors) for key, value in tree["$items"]}
    return {key: _from_json(value, tensors) for key, value in tree.items()}

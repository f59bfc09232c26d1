"""Checkpoints: safetensors and JSON, no pickle; a directory per step that counts only when it is complete.

    checkpoints/step_00000200/model.safetensors               tensors of the model, whole
                              model.rank_00001.safetensors    the shards that rank 1 had, of a model in shards
                              optimizer.safetensors, ...      the same of every other entry of the state that has tensors
                              manifest.json                   each tensor: dtype, size, boxes with their file and place
                              state.json                      everything else, with the names of those tensors
                              complete.json                   size and SHA-256 of the others, written last

Saving is collective: tensors are copied at once and written behind the training. A directory without its marker is no
checkpoint, whatever it holds, and is removed by a later save. Paths may be anything that fsspec writes; all ranks must see
the same files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import fsspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddiff.checkpoint.atomic_folder import STATE, STEP, Folder, Seal, complete_steps, step_name
from ddiff.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from ddiff.checkpoint.dcp_storage import Manifest, Staged

MANIFEST = "manifest.json"
SLOWEST = timedelta(hours=1)  # how long ranks that have written their files wait for the others


@dataclass(frozen=True)
class Checkpoint:
    """What a run was after `step` steps, opened: its tensors are not read yet.

    `state` is the tree that was saved, with tensors on the device "meta" in the place of its own.
    """

    step: int
    state: dict[str, Any]
    manifest: Manifest
    aliases: Mapping[str, str]  # of the model: a tied tensor -> the one that it is stored as
    folder: Folder

    def __repr__(self) -> str:
        return f"Checkpoint(step {self.step}, {self.path})"

    @property
    def path(self) -> str:
        return self.folder.path

    def restore(self, module: nn.Module) -> None:
        """Load the model's tensors into `module`, which may be sharded in any way, or not.

        Raises CheckpointError when they are those of another model, or damaged.
        """
        from ddiff.checkpoint.dcp_storage import fill

        own, places = module.state_dict(), self._places()
        shapes = {name: torch.Size(self.manifest[place].size) for name, place in places.items()}
        _check_fit({name: tensor.shape for name, tensor in own.items()}, shapes, self.path)
        fill(
            {place: own[name] for name, place in places.items() if name not in self.aliases},
            self.manifest,
            self.folder,
        )
        module.load_state_dict(own | {alias: own[name] for alias, name in self.aliases.items()})

    def tree(self, like: Iterable[Tensor] = ()) -> dict[str, Any]:
        """The state with its tensors: floats that have the size of a DTensor in `like` in shards as that one is, all others
        whole, on the CPU. Raises CheckpointError when they are damaged."""
        from ddiff.checkpoint.dcp_storage import fill, targets_like

        stored = {
            name: tensor for name, tensor in self.manifest.items() if name.startswith("state.")
        }
        tensors = targets_like(stored, list(like))
        fill(tensors, self.manifest, self.folder)
        return _filled(self.state, tensors, "state")

    def weights(self, *, average: bool = False) -> dict[str, Tensor]:
        """The model's tensors by name, whole, on the CPU; with `average`, those of `state.ema.weights` in place of the ones
        that they are averages of. Raises CheckpointError when there are none, or a file is damaged."""
        from ddiff.checkpoint.dcp_storage import fill

        averages = (self.state.get("ema") or {}).get("weights", {}) if average else {}
        if average and not averages:
            raise CheckpointError(
                f"{self.path} holds no moving average of the weights: its run was trained without [train] ema. Take the "
                "weights as they were trained."
            )
        places = self._places() | {name: f"state.ema.weights.{name}" for name in averages}
        places |= {alias: places[name] for alias, name in self.aliases.items()}
        tensors = {place: self.manifest[place].empty() for place in places.values()}
        fill(tensors, self.manifest, self.folder)
        return {name: tensors[place] for name, place in places.items()}

    def _places(self) -> dict[str, str]:
        """name -> its place in the manifest."""
        stored = [
            place.removeprefix("model.") for place in self.manifest if place.startswith("model.")
        ]
        return {name: f"model.{name}" for name in stored} | {
            a: f"model.{b}" for a, b in self.aliases.items()
        }


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load `weights` into `module`; `source` is named in the error when they do not fit."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    _check_fit(own, {name: tensor.shape for name, tensor in weights.items()}, source)
    module.load_state_dict(weights)


def _check_fit(
    own: Mapping[str, torch.Size], theirs: Mapping[str, torch.Size], source: str
) -> None:
    faults = [f"{name} is missing" for name in own if name not in theirs]
    faults += [f"{name} is not in the model" for name in theirs if name not in own]
    faults += [
        f"{name} has shape {list(theirs[name])}, the model's has {list(own[name])}"
        for name in own
        if name in theirs and theirs[name] != own[name]
    ]
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise CheckpointError(
            f"{source} holds another model than the one that was built: {'; '.join(faults[:3])}{more}. "
            "Load it with the recipe that it was trained with."
        )


@final
class Checkpoints:
    """The directory of a run's checkpoints, of which the `keep` newest stay.

    Where processes form a group, each of them has one of these and all save together; every one reads for itself.
    """

    def __init__(self, root: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise ArgumentError(
                f"keep must be at least 1, the checkpoint that a run goes on from; got {keep}."
            )
        self.keep = keep
        self._fs, self.root = fsspec.core.url_to_fs(os.fspath(root))
        self._behind = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._ranks: dist.ProcessGroup | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; waits for what is being written here."""
        self.wait()
        return self._complete()

    def save(self, step: int, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
        """Write the checkpoint of `step`, then drop those beyond the `keep` newest; its path is returned.

        `state` is a tree of dicts, lists, tuples, tensors, numbers, strings and None, and comes back as the same tree; its
        entries give the files their names. DTensors are written in their shards, all else as rank 0 has it.
        """
        path = self.begin(step, model, state)
        self.wait()
        return path

    def begin(self, step: int, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
        """`save`, behind the caller's back: what is saved is copied, and may change, when this returns.

        Waits for the one that was begun before, and raises what `wait` raises.
        """
        from ddiff.checkpoint.dcp_storage import distinct, stage

        self.wait()
        once, aliases = distinct(model)
        tensors = {f"model.{name}": tensor for name, tensor in once.items()}
        tree = json.dumps(
            {"step": step, "aliases": aliases, "state": _to_json(state, tensors, "state")}, indent=1
        )
        staged = stage(tensors, _file_and_key, self._group())
        folder = self._folder(step)
        self._writing = self._behind.submit(self._write, folder, step, staged, tree)
        return folder.path

    def wait(self) -> None:
        """Until what was begun is written. CheckpointError, on all ranks, when one of them could not write."""
        if self._writing is not None:
            try:
                self._writing.result()
            finally:
                self._writing = None if self._writing.done() else self._writing

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None. Raises CheckpointError as `load` does."""
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def load(self, step: int) -> Checkpoint:
        """Open the checkpoint of `step`. Raises CheckpointError when it is incomplete, or a file of it missing or cut off.

        A damage inside a file of tensors is found when they are read.
        """
        from ddiff.checkpoint.dcp_storage import manifest_from_json

        complete, folder = self.steps(), self._folder(step)
        if step not in complete:
            raise CheckpointError(
                f"{self.root} holds no complete checkpoint of step {step}; it has those of {complete or 'no step'}."
            )
        folder.check()
        manifest = manifest_from_json(folder.read(MANIFEST), f"{folder.path}/{MANIFEST}")
        try:
            tree = json.loads(folder.read(STATE))
            state = _from_json(
                tree["state"],
                {name: stored.empty(device="meta") for name, stored in manifest.items()},
            )
            aliases = dict(tree["aliases"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{folder.path}/{STATE} is damaged: it is no state of a run ({type(error).__name__}: {error}). "
                f"{self._remedy(step)}"
            ) from error
        return Checkpoint(step, state, manifest, aliases, folder)

    def weights(self, step: int | None = None, *, average: bool = False) -> dict[str, Tensor]:
        """The model's tensors alone, whole, of `step` or the newest, as `Checkpoint.weights` has them."""
        steps = self.steps()
        if not steps and step is None:
            raise CheckpointError(
                f"{self.root} holds no complete checkpoint. Train first, or name another run."
            )
        return self.load(steps[-1] if step is None else step).weights(average=average)

    # ------------------------------------------------------------------ writing, in a thread of its own

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks, in a group of their own: they talk about checkpoints while training talks. None for one process."""
        if (
            self._ranks is None
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        ):
            self._ranks = dist.new_group(backend="gloo", timeout=SLOWEST)
        return self._ranks

    def _write(self, folder: Folder, step: int, staged: Staged, tree: str) -> None:
        leads = staged.manifest is not None
        self._together(folder, lambda: folder.make() if leads else None)
        written = self._together(folder, lambda: _write_files(folder, staged, tree))
        seals = {name: seal for of_rank in written for name, seal in of_rank.items()}
        self._together(folder, lambda: self._finish(folder, step, seals) if leads else None)

    def _together(self, folder: Folder, act: Callable[[], Any]) -> list[Any]:
        """Each rank acts; what each has to give. CheckpointError on all of them when one has failed."""
        failure, given = None, None
        try:
            given = act()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        outcomes: list[Any] = [(failure, given)]
        if self._ranks is not None:
            outcomes = [None] * dist.get_world_size(self._ranks)
            dist.all_gather_object(outcomes, (failure, given), group=self._ranks)
        if told := [
            f"{failure} on rank {rank}" for rank, (failure, _) in enumerate(outcomes) if failure
        ]:
            raise CheckpointError(
                f"{folder.path} could not be written ({told[0]}), so training ended. Free or mend the place where it goes; "
                "the same command then goes on from the checkpoint before."
            )
        return [given for _, given in outcomes]

    def _finish(self, folder: Folder, step: int, seals: Mapping[str, Seal]) -> None:
        folder.mark(step, seals)
        kept = {step_name(step) for step in self._complete()[-self.keep :]}
        for name in self._directories():
            if name not in kept and STEP.fullmatch(name):
                self._folder(int(name.removeprefix("step_"))).remove()

    # ------------------------------------------------------------------ the directory

    def _complete(self) -> list[int]:
        return complete_steps(self._fs, self.root)

    def _folder(self, step: int) -> Folder:
        return Folder(self._fs, f"{self.root}/{step_name(step)}", lambda: self._remedy(step))

    def _remedy(self, step: int) -> str:
        earlier = [other for other in self._complete() if other < step]
        there = f"{self.root}/{step_name(step)}"
        if earlier:
            return f"Delete the directory {there} to go on from step {earlier[-1]}, or start anew with --fresh."
        return f"No earlier checkpoint is left: restore {there} from a copy, or start anew with --fresh."

    def _directories(self) -> list[str]:
        if not self._fs.isdir(self.root):
            return []
        self._fs.invalidate_cache(self.root)
        return [
            path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self.root, detail=False)
        ]


def _file_and_key(place: str) -> tuple[str, str]:
    """Of a tensor's place in the tree: the file, an entry of the tree, and the key there, the rest of the way."""
    entry, _, key = place.removeprefix("state.").partition(".")
    return entry, key or entry


def _write_files(folder: Folder, staged: Staged, tree: str) -> dict[str, Seal]:
    """What this rank writes."""
    from ddiff.checkpoint.dcp_storage import manifest_to_json, write_tensors

    seals = {}
    for name, tensors in staged.files.items():
        seals[name] = folder.write(name, lambda sink, tensors=tensors: write_tensors(sink, tensors))  # type: ignore[misc]
    if staged.manifest is not None:
        for name, text in ((MANIFEST, manifest_to_json(staged.manifest)), (STATE, tree)):
            seals[name] = folder.write(name, lambda sink, text=text: sink.write(text.encode()))  # type: ignore[misc]
    return seals


# ---------------------------------------------------------------------- the state as JSON


def _to_json(tree: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """JSON that `_from_json` turns back into the same tree; its tensors go to `tensors` under their place in it."""
    if isinstance(tree, torch.Tensor):
        tensors[place] = tree
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


def _filled(tree: Any, tensors: Mapping[str, Tensor], place: str) -> Any:
    """The tree with the tensors of these places."""
    if isinstance(tree, torch.Tensor):
        return tensors[place]
    if isinstance(tree, dict):
        return {key: _filled(value, tensors, f"{place}.{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_filled(value, tensors, f"{place}.{i}") for i, value in enumerate(tree))
    return tree

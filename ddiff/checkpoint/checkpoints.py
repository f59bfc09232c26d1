"""Checkpoints of a run: one folder per step with safetensors and JSON files, without pickle.

    checkpoints/step_00000200/model.safetensors             unsharded tensors of the model
                              model.rank_00001.safetensors  shards of rank 1 of a sharded model
                              optimizer.safetensors, ...    tensors of each entry of the state
                              manifest.json                 dtype, size and file of each tensor
                              state.json                    all other values of the state
                              complete.json                 size and SHA-256 of all other files

All ranks must call `save` or `save_async`. `save_async` first copies the tensors to the CPU, then
writes the files in a thread while training continues. `complete.json` is written last. A folder
without `complete.json` is not a checkpoint, and a later save removes the folder. The root may be on
any fsspec file system to which all ranks have access.
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

from ddiff.checkpoint.atomic_folder import (
    STATE,
    STEP,
    AtomicFolder,
    FileDigest,
    Writable,
    base_name,
    complete_steps,
    step_name,
)
from ddiff.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from ddiff.checkpoint.dcp_storage import Manifest, StagedTensors

MANIFEST = "manifest.json"
SLOWEST = timedelta(hours=1)  # time that a rank waits until the slowest rank has written its files


@dataclass(frozen=True)
class Checkpoint:
    """Opened checkpoint of a run after `step` steps. Its tensors are read on demand.

    Attributes:
        state: the saved state as a tree, with tensors on the device "meta" in place of the saved
            tensors.
        manifest: name of a tensor -> dtype, size and location in the files.
        aliases: name of a tied model tensor -> name under which the shared tensor is stored.
        folder: folder of the checkpoint.
    """

    step: int
    state: dict[str, Any]
    manifest: Manifest
    aliases: Mapping[str, str]
    folder: AtomicFolder

    def __repr__(self) -> str:
        return f"Checkpoint(step {self.step}, {self.path})"

    @property
    def path(self) -> str:
        return self.folder.path

    def restore(self, module: nn.Module) -> None:
        """Load the saved tensors of the model into `module`.

        The sharding of `module` may differ from that of the saved model, and either may be
        unsharded. Raises CheckpointError if names or shapes of the tensors differ, or a file is
        damaged.
        """
        from ddiff.checkpoint.dcp_storage import read_tensors

        own = module.state_dict()
        targets: dict[str, Tensor] = {}
        shapes: dict[str, torch.Size] = {}
        for name, place in self._model_places().items():
            shapes[name] = torch.Size(self.manifest[place].size)
            # A tied tensor is read once. `_check_same_model` reports a missing tensor.
            if name not in self.aliases and name in own:
                targets[place] = own[name]
        _check_same_model(_shapes(own), shapes, self.path)
        read_tensors(targets, self.manifest, self.folder)
        for alias, name in self.aliases.items():
            own[alias] = own[name]
        module.load_state_dict(own)

    def read_state(self, like: Iterable[Tensor] = ()) -> dict[str, Any]:
        """Read the saved state, including its tensors.

        A floating-point tensor whose shape equals that of a DTensor in `like` gets the sharding of
        that DTensor. All other tensors are unsharded CPU tensors. Raises CheckpointError if a file
        is damaged.
        """
        from ddiff.checkpoint.dcp_storage import allocate_like, read_tensors

        stored: Manifest = {}
        for name, tensor in self.manifest.items():
            if name.startswith("state."):
                stored[name] = tensor
        tensors = allocate_like(stored, list(like))
        read_tensors(tensors, self.manifest, self.folder)
        return _replace_tensors(self.state, tensors, "state")

    def read_weights(self, *, average: bool = False) -> dict[str, Tensor]:
        """Read the model's tensors as unsharded CPU tensors, by name.

        If `average` is True, the exponential moving average of a tensor, if it has one, replaces
        the tensor. Raises CheckpointError if the checkpoint has no averages, or a file is damaged.
        """
        from ddiff.checkpoint.dcp_storage import read_tensors

        places = self._model_places()
        if average:
            places |= self._average_places()
        for alias, name in self.aliases.items():
            places[alias] = places[name]
        tensors = {place: self.manifest[place].allocate() for place in places.values()}
        read_tensors(tensors, self.manifest, self.folder)
        return {name: tensors[place] for name, place in places.items()}

    def _model_places(self) -> dict[str, str]:
        """Map each name of a model tensor, also of a tied tensor, to its name in the manifest."""
        places: dict[str, str] = {}
        for place in self.manifest:
            if place.startswith("model."):
                places[place.removeprefix("model.")] = place
        for alias, name in self.aliases.items():
            places[alias] = f"model.{name}"
        return places

    def _average_places(self) -> dict[str, str]:
        """Map the name of each weight to the manifest name of its exponential moving average."""
        ema = self.state.get("ema") or {}
        averages = ema.get("weights", {})
        if not averages:
            raise CheckpointError(
                f"{self.path} holds no moving average of the weights: the run was trained without "
                "[train] ema. Use the trained weights instead of their average."
            )
        return {name: f"state.ema.weights.{name}" for name in averages}


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
) -> None:
    """Load `weights` into `module`.

    Raises CheckpointError, which names `source`, if names or shapes of the tensors differ.
    """
    _check_same_model(_shapes(module.state_dict()), _shapes(weights), source)
    module.load_state_dict(weights)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_same_model(
    own: Mapping[str, torch.Size],
    theirs: Mapping[str, torch.Size],
    source: str,
) -> None:
    faults = [f"{name} is missing" for name in own if name not in theirs]
    faults += [f"{name} is not in the model" for name in theirs if name not in own]
    for name, shape in own.items():
        if name in theirs and theirs[name] != shape:
            found = list(theirs[name])
            faults.append(f"{name} has shape {found}, but the model needs {list(shape)}")
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise CheckpointError(
            f"The weights in {source} do not fit the model: "
            f"{'; '.join(faults[:3])}{more}. Build the model from the recipe of the run that saved "
            "the weights."
        )


@final
class Checkpoints:
    """Folder with the newest `keep` checkpoints of a run.

    In a distributed run every rank has its own `Checkpoints` object. Saving is collective: all
    ranks must call the method. Reading is not collective.
    """

    def __init__(self, root: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise ArgumentError(
                "keep must be at least 1, because a run resumes from its newest checkpoint; got "
                f"{keep}."
            )
        self.keep = keep
        self._fs, self.root = fsspec.core.url_to_fs(os.fspath(root))
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._ranks: dist.ProcessGroup | None = None

    # ------------------------------------------------------------------ saving

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> str:
        """Write the checkpoint of `step` and return its path.

        Afterwards only the newest `keep` checkpoints are kept. `state` is a tree of dicts, lists,
        tuples, tensors, numbers, strings and None, which `Checkpoint.read_state` restores. The
        tensors of each key of `state` are written to separate files. Every rank writes its shards
        of DTensors; everything else is written by rank 0.
        """
        path = self.save_async(step, model, state)
        self.wait()
        return path

    def save_async(
        self,
        step: int,
        model: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> str:
        """Copy `model` and `state`, write the checkpoint in a thread, and return the path.

        `save` describes the arguments. The tensors may change after this call. The method first
        waits until the previous save has ended, and raises CheckpointError if the previous save
        failed.
        """
        from ddiff.checkpoint.dcp_storage import deduplicate, stage

        self.wait()
        once, aliases = deduplicate(model)
        tensors = {f"model.{name}": tensor for name, tensor in once.items()}
        encoded = _to_json(state, tensors, "state")  # adds the tensors of the state
        content = {"step": step, "aliases": aliases, "state": encoded}
        tree = json.dumps(content, indent=1)
        staged = stage(tensors, _file_and_key, self._group())
        folder = self._folder(step)
        self._writing = self._executor.submit(self._write, folder, step, staged, tree)
        return folder.path

    def wait(self) -> None:
        """Wait until the last `save_async` has written its files.

        Raises CheckpointError on all ranks if a rank could not write.
        """
        if self._writing is None:
            return
        try:
            self._writing.result()
        finally:
            # After a KeyboardInterrupt here the thread is still writing.
            if self._writing.done():
                self._writing = None

    # ------------------------------------------------------------------ reading

    def steps(self) -> list[int]:
        """Wait for the last save, and list the steps of the complete checkpoints, ascending."""
        self.wait()
        return self._complete()

    def newest(self) -> Checkpoint | None:
        """Open the newest complete checkpoint.

        Return None if there is no complete checkpoint. Raises CheckpointError if a file of the
        checkpoint is missing, truncated or damaged.
        """
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def load(self, step: int) -> Checkpoint:
        """Open the checkpoint of `step`.

        Raises CheckpointError if the checkpoint is incomplete, or one of its files is missing or
        truncated. Damage inside a safetensors file is detected when its tensors are read.
        """
        from ddiff.checkpoint.dcp_storage import manifest_from_json

        complete = self.steps()
        folder = self._folder(step)
        if step not in complete:
            raise CheckpointError(
                f"{self.root} holds no complete checkpoint of step {step}. Choose one of the steps "
                f"{complete}."
                if complete
                else f"{self.root} holds no complete checkpoint. Train the run first."
            )
        folder.check()
        manifest = manifest_from_json(folder.read_file(MANIFEST), f"{folder.path}/{MANIFEST}")
        tensors = {name: stored.allocate(device="meta") for name, stored in manifest.items()}
        try:
            tree = json.loads(folder.read_file(STATE))
            state = _from_json(tree["state"], tensors)
            aliases = dict(tree["aliases"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{folder.path}/{STATE} is damaged: the file cannot be parsed as the state of a "
                f"run ({type(error).__name__}: {error}). {self._remedy(step)}"
            ) from error
        return Checkpoint(step, state, manifest, aliases, folder)

    def read_weights(self, step: int | None = None, *, average: bool = False) -> dict[str, Tensor]:
        """Read the model's tensors from the checkpoint of `step`, or from the newest checkpoint.

        With `average`, the exponential moving averages are read. See `Checkpoint.read_weights`.
        """
        steps = self.steps()
        if not steps and step is None:
            raise CheckpointError(
                f"{self.root} holds no complete checkpoint. Train the run first, or choose another "
                "run."
            )
        if step is None:
            step = steps[-1]
        return self.load(step).read_weights(average=average)

    # ------------------------------------------------------------------ writing, in a thread

    def _group(self) -> dist.ProcessGroup | None:
        """Return a process group of all ranks for checkpoints only; None in a single process.

        The thread that writes a checkpoint communicates at the same time as the training loop, so
        thread and training loop need separate groups.
        """
        if (
            self._ranks is None
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        ):
            self._ranks = dist.new_group(backend="gloo", timeout=SLOWEST)
        return self._ranks

    def _write(
        self,
        folder: AtomicFolder,
        step: int,
        staged: StagedTensors,
        tree: str,
    ) -> None:
        digests: dict[str, FileDigest] = {}

        def create() -> None:
            if staged.manifest is not None:  # on rank 0
                folder.create()

        def finish() -> None:
            if staged.manifest is not None:
                self._finish(folder, step, digests)

        # `_together` waits for all ranks, so that the folder exists before a rank writes a file,
        # and all files are written before the marker.
        self._together(folder, create)
        for written in self._together(folder, lambda: _write_files(folder, staged, tree)):
            digests |= written
        self._together(folder, finish)

    def _together(self, folder: AtomicFolder, act: Callable[[], Any]) -> list[Any]:
        """Call `act` on every rank, wait for all ranks, and return the results of all ranks.

        All ranks must call this method. It raises CheckpointError on all ranks if `act` failed on a
        rank; the message names `folder`.
        """
        failure: str | None = None
        result: Any = None
        try:
            result = act()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        outcomes: list[Any] = [(failure, result)]
        if self._ranks is not None:
            outcomes = [None] * dist.get_world_size(self._ranks)
            dist.all_gather_object(outcomes, (failure, result), group=self._ranks)
        for rank, (text, _) in enumerate(outcomes):
            if text is not None:
                raise CheckpointError(
                    f"{folder.path} could not be written ({text} on rank {rank}), so training "
                    "ended. Free disk space or make the folder writable; then the same command "
                    "resumes from the previous checkpoint."
                )
        return [result for _, result in outcomes]

    def _finish(
        self,
        folder: AtomicFolder,
        step: int,
        digests: Mapping[str, FileDigest],
    ) -> None:
        """Mark the checkpoint in `folder` as complete, then remove old and incomplete checkpoints.

        `digests`: size and SHA-256 of each file of the checkpoint.
        """
        folder.mark_complete(step, digests)
        kept = {step_name(step) for step in self._complete()[-self.keep :]}
        for name in self._folder_names():
            if name not in kept and STEP.fullmatch(name):
                self._folder(int(name.removeprefix("step_"))).remove()

    # ------------------------------------------------------------------ folders

    def _complete(self) -> list[int]:
        return complete_steps(self._fs, self.root)

    def _folder(self, step: int) -> AtomicFolder:
        path = f"{self.root}/{step_name(step)}"
        return AtomicFolder(self._fs, path, lambda: self._remedy(step))

    def _remedy(self, step: int) -> str:
        earlier = [other for other in self._complete() if other < step]
        folder = f"{self.root}/{step_name(step)}"
        if earlier:
            return (
                f"Delete the directory {folder} to resume from step {earlier[-1]}, or start over "
                "with `ddiff run` and --fresh."
            )
        return (
            f"No earlier checkpoint is left: restore {folder} from a copy, or start over with "
            "`ddiff run` and --fresh."
        )

    def _folder_names(self) -> list[str]:
        if not self._fs.isdir(self.root):
            return []
        self._fs.invalidate_cache(self.root)
        return [base_name(path) for path in self._fs.ls(self.root, detail=False)]


def _file_and_key(place: str) -> tuple[str, str]:
    """Split a tensor name such as "state.optimizer.0.step" into (file, key).

    The first component after "state." is the file, and the rest is the key.
    """
    entry, _, key = place.removeprefix("state.").partition(".")
    return entry, key or entry


def _write_files(
    folder: AtomicFolder,
    staged: StagedTensors,
    tree: str,
) -> dict[str, FileDigest]:
    """Write the checkpoint files of this rank, and return the digests by file name.

    `staged` contains the tensors of this rank. `tree` is the JSON text of all other values of the
    state, which only rank 0 writes.
    """
    from ddiff.checkpoint.dcp_storage import manifest_to_json, write_tensors

    digests: dict[str, FileDigest] = {}
    for name, tensors in staged.files.items():

        def fill(file: Writable, tensors: Mapping[str, Tensor] = tensors) -> None:
            write_tensors(file, tensors)

        digests[name] = folder.write_file(name, fill)
    if staged.manifest is not None:
        manifest = manifest_to_json(staged.manifest).encode()
        state = tree.encode()
        digests[MANIFEST] = folder.write_file(MANIFEST, lambda file: file.write(manifest))
        digests[STATE] = folder.write_file(STATE, lambda file: file.write(state))
    return digests


# ---------------------------------------------------------------------- the state as JSON


def _to_json(
    tree: Any,
    tensors: dict[str, Tensor],
    place: str,
) -> Any:
    """Encode a tree as JSON values, which `_from_json` decodes.

    `place` is the path of the tree within the whole state, such as "state.optimizer". Each tensor
    is added to `tensors` under its path. The JSON contains this path in place of the tensor.
    """
    if isinstance(tree, torch.Tensor):
        tensors[place] = tree
        return {"$tensor": place}
    if isinstance(tree, Mapping):
        items: list[tuple[Any, Any]] = []
        for key, value in tree.items():
            items.append((key, _to_json(value, tensors, f"{place}.{key}")))
        # JSON keys must be strings, and keys that begin with "$" are reserved for this encoding.
        is_plain = all(isinstance(key, str) and not key.startswith("$") for key in tree)
        return dict(items) if is_plain else {"$items": items}
    if isinstance(tree, list | tuple):
        values: list[Any] = []
        for number, value in enumerate(tree):
            values.append(_to_json(value, tensors, f"{place}.{number}"))
        return values if isinstance(tree, list) else {"$tuple": values}
    if tree is None or isinstance(tree, str | bool | int | float):
        return tree
    raise CheckpointError(
        f"{place} is a {type(tree).__name__}, which a checkpoint cannot store: a state may contain "
        "only dicts, lists, tuples, tensors, numbers, strings and None. Change the state_dict of "
        f"the optimizer or plugin that returned {place}."
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


def _replace_tensors(
    tree: Any,
    tensors: Mapping[str, Tensor],
    place: str,
) -> Any:
    """Copy a tree, with each tensor replaced by the entry of `tensors` for its path.

    `place` is the path of the tree within the whole state, such as "state.optimizer".
    """
    if isinstance(tree, torch.Tensor):
        return tensors[place]
    if isinstance(tree, dict):
        replaced: dict[Any, Any] = {}
        for key, value in tree.items():
            replaced[key] = _replace_tensors(value, tensors, f"{place}.{key}")
        return replaced
    if isinstance(tree, list | tuple):
        values: list[Any] = []
        for number, value in enumerate(tree):
            values.append(_replace_tensors(value, tensors, f"{place}.{number}"))
        return type(tree)(values)
    return tree

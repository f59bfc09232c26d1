"""Tensors of a checkpoint in files: safetensors and a manifest, as storage of torch.distributed.checkpoint.

torch plans who writes which box of which tensor and who reads which; DTensors go in shards and come in any others.
A plan is followed in two parts: `stage` copies what this rank shall write, at once, and `write_tensors` writes the copies,
whenever that is. To import this module takes torch a second, so `checkpoint.py` does it when there is something to save or
load.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ddiff.checkpoint.atomic_folder import Folder, Sink
from ddiff.errors import CheckpointError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}

# Names a file of the folder, and nothing outside of it.
_FILE = re.compile(r"[^./\\\0][^/\\\0]*\.safetensors")


class Chunk(NamedTuple):
    """A box of a tensor and where it stands: under `key` in a safetensors file, from byte `begin` of that file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str
    begin: int


class Stored(NamedTuple):
    """A tensor on disk, in boxes that fill it."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def empty(self, **options: Any) -> Tensor:
        return torch.empty(self.size, dtype=self.dtype, **options)


Manifest = dict[str, Stored]


def manifest_to_json(manifest: Manifest) -> str:
    tensors = {
        name: {"dtype": CODES[dtype], "size": size, "chunks": [chunk._asdict() for chunk in chunks]}
        for name, (dtype, size, chunks) in sorted(manifest.items())
    }
    return json.dumps({"tensors": tensors})


def manifest_from_json(text: str | bytes, path: str = "the manifest") -> Manifest:
    """Read a manifest.

    CheckpointError, naming it as `path`, unless it says which bytes of which file of its folder each tensor is made of.
    """
    try:
        return {
            name: _stored(name, entry, path) for name, entry in json.loads(text)["tensors"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _wrong_manifest(
            path, f"it cannot be read as one ({type(error).__name__}: {error})"
        ) from error


def _stored(name: str, entry: Mapping[str, Any], path: str) -> Stored:
    dtype, size = DTYPES[entry["dtype"]], _whole_numbers(entry["size"])
    chunks = []
    for written in entry["chunks"]:
        if set(written) != set(Chunk._fields):
            raise _wrong_manifest(path, f"a part of {name} has the keys {sorted(written)}")
        file, offsets, sizes = (
            written["file"],
            _whole_numbers(written["offsets"]),
            _whole_numbers(written["sizes"]),
        )
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise _wrong_manifest(
                path, f"{name} lies in {file!r}, which is no safetensors file of its folder"
            )
        if not len(offsets) == len(sizes) == len(size):
            raise _wrong_manifest(path, f"a part of {name} has other dimensions than {list(size)}")
        if any(begin + length > whole for begin, length, whole in zip(offsets, sizes, size)):
            raise _wrong_manifest(path, f"a part of {name} lies outside of {list(size)}")
        (begin,) = _whole_numbers([written["begin"]])
        chunks.append(Chunk(offsets, sizes, file, str(written["key"]), begin))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise _wrong_manifest(path, f"the parts of {name} do not fill {list(size)}")
    return Stored(dtype, size, tuple(chunks))


def _whole_numbers(values: Sequence[Any]) -> tuple[int, ...]:
    if any(not isinstance(value, int) or isinstance(value, bool) or value < 0 for value in values):
        raise ValueError(f"{values!r} must be whole numbers from 0")
    return tuple(values)


def _wrong_manifest(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no manifest of a checkpoint that ddiff wrote: {what}. Nothing was read by it. Restore the checkpoint "
        "from a copy, delete its directory to resume from an earlier one, or start anew with --fresh."
    )


def write_tensors(
    sink: Sink, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file of contiguous CPU tensors, one after the other and none copied."""
    header = _header(tensors, metadata)
    sink.write(len(header).to_bytes(8, "little") + header)
    for name in _in_order(tensors):
        sink.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide numbers first, so that every tensor starts at a multiple of its width, as readers of mapped memory like it."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name in _in_order(tensors):
        end = begin + tensors[name].nbytes
        entry = {
            "dtype": CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
        entries[name], begin = entry, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _begins(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """name -> the byte of the file at which its data begin."""
    begins, begin = {}, 8 + len(_header(tensors))
    for name in _in_order(tensors):
        begins[name] = begin
        begin += tensors[name].nbytes
    return begins


# ---------------------------------------------------------------------------------------------------------------- saving


def distinct(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without repetition, and alias -> name for tied ones. On all ranks the same, empty shards included."""
    names: dict[tuple[Any, ...], str] = {}
    once: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # The storage itself and not its address: all empty ones have the address 0.
        place = (
            part.untyped_storage()._cdata,
            part.storage_offset(),
            tensor.shape,
            part.stride(),
            tensor.dtype,
        )
        if tensor.numel() and place in names:
            aliases[name] = names[place]
            continue
        names[place] = name
        once[name] = tensor
    return once, aliases


@dataclass
class Staged:
    """What this rank shall write, copied: file -> key -> tensor; the manifest of all ranks, on rank 0 alone."""

    files: dict[str, dict[str, Tensor]]
    manifest: Manifest | None = None


def stage(
    tensors: Mapping[str, Tensor],
    place: Callable[[str], tuple[str, str]],
    group: dist.ProcessGroup | None,
) -> Staged:
    """Plan with the ranks of `group` (None: alone) who writes what of `tensors`, and copy this rank's part.

    Collective. A DTensor is written in its shards, any other tensor as rank 0 has it. `place`: name -> (the file's name
    without its ending, key).
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise CheckpointError(
                f"{name} has dtype {tensor.dtype}, which safetensors does not store. Keep it as real numbers in the model "
                "or state_dict that owns it."
            )
    writer = _StagingWriter(place, dist.get_rank(group) if group else 0)
    planner = dcp.DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    with _in_its_own_words(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a process is alone
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )
    return writer.staged


@final
class _StagingWriter(StorageWriter):
    """Follows a plan by copying; the copies are written later."""

    def __init__(self, place: Callable[[str], tuple[str, str]], rank: int) -> None:
        self._place, self._rank = place, rank
        self.staged = Staged({})

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """One writer stages one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # Of a tensor with fewer rows than ranks some have an empty shard.
        return SavePlan([item for item in plan.items if not _is_empty_shard(item)])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        places = {item.index: self._where(item) for item in plan.items}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            file, key = places[item.index]
            self.staged.files.setdefault(file, {})[key] = copied(tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begins = {file: _begins(tensors) for file, tensors in self.staged.files.items()}
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [
                WriteResult(index, 0, (file, key, begins[file][key]))
                for index, (file, key) in places.items()
            ]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {
            (r.index.fqn, tuple(r.index.offset or ())): r.storage_data
            for rank in results
            for r in rank
        }
        self.staged.manifest = {
            name: Stored(
                tensor.properties.dtype,
                tuple(tensor.size),
                tuple(
                    Chunk(
                        tuple(chunk.offsets), tuple(chunk.sizes), *where[name, tuple(chunk.offsets)]
                    )
                    for chunk in tensor.chunks
                ),
            )
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # it is given its places

    def _where(self, item: WriteItem) -> tuple[str, str]:
        """(file, key) of a box: whole tensors in the one file, this rank's shards in its own."""
        file, key = self._place(item.index.fqn)
        if item.type != WriteItemType.SHARD:
            return f"{file}.safetensors", key
        offsets = ",".join(map(str, item.index.offset or ()))
        return f"{file}.rank_{self._rank:05d}.safetensors", f"{key}@{offsets}"


def _is_empty_shard(item: WriteItem) -> bool:
    return (
        item.type == WriteItemType.SHARD
        and item.tensor_data is not None
        and 0 in item.tensor_data.chunk.sizes
    )


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, from a GPU under way until the device is synchronised."""
    # Pinned memory is kept by torch's allocator, so that only the first save pays for it.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


# --------------------------------------------------------------------------------------------------------------- loading


def fill(targets: Mapping[str, Tensor], manifest: Manifest, folder: Folder) -> None:
    """Read the stored tensors of these names into the targets, of the same sizes; a rank reads what its shards need."""
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _in_its_own_words(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        # Every rank reads for itself: who needs which box follows from the manifest, so there is nothing to agree upon.
        dcp.load(
            dict(targets), storage_reader=_Reader(manifest, folder), planner=planner, no_dist=True
        )


@final
class _Reader(StorageReader):
    def __init__(self, manifest: Manifest, folder: Folder) -> None:
        self._folder = folder
        self._chunks = {
            (name, chunk.offsets): chunk
            for name, stored in manifest.items()
            for chunk in stored.chunks
        }
        self._metadata = Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=dtype),
                    torch.Size(size),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                        for chunk in chunks
                    ],
                )
                for name, (dtype, size, chunks) in manifest.items()
            }
        )
        self._dtypes = {name: stored.dtype for name, stored in manifest.items()}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """One reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[str, dict[int, list[ReadItem]]] = {}
        for item in plan.items:
            chunk = self._chunk(item)
            wanted.setdefault(chunk.file, {}).setdefault(chunk.begin, []).append(item)
        for file, at in sorted(wanted.items()):
            # Of an empty tensor nothing is read, and it may begin where the next one does.
            items = [
                [item for item in at[begin] if math.prod(self._chunk(item).sizes)]
                for begin in sorted(at)
            ]
            items = [group for group in items if group]
            places = [(self._chunk(group[0]).begin, self._bytes(group[0])) for group in items]
            # strict, so that the last chunk is followed by the check of the file
            for group, data in zip(items, self._folder.chunks(file, places), strict=True):
                for item in group:
                    self._copy(item, data, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def _chunk(self, item: ReadItem) -> Chunk:
        return self._chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]

    def _bytes(self, item: ReadItem) -> int:
        return math.prod(self._chunk(item).sizes) * self._dtypes[item.storage_index.fqn].itemsize

    def _copy(self, item: ReadItem, data: bytearray, planner: LoadPlanner) -> None:
        box = torch.frombuffer(data, dtype=self._dtypes[item.storage_index.fqn]).reshape(
            self._chunk(item).sizes
        )
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
            box = box.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(box)
        planner.commit_tensor(item, target)


def targets_like(stored: Mapping[str, Stored], like: Sequence[Tensor]) -> dict[str, Tensor]:
    """Room for stored tensors: of floats that have the size of a DTensor in `like`, in shards as that one; else plain."""
    sharded = {tuple(tensor.shape): tensor for tensor in like if isinstance(tensor, DTensor)}
    return {
        name: torch.empty_like(sharded[tensor.size], dtype=tensor.dtype, requires_grad=False)
        if tensor.dtype.is_floating_point and tensor.size in sharded
        else tensor.empty()
        for name, tensor in stored.items()
    }


@contextmanager
def _in_its_own_words() -> Iterator[None]:
    """What went wrong on some rank is raised as it was, and not as torch's account of all ranks."""
    try:
        yield
    except dcp.CheckpointException as error:
        failure, _ = error.failures[min(error.failures)]
    else:
        return
    raise failure

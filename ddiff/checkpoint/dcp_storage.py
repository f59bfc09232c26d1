"""Storage of torch.distributed.checkpoint (DCP): safetensors files and a manifest.

DCP plans which rank writes which box of which tensor, and which rank reads which box. DTensors are
written in shards and read in any other shards. A plan is followed in two parts: `stage` copies at
once what this rank has to write, and `write_tensors` writes the copies later, while training
continues. Importing this module takes torch a second, so `checkpoints.py` imports it when something
is saved or loaded.

Why not DCP's own HuggingFaceStorageWriter (tried with torch 2.13)? It passes on correctness: with
two ranks it restored bfloat16, int64, bool, 0-dim and empty tensors bit for bit on one. But it
builds each file in memory before writing: 400 MB of tensors took 763 MB more, or 1126 MB with
`async_save`, against 363 MB here, and the SHA-256 of the marker needs a second pass over the files.
It also names the files by rank and number, not by entry of the state. For the same reason whole
files are not written by `safetensors.torch.save`, which also refuses tied tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from ddiff.checkpoint.atomic_folder import AtomicFolder, Writable
from ddiff.errors import CheckpointError

# dtype -> its name in safetensors files
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

# A file of the folder, and nothing outside of it.
_FILE = re.compile(r"[^./\\\0][^/\\\0]*\.safetensors")


# ------------------------------------------------------------------------------------ manifest


class Chunk(NamedTuple):
    """A box of a tensor, stored under `key` in a safetensors file, from its byte `begin`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str
    begin: int


class StoredTensor(NamedTuple):
    """A tensor on disk, in chunks that fill it."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def allocate(self, **options: Any) -> Tensor:
        """Make an uninitialized tensor of this dtype and size."""
        return torch.empty(self.size, dtype=self.dtype, **options)


Manifest = dict[str, StoredTensor]


def manifest_to_json(manifest: Manifest) -> str:
    """Write a manifest as JSON."""
    tensors: dict[str, Any] = {}
    for name, stored in sorted(manifest.items()):
        tensors[name] = {
            "dtype": CODES[stored.dtype],
            "size": stored.size,
            "chunks": [chunk._asdict() for chunk in stored.chunks],
        }
    return json.dumps({"tensors": tensors})


def manifest_from_json(text: str | bytes, path: str = "the manifest") -> Manifest:
    """Read a manifest, which is called `path` in errors.

    CheckpointError unless it says of which bytes of which files of its folder a tensor consists.
    """
    try:
        entries = json.loads(text)["tensors"].items()
        return {name: _parse_tensor(name, entry, path) for name, entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _wrong_manifest(
            path, f"it cannot be read as one ({type(error).__name__}: {error})"
        ) from error


def _parse_tensor(
    name: str,
    entry: Mapping[str, Any],
    path: str,
) -> StoredTensor:
    dtype = DTYPES[entry["dtype"]]
    size = _parse_sizes(entry["size"])
    chunks = tuple(_parse_chunk(name, size, chunk, path) for chunk in entry["chunks"])
    num_stored = sum(math.prod(chunk.sizes) for chunk in chunks)
    if num_stored != math.prod(size):
        raise _wrong_manifest(path, f"the parts of {name} do not fill {list(size)}")
    return StoredTensor(dtype, size, chunks)


def _parse_chunk(
    name: str,
    size: tuple[int, ...],
    entry: Mapping[str, Any],
    path: str,
) -> Chunk:
    if set(entry) != set(Chunk._fields):
        raise _wrong_manifest(path, f"a part of {name} has the keys {sorted(entry)}")
    file = entry["file"]
    offsets = _parse_sizes(entry["offsets"])
    sizes = _parse_sizes(entry["sizes"])
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise _wrong_manifest(
            path, f"{name} lies in {file!r}, which is no safetensors file of its folder"
        )
    if not len(offsets) == len(sizes) == len(size):
        raise _wrong_manifest(path, f"a part of {name} has other dimensions than {list(size)}")
    for offset, length, whole in zip(offsets, sizes, size):
        if offset + length > whole:
            raise _wrong_manifest(path, f"a part of {name} lies outside of {list(size)}")
    (begin,) = _parse_sizes([entry["begin"]])
    return Chunk(offsets, sizes, file, str(entry["key"]), begin)


def _parse_sizes(values: Sequence[Any]) -> tuple[int, ...]:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{values!r} must be whole numbers from 0")
    return tuple(values)


def _wrong_manifest(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no manifest of a checkpoint that ddiff wrote: {what}. Nothing was read by it. "
        "Restore the checkpoint from a copy, delete its directory to resume from an earlier one, "
        "or start over with --fresh."
    )


# ------------------------------------------------------------------------------------ files


def write_tensors(
    file: Writable,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write contiguous CPU tensors as a safetensors file, one by one, without a copy."""
    header = _build_header(tensors, metadata)
    file.write(len(header).to_bytes(8, "little") + header)
    for name in _file_order(tensors):
        # Over uint8, since NumPy has no bfloat16; reshape(-1) because a 0-dim tensor has no view.
        flat = tensors[name].reshape(-1).view(torch.uint8)
        file.write(flat.numpy().data)


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Order tensors by descending item size.

    Each then begins at a multiple of its item size, which readers of memory-mapped files need.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _build_header(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name in _file_order(tensors):
        end = begin + tensors[name].nbytes
        entries[name] = {
            "dtype": CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8 bytes
    return text + padding


def _begin_of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return by name the byte of the file at which the data of each tensor begin."""
    begins: dict[str, int] = {}
    begin = 8 + len(_build_header(tensors))
    for name in _file_order(tensors):
        begins[name] = begin
        begin += tensors[name].nbytes
    return begins


# ------------------------------------------------------------------------------------ saving


def deduplicate(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Drop tied tensors; return the others, and alias -> name for the dropped ones.

    The result is the same on all ranks, also for tensors of which a rank has an empty shard.
    """
    names: dict[tuple[Any, ...], str] = {}
    once: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # The storage object, not its address: all empty storages have the address 0.
        storage = local.untyped_storage()._cdata
        layout = (local.storage_offset(), tensor.shape, local.stride())
        key = (storage, *layout, tensor.dtype)
        if tensor.numel() and key in names:
            aliases[name] = names[key]
            continue
        names[key] = name
        once[name] = tensor
    return once, aliases


@dataclass
class StagedTensors:
    """Copies of what this rank has to write: file -> key -> tensor.

    `manifest` covers the files of all ranks; only rank 0 has it.
    """

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    manifest: Manifest | None = None


def stage(
    tensors: Mapping[str, Tensor],
    locate: Callable[[str], tuple[str, str]],
    group: dist.ProcessGroup | None,
) -> StagedTensors:
    """Plan with the ranks of `group` which of them writes what, and copy this rank's part.

    Collective; `group` is None in a single process. A DTensor is written in its shards, any other
    tensor as rank 0 has it. `locate(name)` returns (name of the file without its ending, key).
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise CheckpointError(
                f"{name} has dtype {tensor.dtype}, which safetensors does not store. Keep it as "
                "real numbers in the model or state_dict that owns it."
            )
    writer = _StagingWriter(locate, dist.get_rank(group) if group else 0)
    planner = dcp.DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    with _original_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a single process
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
    """Follow a save plan by copying; the copies are written later."""

    def __init__(self, locate: Callable[[str], tuple[str, str]], rank: int) -> None:
        self._locate = locate
        self._rank = rank
        self.staged = StagedTensors()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass  # one writer stages one checkpoint

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # A tensor with fewer rows than ranks has empty shards, which are not stored.
        return SavePlan([item for item in plan.items if not _is_empty_shard(item)])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        places = {item.index: self._place(item) for item in plan.items}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            file, key = places[item.index]
            self.staged.files.setdefault(file, {})[key] = copy_to_cpu(tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are under way; training may change the originals
        begins: dict[str, dict[str, int]] = {}
        for file, tensors in self.staged.files.items():
            begins[file] = _begin_of_tensors(tensors)
        results: list[WriteResult] = []
        for index, (file, key) in places.items():
            results.append(WriteResult(index, 0, (file, key, begins[file][key])))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        # (name, offsets) -> (file, key, begin)
        places: dict[tuple[str, tuple[int, ...]], Any] = {}
        for of_rank in results:
            for result in of_rank:
                offsets = tuple(result.index.offset or ())
                places[result.index.fqn, offsets] = result.storage_data
        manifest: Manifest = {}
        for name, tensor in metadata.state_dict_metadata.items():
            if not isinstance(tensor, TensorStorageMetadata):
                continue
            chunks = []
            for chunk in tensor.chunks:
                offsets = tuple(chunk.offsets)
                file, key, begin = places[name, offsets]
                chunks.append(Chunk(offsets, tuple(chunk.sizes), file, key, begin))
            manifest[name] = StoredTensor(
                tensor.properties.dtype, tuple(tensor.size), tuple(chunks)
            )
        self.staged.manifest = manifest

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # files are located by `locate`

    def _place(self, item: WriteItem) -> tuple[str, str]:
        """Return (file, key): whole tensors share a file, shards are in a file of their rank."""
        file, key = self._locate(item.index.fqn)
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


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """Make a contiguous CPU copy; from a GPU it is complete only after a synchronization."""
    # torch's allocator keeps pinned memory, so that only the first save allocates it.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


# ------------------------------------------------------------------------------------ loading


def read_tensors(
    targets: Mapping[str, Tensor],
    manifest: Manifest,
    folder: AtomicFolder,
) -> None:
    """Read stored tensors into targets of the same names and sizes.

    Each rank reads what its shards need.
    """
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = _ManifestReader(manifest, folder)
    with _original_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a single process
        # The manifest determines what each rank needs, so the ranks have nothing to agree on.
        dcp.load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)


@final
class _ManifestReader(StorageReader):
    """Follow a load plan by reading the files that a manifest names."""

    def __init__(self, manifest: Manifest, folder: AtomicFolder) -> None:
        self._folder = folder
        self._chunks: dict[tuple[str, tuple[int, ...]], Chunk] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        tensors: dict[str, Any] = {}
        for name, stored in manifest.items():
            self._dtypes[name] = stored.dtype
            boxes = []
            for chunk in stored.chunks:
                self._chunks[name, chunk.offsets] = chunk
                offsets = torch.Size(chunk.offsets)
                sizes = torch.Size(chunk.sizes)
                boxes.append(ChunkStorageMetadata(offsets, sizes))
            properties = TensorProperties(dtype=stored.dtype)
            tensors[name] = TensorStorageMetadata(properties, torch.Size(stored.size), boxes)
        self._metadata = Metadata(tensors)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass  # one reader reads one checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        # file -> begin of a chunk -> the parts of it that are needed
        wanted: dict[str, dict[int, list[ReadItem]]] = {}
        for item in plan.items:
            chunk = self._chunk(item)
            by_begin = wanted.setdefault(chunk.file, {})
            by_begin.setdefault(chunk.begin, []).append(item)
        for file, by_begin in sorted(wanted.items()):
            self._read_file(file, by_begin, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(
        self,
        file: str,
        by_begin: Mapping[int, Sequence[ReadItem]],
        planner: LoadPlanner,
    ) -> None:
        groups = []
        ranges = []
        for begin, items in sorted(by_begin.items()):
            # Nothing is read of an empty tensor, which may begin where the next tensor does.
            filled = [item for item in items if self._num_bytes(item)]
            if filled:
                groups.append(filled)
                ranges.append((begin, self._num_bytes(filled[0])))
        # strict: the last range must be consumed completely, since the check of the file follows it
        for group, data in zip(groups, self._folder.read_ranges(file, ranges), strict=True):
            for item in group:
                self._copy(item, data, planner)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def _chunk(self, item: ReadItem) -> Chunk:
        index = item.storage_index
        return self._chunks[index.fqn, tuple(index.offset or ())]

    def _num_bytes(self, item: ReadItem) -> int:
        dtype = self._dtypes[item.storage_index.fqn]
        return math.prod(self._chunk(item).sizes) * dtype.itemsize

    def _copy(
        self,
        item: ReadItem,
        data: bytearray,
        planner: LoadPlanner,
    ) -> None:
        dtype = self._dtypes[item.storage_index.fqn]
        box = torch.frombuffer(data, dtype=dtype).reshape(self._chunk(item).sizes)
        # A shard may need only a part of the box.
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
            box = box.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(box)
        planner.commit_tensor(item, target)


def allocate_like(stored: Mapping[str, StoredTensor], like: Sequence[Tensor]) -> dict[str, Tensor]:
    """Allocate targets for stored tensors.

    A floating-point tensor with the size of a DTensor in `like` is sharded as that one; any other
    is a plain CPU tensor.
    """
    sharded: dict[tuple[int, ...], Tensor] = {}
    for tensor in like:
        if isinstance(tensor, DTensor):
            sharded[tuple(tensor.shape)] = tensor
    targets: dict[str, Tensor] = {}
    for name, saved in stored.items():
        if saved.dtype.is_floating_point and saved.size in sharded:
            pattern = sharded[saved.size]
            targets[name] = torch.empty_like(pattern, dtype=saved.dtype, requires_grad=False)
        else:
            targets[name] = saved.allocate()
    return targets


@contextmanager
def _original_errors() -> Iterator[None]:
    """Raise the error of a rank as it was, in place of DCP's summary of all ranks."""
    try:
        yield
    except dcp.CheckpointException as error:
        failure, _ = error.failures[min(error.failures)]
    else:
        return
    raise failure

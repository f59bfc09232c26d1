"""Storage of torch.distributed.checkpoint (DCP) in safetensors files and a manifest.

DTensors are written as shards, and can be read with another sharding. DCP plans which rank writes
and reads which box (hyperrectangle) of each tensor. Saving has two steps: `stage` copies the
tensors that this rank has to write, and `write_tensors` writes the copies later, while training
continues. Importing this module takes about a second, so `checkpoints.py` imports it only when a
checkpoint is saved or loaded.

Two existing writers are not used:

- HuggingFaceStorageWriter of DCP (tested with torch 2.13) builds each file in memory. For 400 MB of
  tensors it needs 763 MB of additional memory, or 1126 MB with `async_save`; this module needs 363
  MB. The SHA-256 of its files would need a second pass over the files, and its file names contain
  rank and number instead of the key of the state.
- `safetensors.torch.save` also builds a file in memory, and refuses tied tensors.
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

# The pattern allows no slashes, so that a manifest cannot name a file outside its folder.
_FILE = re.compile(r"[^./\\\0][^/\\\0]*\.safetensors")


# ------------------------------------------------------------------------------------ manifest


class Chunk(NamedTuple):
    """Box of a tensor that is stored under `key` in a safetensors file.

    The box begins at the index `offsets` of the tensor and has the shape `sizes`. Its data begin at
    byte `begin` of the file.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str
    begin: int


class StoredTensor(NamedTuple):
    """Tensor on disk, stored in chunks that together contain all its elements."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def allocate(self, **options: Any) -> Tensor:
        """Allocate an uninitialized tensor with the dtype and size of the stored tensor.

        `options` are further arguments of `torch.empty`, such as the device.
        """
        return torch.empty(self.size, dtype=self.dtype, **options)


Manifest = dict[str, StoredTensor]


def manifest_to_json(manifest: Manifest) -> str:
    """Encode a manifest as JSON."""
    tensors: dict[str, Any] = {}
    for name, stored in sorted(manifest.items()):
        tensors[name] = {
            "dtype": CODES[stored.dtype],
            "size": stored.size,
            "chunks": [chunk._asdict() for chunk in stored.chunks],
        }
    return json.dumps({"tensors": tensors})


def manifest_from_json(text: str | bytes, path: str = "the manifest") -> Manifest:
    """Parse the JSON text of a manifest.

    `path` is the name of the manifest file in error messages. Raises CheckpointError unless the
    chunks of each tensor have valid file names, positions and sizes and together cover the tensor.
    """
    try:
        entries = json.loads(text)["tensors"].items()
        return {name: _parse_tensor(name, entry, path) for name, entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _wrong_manifest(
            path, f"the JSON cannot be parsed ({type(error).__name__}: {error})"
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
        raise _wrong_manifest(path, f"the chunks of {name} do not cover its shape {list(size)}")
    return StoredTensor(dtype, size, chunks)


def _parse_chunk(
    name: str,
    size: tuple[int, ...],
    entry: Mapping[str, Any],
    path: str,
) -> Chunk:
    if set(entry) != set(Chunk._fields):
        raise _wrong_manifest(path, f"a chunk of {name} has the keys {sorted(entry)}")
    file = entry["file"]
    offsets = _parse_sizes(entry["offsets"])
    sizes = _parse_sizes(entry["sizes"])
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise _wrong_manifest(
            path, f"{name} is stored in {file!r}, which is not a safetensors file of this folder"
        )
    if not len(offsets) == len(sizes) == len(size):
        raise _wrong_manifest(
            path, f"a chunk of {name} has another number of dimensions than its shape {list(size)}"
        )
    for offset, length, whole in zip(offsets, sizes, size):
        if offset + length > whole:
            raise _wrong_manifest(path, f"a chunk of {name} is outside its shape {list(size)}")
    (begin,) = _parse_sizes([entry["begin"]])
    return Chunk(offsets, sizes, file, str(entry["key"]), begin)


def _parse_sizes(values: Sequence[Any]) -> tuple[int, ...]:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{values!r} must contain only integers of at least 0")
    return tuple(values)


def _wrong_manifest(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a manifest that ddiff wrote: {what}. No tensor was read. Restore the "
        "checkpoint from a copy, delete its directory to resume from an earlier checkpoint, or "
        "start over with `ddiff run` and --fresh."
    )


# ------------------------------------------------------------------------------------ files


def write_tensors(
    file: Writable,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write contiguous CPU tensors to a safetensors file.

    The tensors are written one by one, without a copy in memory. `metadata`: texts by name that are
    stored in the header of the file.
    """
    header = _build_header(tensors, metadata)
    file.write(len(header).to_bytes(8, "little") + header)
    for name in _file_order(tensors):
        # View as uint8, since NumPy has no bfloat16. A 0-dim tensor cannot be viewed as another
        # dtype, hence reshape(-1).
        flat = tensors[name].reshape(-1).view(torch.uint8)
        file.write(flat.numpy().data)


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors in the order of descending item size.

    In this order each tensor begins at a multiple of its item size, which is necessary to read the
    tensors from a memory-mapped file.
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
    """Map the name of each tensor to the byte of the file at which its data begin."""
    begins: dict[str, int] = {}
    begin = 8 + len(_build_header(tensors))
    for name in _file_order(tensors):
        begins[name] = begin
        begin += tensors[name].nbytes
    return begins


# ------------------------------------------------------------------------------------ saving


def deduplicate(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep only one tensor of each group of tied tensors.

    Return two dictionaries: the kept tensors by name, and the name of the kept tensor for the name
    (alias) of each removed tensor. The result is the same on all ranks, even if a rank has an empty
    shard of a tensor.
    """
    names: dict[tuple[Any, ...], str] = {}
    once: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # Tensors are compared by storage object and not by data address, because all empty storages
        # have the address 0.
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
    """Copies of the tensors that this rank has to write.

    `files` maps the name of a file to its tensors by key. `manifest` describes the files of all
    ranks, and is None on every rank except rank 0.
    """

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    manifest: Manifest | None = None


def stage(
    tensors: Mapping[str, Tensor],
    locate: Callable[[str], tuple[str, str]],
    group: dist.ProcessGroup | None,
) -> StagedTensors:
    """Plan which rank writes which tensors, and copy the tensors that this rank has to write.

    All ranks of `group` must call this function; `group` is None in a single process. Every rank
    writes its shards of DTensors, and rank 0 writes all other tensors. `locate(name)` returns (name
    of the file without its extension, key of the tensor in the file).
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise CheckpointError(
                f"{name} has dtype {tensor.dtype}, which safetensors does not support. Store "
                f"{name} as real numbers in the model or state_dict."
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
    """DCP storage writer that copies the tensors of a save plan instead of writing them."""

    def __init__(self, locate: Callable[[str], tuple[str, str]], rank: int) -> None:
        self._locate = locate
        self._rank = rank
        self.staged = StagedTensors()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass  # every writer is used for only one checkpoint

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
            # The copies must be complete before training changes the tensors.
            torch.cuda.synchronize()
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
        """Return the file name and the key of a tensor or shard.

        Shards are stored in a separate file per rank.
        """
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
    """Make a contiguous CPU copy of a tensor.

    The copy of a GPU tensor is complete only after `torch.cuda.synchronize()`.
    """
    # torch caches pinned memory, so that only the first save allocates memory.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


# ------------------------------------------------------------------------------------ loading


def read_tensors(
    targets: Mapping[str, Tensor],
    manifest: Manifest,
    folder: AtomicFolder,
) -> None:
    """Read stored tensors into the tensors `targets` with the same names and sizes.

    Each rank reads only the files that contain data of the rank's shards.
    """
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = _ManifestReader(manifest, folder)
    with _original_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a single process
        # With no_dist, each rank plans its reads from the manifest, without communication.
        dcp.load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)


@final
class _ManifestReader(StorageReader):
    """DCP storage reader for the files that a manifest lists."""

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
        pass  # every reader is used for only one checkpoint

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
        # file -> begin of a chunk -> read items of this chunk
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
            # Empty tensors are skipped: they begin at the same byte as the next tensor.
            filled = [item for item in items if self._num_bytes(item)]
            if filled:
                groups.append(filled)
                ranges.append((begin, self._num_bytes(filled[0])))
        # strict: exhaust the generator, because it checks the SHA-256 after the last range.
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
        # A shard of the loaded tensor may need only a part of the stored box.
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
            box = box.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(box)
        planner.commit_tensor(item, target)


def allocate_like(stored: Mapping[str, StoredTensor], like: Sequence[Tensor]) -> dict[str, Tensor]:
    """Allocate tensors with the dtypes and sizes of stored tensors.

    A floating-point tensor whose shape equals that of a DTensor in `like` gets the sharding of that
    DTensor. All other tensors are unsharded CPU tensors.
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
    """Context manager that replaces DCP's summary of the errors of all ranks by the first error."""
    try:
        yield
    except dcp.CheckpointException as error:
        failure, _ = error.failures[min(error.failures)]
    else:
        return
    raise failure

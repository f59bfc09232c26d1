"""Vectors of documents on disk: shards, manifest and a memory-mapped reader.

`ddiff encode` writes a folder with these files. N is the number of documents of a shard, D the
dimension of a vector:

    settings.json              encoder, data, dimension and size of a shard; written first
    train_00000.safetensors    keys uint64 [N], vectors float32 [N,D], present bool [N]; of an
                               encoder of tokens vectors float32 [N,P,D] and lengths int32 [N]
    validation_00000.safetensors
    manifest.json              settings, numbers of documents, checksums, mean and std; written last

Document i of a part ("train" or "validation") is row i % N of shard i // N. The key of a document
is a hash of its text. `present` is False for a document without vector, for example a blank text;
the row of such a document is zero. An encoder of tokens gives up to P vectors per document; their
number is its length, and the vectors after it are zero. Each shard stores the fingerprint of the
settings and a SHA-256 of its contents, so that a shard of other settings and a damaged shard are
recognized.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ddiff.atomic import write_atomic
from ddiff.data.cache import fingerprint
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.errors import ArgumentError, DataError

FORMAT = 1
TOKEN_FORMAT = 2  # format of folders with several vectors per document
MANIFEST = "manifest.json"
SETTINGS = "settings.json"
ENDING = ".safetensors"
_KEYS = "keys"
_VECTORS = "vectors"
_PRESENT = "present"
_LENGTHS = "lengths"
_ABOUT = "ddiff"


# ---------------------------------------------------------------------- settings of a folder


@final
@dataclass(frozen=True)
class EncodingSettings:
    """Settings that determine the vectors in a folder.

    Args:
        encoder: fingerprint of the encoder.
        dim: dimension D of a vector.
        data: fingerprints of the documents, by part.
        shard_size: number N of documents in a shard.
        max_samples: largest number of training documents, and of validation documents; None: all.
        description: name and settings of the encoder as JSON, for messages. Not compared.
        positions: largest number P of vectors of a document; None: one vector per document.
    """

    encoder: str
    dim: int
    data: Mapping[str, str]
    shard_size: int
    max_samples: int | None = None
    description: Any = None
    positions: int | None = None

    def to_dict(self) -> dict[str, Any]:
        found = {"format": self.format, **vars(self), "data": dict(self.data)}
        if self.positions is None:
            # absent from the files of the first format, whose fingerprint must not change
            del found["positions"]
        return found

    @property
    def format(self) -> int:
        """Number of the file format."""
        return FORMAT if self.positions is None else TOKEN_FORMAT

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """Shape of the vectors of a document: [D] or [P,D]."""
        return (self.dim,) if self.positions is None else (self.positions, self.dim)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the settings from JSON. Raises KeyError if a value is missing."""
        names = set(cls.__dataclass_fields__) - {"positions"}
        return cls(**{name: values[name] for name in names}, positions=values.get("positions"))

    @property
    def fingerprint(self) -> str:
        """Hash of all settings except the description of the encoder."""
        compared = self.to_dict()
        del compared["description"]
        return fingerprint(compared)

    def differences(self, other: EncodingSettings) -> list[str]:
        """List the settings in which `other` differs, as `dim: was 32, is 64`."""
        found = []
        if self.encoder != other.encoder:
            was = f"{self.description} (fingerprint {self.encoder})"
            now = f"{other.description} (fingerprint {other.encoder})"
            found.append(f"encoder: was {was}, is {now}")
        for part, was in self.data.items():
            if was != other.data.get(part):
                found.append(f"{part} documents: was {was}, is {other.data.get(part)}")
        for name in ("dim", "positions", "shard_size", "max_samples"):
            if vars(self)[name] != vars(other)[name]:
                found.append(f"{name}: was {vars(self)[name]}, is {vars(other)[name]}")
        return found


def read_settings(folder: Path) -> EncodingSettings | None:
    """Read the settings of a folder; None if the folder has no settings.

    Raises DataError if the file is damaged or has another format.
    """
    path = folder / SETTINGS
    return EncodingSettings.from_dict(_read_json(path)) if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    """Read `settings.json` or `manifest.json`. Raises DataError unless the file is valid."""
    try:
        found = json.loads(path.read_bytes())
        expected = EncodingSettings.from_dict(found).format
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _invalid_error(path, f"{type(error).__name__}: {error}") from error
    if found["format"] != expected:
        raise DataError(
            f"{path} has the format {found['format']!r}, but {expected} is expected. Encode the "
            "documents again into another folder, or use the version of ddiff that wrote it."
        )
    return found


def _invalid_error(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} is damaged ({what}). Delete the file and repeat the command `ddiff encode`: "
        "complete shards of the same settings are kept."
    )


# ---------------------------------------------------------------------- shards


@final
@dataclass(frozen=True)
class VectorShard:
    """Shard of n documents.

    keys: [n] hashes of the texts.
    vectors: [n,D] or [n,P,D], memory-mapped. The rows of a document without vector are zero.
    present: [n], whether a document has a vector.
    lengths: [n], number of vectors of each document; None for one vector per document.
    fingerprint: fingerprint of the settings with which the shard was written.
    sha256: checksum of the arrays, as stored in the file.
    """

    keys: NDArray[np.uint64]
    vectors: NDArray[np.float32]
    present: NDArray[np.bool_]
    lengths: NDArray[np.int32] | None
    fingerprint: str
    sha256: str

    def valid_vectors(self) -> NDArray[np.float32]:
        """Return all vectors of documents, without padding, [m,D]."""
        if self.lengths is None:
            return self.vectors[self.present]
        is_valid = np.arange(self.vectors.shape[1]) < self.lengths[:, None]
        return self.vectors[is_valid]

    def is_intact(self) -> bool:
        """Return whether the arrays have the stored checksum. Reads all vectors."""
        return _checksum(self.keys, self.vectors, self.present, self.lengths) == self.sha256


def shard_name(part: str, number: int) -> str:
    """Return the file name of a shard without its ending, such as `train_00003`."""
    return f"{part}_{number:05d}"


def text_keys(texts: Iterable[str]) -> NDArray[np.uint64]:
    """Return the keys of texts: the first 8 bytes of the SHA-256 of each text."""
    hashes = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
    return np.frombuffer(hashes, "<u8")


def write_shard(
    path: Path,
    keys: NDArray[np.uint64],
    vectors: NDArray[np.float32],
    present: NDArray[np.bool_],
    settings: EncodingSettings,
    lengths: NDArray[np.int32] | None = None,
) -> None:
    """Write a shard atomically, and flush the file to the disk. `VectorShard` has the arrays."""
    tensors: dict[str, NDArray[Any]] = {_KEYS: keys, _VECTORS: vectors, _PRESENT: present}
    if lengths is not None:
        tensors[_LENGTHS] = lengths
    sha256 = _checksum(keys, vectors, present, lengths)
    about = {"fingerprint": settings.fingerprint, "sha256": sha256}
    # one text, because the library writes several entries in random order
    content = save(tensors, {_ABOUT: json.dumps(about)})
    write_atomic(path, content, sync=True)


def read_shard(path: Path) -> VectorShard:
    """Memory-map a shard. Raises DataError with the reason if the file cannot be read."""
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            keys = file.get_tensor(_KEYS)
            present = file.get_tensor(_PRESENT)
            lengths = file.get_tensor(_LENGTHS) if _LENGTHS in file.keys() else None  # noqa: SIM118
        vectors = _map_vectors(path)
        if not len(keys) == len(present) == len(vectors) or (lengths is None) != (
            vectors.ndim == 2
        ):
            raise ValueError("the arrays have different numbers of documents")
        return VectorShard(keys, vectors, present, lengths, about["fingerprint"], about["sha256"])
    except PermissionError:
        raise  # the file may be intact, so that it must not be replaced
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _damage_error(path, f"it cannot be read ({reason})") from error


def _map_vectors(path: Path) -> NDArray[np.float32]:
    """Memory-map the vectors of a safetensors file.

    The library itself copies a tensor when it is read. A safetensors file begins with the size of
    its header (8 bytes) and the header (JSON), which has the position of each tensor after it.
    """
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        about = json.loads(file.read(size))[_VECTORS]
    shape = tuple(about["shape"])
    if about["dtype"] != "F32":
        raise ValueError(f"the vectors are {about['dtype']}, but F32 is expected")
    if not math.prod(shape):
        return np.zeros(shape, np.float32)  # an empty file section cannot be mapped
    offset = 8 + size + about["data_offsets"][0]
    mapped = np.memmap(path, np.float32, "r", offset, shape)
    # a plain view of the same memory, because slices of a memmap object are slow
    return mapped.view(np.ndarray)


def _checksum(*arrays: NDArray[Any] | None) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        if array is None:
            continue
        digest.update(str((array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# ---------------------------------------------------------------------- mean and std


class Moments:
    """Streamed mean and standard deviation of vectors in float64 (the formula of Chan et al.)."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim)
        self._squares = np.zeros(dim)  # sum of the squared distances from the mean

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Add the vectors [n,D] of one shard."""
        if not len(vectors):
            return
        block = vectors.astype(np.float64)
        mean = block.mean(0)
        total = self.count + len(block)
        shift = mean - self.mean
        self._squares += ((block - mean) ** 2).sum(0)
        self._squares += shift**2 * (self.count * len(block) / total)
        self.mean += shift * (len(block) / total)
        self.count = total

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of each dimension, with divisor n; 0 without vectors."""
        return np.sqrt(self._squares / max(1, self.count))


# ---------------------------------------------------------------------- reader


@final
class VectorPart:
    """Vectors of the training or the validation documents, read by document number."""

    def __init__(
        self, folder: Path, part: str, shards: Sequence[VectorShard], settings: EncodingSettings
    ) -> None:
        self._folder = folder
        self._part = part
        self._shards = shards
        self._settings = settings
        self.dim = settings.dim
        self.positions = settings.positions or 1
        self.num_documents = sum(len(shard.keys) for shard in shards)
        self.num_missing = sum(int((~shard.present).sum()) for shard in shards)

    @property
    def present(self) -> NDArray[np.bool_]:
        """Marks of the documents that have vectors, [num_documents]."""
        return np.concatenate([np.empty(0, bool), *(shard.present for shard in self._shards)])

    @property
    def fingerprint(self) -> str:
        """Identifier of the vectors, 32 hexadecimal digits."""
        checksums = [shard.sha256 for shard in self._shards]
        return fingerprint([self._settings.fingerprint, checksums])

    def read(self, numbers: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the vectors of the documents `numbers` [k], and which of them exist [k].

        The vectors are [k,D], or [k,P,D] of an encoder of tokens, with zeros after the last vector
        of a document. A document without vector has zeros and the mark False. If the folder was
        written with `max_samples`, this includes documents after the encoded ones. Raises
        ArgumentError for a number outside the corpus.
        """
        wanted = self._check_numbers(numbers)
        vectors = np.zeros((len(wanted), *self._settings.vector_shape), np.float32)
        present = np.zeros(len(wanted), bool)
        for shard, chosen, rows in self._find_rows(wanted):
            vectors[chosen] = shard.vectors[rows]
            present[chosen] = shard.present[rows]
        return vectors, present

    def read_lengths(self, numbers: ArrayLike) -> NDArray[np.int64]:
        """Return the number of vectors of the documents `numbers`, [k]."""
        wanted = self._check_numbers(numbers)
        lengths = np.zeros(len(wanted), np.int64)
        for shard, chosen, rows in self._find_rows(wanted):
            lengths[chosen] = shard.present[rows] if shard.lengths is None else shard.lengths[rows]
        return lengths

    def _check_numbers(self, numbers: ArrayLike) -> NDArray[np.int64]:
        wanted = np.asarray(numbers, np.int64)
        highest = self.num_documents - 1
        is_cut = self._settings.max_samples is not None
        is_outside = wanted.size and (wanted.min() < 0 or (wanted.max() > highest and not is_cut))
        if wanted.ndim != 1 or is_outside:
            raise ArgumentError(
                f"VectorPart.read: numbers must be a one-dimensional list of integers in "
                f"0..{highest}, the {self._part} documents of {self._folder}; got {numbers!r}."
            )
        return wanted

    def _find_rows(
        self, wanted: NDArray[np.int64]
    ) -> Iterator[tuple[VectorShard, NDArray[np.bool_], NDArray[np.int64]]]:
        """Yield the shards of documents, the documents in each shard [k], and their rows."""
        shard_of, row_of = np.divmod(wanted, self._settings.shard_size)
        is_encoded = wanted < self.num_documents
        for number in np.unique(shard_of[is_encoded]):
            chosen = is_encoded & (shard_of == number)
            yield self._shards[number], chosen, row_of[chosen]

    def keys(self) -> NDArray[np.uint64]:
        """Return the hashes of all texts, in the order of the documents."""
        return np.concatenate([np.empty(0, np.uint64), *(shard.keys for shard in self._shards)])


@final
class EncodedVectors:
    """Vectors of the documents of a corpus, memory-mapped from a folder of `ddiff encode`.

        vectors = EncodedVectors.open("runs/small-vectors", dim=384)
        batch, present = vectors.train.read([3, 0, 5])      # [3,384] and [3]

    An encoder of tokens gives several vectors per document: batch [3,P,384].

    Args:
        folder: the folder.
        settings: encoder, data and sizes.
        train: vectors of the training documents.
        validation: vectors of the validation documents.
        mean: [D] mean of the training vectors, in float64.
        std: [D] standard deviation of the training vectors, in float64.
    """

    def __init__(
        self,
        folder: Path,
        settings: EncodingSettings,
        train: VectorPart,
        validation: VectorPart,
        mean: NDArray[np.float64],
        std: NDArray[np.float64],
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.train = train
        self.validation = validation
        self.mean = mean
        self.std = std

    @property
    def dim(self) -> int:
        return self.settings.dim

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        dim: int | None = None,
        encoder: str | None = None,
        data: Mapping[str, str] | None = None,
    ) -> Self:
        """Open a finished folder, and check it before anything is computed.

        The checksum of a shard is compared if the shard was modified after the manifest. `verify`
        compares all checksums.

        Args:
            folder: folder that `ddiff encode` wrote.
            dim: expected dimension; None: any.
            encoder: expected fingerprint of the encoder; None: any.
            data: expected fingerprints of the documents by part; None: any.

        Raises DataError if the folder is unfinished, damaged, or differs from an expected value.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        settings = EncodingSettings.from_dict(manifest)
        _check_expected(folder, settings, dim, encoder, data)
        finished = (folder / MANIFEST).stat().st_mtime_ns
        parts = {}
        for part in (TRAIN, VALIDATION):
            shards = [
                # names come from the numbers and not from the manifest, which could name any file
                _open_recorded(folder, shard_name(part, number), record, settings, finished)
                for number, record in enumerate(manifest["parts"][part])
            ]
            parts[part] = VectorPart(folder, part, shards, settings)
        mean = np.array(manifest["mean"])
        std = np.array(manifest["std"])
        return cls(folder, settings, parts[TRAIN], parts[VALIDATION], mean, std)

    def verify(self) -> None:
        """Compare the checksums of all shards. Raises DataError with the name of a damaged one."""
        for name, shard in self._named_shards():
            if not shard.is_intact():
                raise _damage_error(self.folder / f"{name}{ENDING}", "its checksum is wrong")

    def _named_shards(self) -> Iterator[tuple[str, VectorShard]]:
        for part, vectors in ((TRAIN, self.train), (VALIDATION, self.validation)):
            for number, shard in enumerate(vectors._shards):
                yield shard_name(part, number), shard


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished folder. Raises DataError if it is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = ""
        if (folder / SETTINGS).is_file():
            unfinished = " The folder is unfinished: repeat the command `ddiff encode` to resume."
        raise DataError(
            f"{folder} is not a folder of encoded vectors: it has no {MANIFEST}.{unfinished} "
            f"`ddiff encode RECIPE --out {folder}` writes one."
        )
    manifest = _read_json(path)
    if not {"parts", "mean", "std"} <= set(manifest):
        raise _invalid_error(path, "parts, mean or std is missing")
    return manifest


def _check_expected(
    folder: Path,
    settings: EncodingSettings,
    dim: int | None,
    encoder: str | None,
    data: Mapping[str, str] | None,
) -> None:
    """Raise DataError for each value that is expected and different."""
    differences = []
    if dim is not None and dim != settings.dim:
        differences.append(f"the vectors must have {dim} dimensions; they have {settings.dim}")
    if encoder is not None and encoder != settings.encoder:
        differences.append(
            f"the encoder must have the fingerprint {encoder}; the folder was encoded with "
            f"{settings.description} (fingerprint {settings.encoder})"
        )
    for part, expected in (data or {}).items():
        found = settings.data.get(part)
        if expected != found:
            differences.append(
                f"the {part} documents must have the fingerprint {expected}; the encoded documents "
                f"have {found}"
            )
    if differences:
        raise DataError(
            f"EncodedVectors.open: {folder}: {'; '.join(differences)}. Use the recipe with which "
            "the folder was encoded, or encode the documents again into another folder."
        )


def _open_recorded(
    folder: Path, name: str, record: Mapping[str, Any], settings: EncodingSettings, finished: int
) -> VectorShard:
    """Open the shard `name` and compare it with its record in the manifest.

    `finished`: modification time of the manifest in nanoseconds. A shard with a later time is read
    completely, to compare its checksum.
    """
    path = folder / f"{name}{ENDING}"
    shard = read_shard(path)
    expected = (record["documents"], *settings.vector_shape)
    if shard.vectors.shape != expected:
        raise _damage_error(
            path, f"the shape of its vectors is {shard.vectors.shape}, not {expected}"
        )
    if shard.fingerprint != settings.fingerprint or shard.sha256 != record["sha256"]:
        raise _damage_error(path, "it was written by another job")
    if path.stat().st_mtime_ns > finished and not shard.is_intact():
        raise _damage_error(path, "its checksum is wrong")
    return shard


def _damage_error(path: Path, what: str) -> DataError:
    return DataError(
        f"The shard {path} is damaged: {what}. Repeat the command `ddiff encode`, which encodes "
        "the documents of this shard again."
    )

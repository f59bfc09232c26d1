"""Token shards: memory-mapped files of a tokenized corpus.

A folder contains these files. V is the number of tokens of the tokenizer; the tokens file of a
shard has n tokens in k documents.

    train_00000.tokens.npy   [n] uint16 (uint32 if V > 65536), ids of documents with end marks
    train_00000.ends.npy     [k] int64, position after the last token of each document in the shard
    train.counts.npy         [V] int64, number of occurrences of each token in the part
    manifest.json            tokenizer, source, and the size and checksums of every shard

Rows are cut from the shards when they are read (`ddiff.data.packing`), so that the same shards can
give rows of any length. A file is written under a temporary name and then renamed. The manifest is
written last. A build that was killed resumes after its last complete shard, because `journal.json`
stores the position in the source at the end of that shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ddiff.atomic import PARTIAL, lock_file, open_atomic, write_atomic
from ddiff.data.cache import not_writable_error
from ddiff.data.overlap import find_overlap
from ddiff.data.token_stream import Shard, ShardRecord, TokenStream
from ddiff.data.tokenizer import Tokenizer, check_round_trip
from ddiff.data.tokenizer_workers import (
    TRAIN,
    VALIDATION,
    Chunk,
    EncodedChunk,
    encode_chunks,
    token_dtype,
)
from ddiff.errors import DataError
from ddiff.progress import show_progress

FORMAT = 1
SMALL = 2**26  # bytes; files up to this size are hashed whenever they are opened
_NAME = re.compile(r"(train|validation)_\d{5,}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
PARTS = (TRAIN, VALIDATION)
KINDS = ("tokens", "ends")
MANIFEST = "manifest.json"
JOURNAL = "journal.json"
SHARD_TOKENS = 2**25  # 64 MiB of 16-bit ids: few files, and little to repeat after a kill
_COUNT_AT_ONCE = 2**22  # tokens; np.bincount makes a 64-bit copy of them
_NO_ENDS: NDArray[np.int64] = np.empty(0, np.int64)
Chunks = Callable[[Any], Iterable[Chunk]]
"""Function (cursor) that yields the chunks of a source after a cursor, all chunks for None."""


@final
@dataclass(frozen=True)
class Shards:
    """Folder of token shards with a manifest."""

    folder: Path
    manifest: Mapping[str, Any]

    def records(self, part: str) -> list[ShardRecord]:
        """Return the manifest entries of all shards in a part ("train" or "validation")."""
        return [ShardRecord(**record) for record in self.manifest["parts"][part]]

    def all_records(self) -> list[ShardRecord]:
        """Return the manifest entries of all shards, those of training shards first."""
        return [record for part in PARTS for record in self.records(part)]

    def stream(self, part: str) -> TokenStream:
        """Memory-map the shards of a part as one token stream.

        Raises DataError if a shard is missing or its size differs from the manifest.
        """
        dtype = np.dtype(self.manifest["dtype"])
        shards = []
        for record in self.records(part):
            tokens = self.folder / f"{record.name}.tokens.npy"
            ends = self.folder / f"{record.name}.ends.npy"
            shard = Shard(
                tokens=_memory_map(tokens, dtype, record.tokens),
                ends=_memory_map(ends, np.dtype(np.int64), record.documents),
                record=record,
            )
            shards.append(shard)
        counts = self.folder / f"{part}.counts.npy"
        num_tokens = self.manifest["tokenizer"]["num_tokens"]
        # Counts are read on demand, because training does not need them.
        return TokenStream(shards, partial(_memory_map, counts, np.dtype(np.int64), num_tokens))

    @cached_property
    def overlap(self) -> dict[str, list[int]]:
        """Numbers of validation documents in the training text, and of repetitions in each part.

        `find_overlap` describes the keys and values. The numbers are read from the manifest. If the
        manifest of an older version lacks them, the documents are compared.
        """
        stored = self.manifest.get("overlap")
        return stored or find_overlap(self.stream(TRAIN), self.stream(VALIDATION))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise DataError if the shards were made with another tokenizer.

        The message lists the properties that differ.
        """
        stored = self.manifest["tokenizer"]
        differences = []
        for key, value in describe_tokenizer(tokenizer).items():
            if stored.get(key) != value:
                differences.append(f"{key} was {stored.get(key)!r} and is {value!r}")
        if differences:
            raise DataError(
                f"The shards in {self.folder} were made with another tokenizer: "
                f"{'; '.join(differences)}. Use the tokenizer of the shards "
                f'([tokenizer] kind = "saved", path = "{self.folder / "tokenizer.json"}"), or '
                "tokenize the text again with `ddiff data`."
            )

    def files(self) -> list[str]:
        """Return the names of all files in the folder except the manifest."""
        names = []
        for record in self.all_records():
            names += [f"{record.name}.{kind}.npy" for kind in KINDS]
        return names + self.files_without_checksum()

    def files_without_checksum(self) -> list[str]:
        """Return the names of the files whose checksum is not in the manifest."""
        return [*(f"{part}.counts.npy" for part in PARTS), "tokenizer.json"]

    def written_since(self, began: float) -> tuple[int, float]:
        """Return the tokens written since `began`, and the seconds from `began` to the manifest.

        `began` is in seconds since 1970. The manifest is written at the end of a build.
        """
        tokens = 0
        for record in self.all_records():
            if _modification_time(self.folder / f"{record.name}.tokens.npy") >= began:
                tokens += record.tokens
        return tokens, _modification_time(self.folder / MANIFEST) - began

    def verify(self) -> None:
        """Verify the checksums of all shards, their ids and document ends, and the token counts.

        Raises DataError with the name of a damaged file and the remedy.
        """
        records = self.all_records()
        with show_progress(len(records), "verifying shards") as bar:
            for record in records:
                for path, expected in self.checksums(record):
                    if not path.is_file() or file_sha256(path) != expected:
                        raise _damage_error(path, "its checksum differs from the manifest")
                bar.advance(1)
        for part in PARTS:
            self._check_counts(part)

    def checksums(self, record: ShardRecord) -> Iterator[tuple[Path, str]]:
        """Yield (path, expected SHA-256) for the two files of a shard: tokens and document ends."""
        for kind, expected in zip(KINDS, (record.tokens_sha256, record.ends_sha256)):
            yield self.folder / f"{record.name}.{kind}.npy", expected

    def check_modified(self) -> None:
        """Verify the checksums of small files, and of large files newer than the manifest.

        This check takes almost no time; `verify` reads all files. Raises DataError with the name of
        a damaged file and the remedy.
        """
        finished = _modification_time(self.folder / MANIFEST)
        for record in self.all_records():
            for path, expected in self.checksums(record):
                try:
                    is_small = path.stat().st_size <= SMALL
                    is_suspect = is_small or _modification_time(path) > finished
                    if is_suspect and file_sha256(path) != expected:
                        raise _damage_error(path, "its checksum differs from the manifest")
                except OSError as error:
                    raise _damage_error(path, f"it cannot be read ({error})") from error

    def _check_counts(self, part: str) -> None:
        """Raise DataError unless ids, document ends and token counts of a part are consistent."""
        stream = self.stream(part)
        num_tokens = self.manifest["tokenizer"]["num_tokens"]
        counts = stream.counts()
        for shard in stream.shards:
            size = len(shard.tokens)
            if size and int(shard.tokens.max()) >= num_tokens:
                raise _damage_error(
                    self.folder / f"{shard.record.name}.tokens.npy",
                    f"it holds the id {shard.tokens.max()}, but the ids of the tokenizer are "
                    f"0..{num_tokens - 1}",
                )
            is_decreasing = (np.diff(shard.ends, prepend=0) < 0).any()
            if is_decreasing or shard.ends[-1:].tolist() != [size]:
                raise _damage_error(
                    self.folder / f"{shard.record.name}.ends.npy",
                    "its document ends must increase up to the number of tokens in the shard",
                )
        if not np.array_equal(counts, _count_tokens(stream.shards, num_tokens)):
            raise _damage_error(
                self.folder / f"{part}.counts.npy",
                "its counts differ from the tokens of the shards",
            )


def read_shards(folder: Path, name: str | None = None) -> Shards:
    """Read the manifest of a finished folder of shards.

    Error messages show `name`, if given, instead of the folder. Raises DataError for a manifest
    that is missing, damaged, of another format, or names files outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = ""
        if (folder / JOURNAL).is_file():
            unfinished = " The folder holds an interrupted build: run the same command to resume."
        raise DataError(
            f"{folder} is not a folder of token shards: it has no {MANIFEST}.{unfinished} "
            f"`ddiff data RECIPE --out {folder}` writes token shards."
        )
    manifest = _read_json(path)
    shown = f"{name.rstrip('/')}/{MANIFEST}" if name else path
    if manifest.get("format") != FORMAT or "parts" not in manifest:
        raise DataError(
            f"{shown} has a format that this version of ddiff does not read: "
            f"{manifest.get('format')!r}, but {FORMAT} is expected. Tokenize the text again with "
            "`ddiff data`, or use the version of ddiff that wrote the manifest."
        )
    check_manifest(manifest, shown)
    return Shards(folder, manifest)


def check_manifest(manifest: Mapping[str, Any], path: Path | str) -> None:
    """Raise DataError unless a manifest has all required values.

    The names of shards must have the form that ddiff writes. Names become parts of paths, and a
    name such as "../x" would lead out of the folder.
    """
    parts = manifest.get("parts")
    tokenizer = manifest.get("tokenizer")
    if not isinstance(parts, dict) or sorted(parts) != sorted(PARTS):
        raise _manifest_error(path, f"parts must be {' and '.join(PARTS)}")
    if manifest.get("dtype") not in ("uint16", "uint32"):
        raise _manifest_error(
            path, f"dtype must be uint16 or uint32; it is {manifest.get('dtype')!r}"
        )
    if not isinstance(tokenizer, dict) or not _is_count(tokenizer.get("num_tokens")):
        raise _manifest_error(path, "tokenizer must have an integer num_tokens")
    for part, records in parts.items():
        if not isinstance(records, list):
            raise _manifest_error(path, f"{part} must be a list of shards")
        for record in records:
            _check_record(record, part, path)
        names = [record["name"] for record in records]
        if len(set(names)) != len(names):
            raise _manifest_error(path, f"{part} names a shard twice")


def _check_record(record: Any, part: str, path: Path | str) -> None:
    if not isinstance(record, dict) or set(record) != {field.name for field in fields(ShardRecord)}:
        raise _manifest_error(
            path, f"{part} holds {str(record)[:80]!r}, which does not describe a shard"
        )
    name = record["name"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.startswith(f"{part}_"):
        raise _manifest_error(
            path,
            f"the shards of {part} must be named {part}_00000, {part}_00001, ...; got {name!r}",
        )
    for key, value in record.items():
        if key.endswith("sha256"):
            if not isinstance(value, str) or not _SHA256.fullmatch(value):
                raise _manifest_error(
                    path, f"{key} of {name} is not a SHA-256: {str(value)[:80]!r}"
                )
        elif key != "name" and not _is_count(value):
            raise _manifest_error(
                path, f"{key} of {name} must be an integer of at least 0; got {str(value)[:80]!r}"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _manifest_error(path: Path | str, what: str) -> DataError:
    return DataError(
        f"{path} is not a valid manifest of token shards: {what}. No shard was read. Copy the "
        "folder again from the machine that made the shards, or tokenize the text again with "
        "`ddiff data`."
    )


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return, as JSON, the properties of a tokenizer that determine the token shards."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "num_tokens": tokenizer.num_tokens,
        "eos_id": tokenizer.eos_id,
        "unit": tokenizer.unit,
    }


def encode_in_memory(chunks: Iterable[Chunk], tokenizer: Tokenizer) -> TokenStream:
    """Encode all chunks and return them as one shard in memory."""
    unfinished = _UnfinishedShard("")
    for _, found in encode_chunks(chunks, tokenizer):
        unfinished.add(found)
    shard = unfinished.finish(token_dtype(tokenizer.num_tokens))
    return _in_memory(shard, tokenizer.num_tokens)


def stream_from_ids(ids: NDArray[np.integer], num_tokens: int) -> TokenStream:
    """Build a token stream in memory from an array `ids` [R,L]: R documents of L tokens.

    `num_tokens`: number of tokens of the vocabulary.
    """
    documents, size = ids.shape
    tokens = np.ascontiguousarray(ids).astype(token_dtype(num_tokens)).ravel()
    return stream_from_documents(tokens, size * np.arange(1, documents + 1), num_tokens)


def stream_from_documents(
    ids: NDArray[np.unsignedinteger], ends: NDArray[np.int64], num_tokens: int
) -> TokenStream:
    """Build a token stream from the ids [n] of k documents and their ends [k] in `ids`.

    The number of bytes of the text is unknown, and recorded as 0. `num_tokens`: number of tokens of
    the vocabulary.
    """
    sizes = np.diff(ends, prepend=0)
    record = ShardRecord(
        name="",
        documents=len(ends),
        tokens=len(ids),
        bytes=0,
        shortest=int(sizes.min(initial=sizes[0] if len(sizes) else 0)),
        longest=int(sizes.max(initial=0)),
        tokens_sha256="",
        ends_sha256="",
    )
    return _in_memory(Shard(ids, ends, record), num_tokens)


def _in_memory(shard: Shard, num_tokens: int) -> TokenStream:
    return TokenStream([shard], partial(_count_tokens, [shard], num_tokens))


def write_shards(
    folder: Path,
    chunks: Chunks,
    tokenizer: Tokenizer,
    *,
    source: Mapping[str, Any],
    held_out: float = 0.0,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    total: int | None = None,
) -> Shards:
    """Tokenize a source into shards in `folder`, resuming an interrupted build.

    Tokens are collected chunk by chunk. When at least `shard_tokens` tokens are collected, they are
    written as a pair of shards: one for training and one for validation. A second process that
    builds the same folder waits for the first.

    Args:
        chunks: function (cursor) that yields the chunks of the source after a cursor.
        source: JSON that identifies the source, together with `held_out` and the tokenizer.
        held_out: fraction of the documents for validation, in chunks that do not name a part.
        workers: number of tokenizer processes. The files do not depend on `workers`.
        total: number of documents for the progress bar, or None if the number is not known.

    Raises DataError if the source has no token, or if the folder holds shards of another source or
    tokenizer.
    """
    identity = {
        "format": FORMAT,
        "source": dict(source),
        "held_out": held_out,
        "tokenizer": describe_tokenizer(tokenizer),
        "dtype": token_dtype(tokenizer.num_tokens).name,
        "shard_tokens": shard_tokens,
    }
    # Convert to the form that JSON gives after reading: no tuples, only string keys.
    identity = json.loads(json.dumps(identity))
    # Finished shards are read without a lock, because the folder may be read-only.
    if not (folder / MANIFEST).is_file():
        _make_folder(folder)
        with _lock_folder(folder):
            if not (folder / MANIFEST).is_file():
                build = _Build(folder, identity, shard_tokens)
                build.run(chunks, tokenizer, held_out, workers, total)
    made = read_shards(folder)
    differing = [key for key in identity if made.manifest.get(key) != identity[key]]
    if differing:
        made.check_tokenizer(tokenizer)
        raise DataError(
            f"{folder} holds shards of another corpus: {', '.join(differing)} differ. Name another "
            f"folder, or delete {folder}."
        )
    return made


class _UnfinishedShard:
    """Shard in memory to which documents are added."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_tokens = 0
        self._chunks: list[EncodedChunk] = []

    def add(self, chunk: EncodedChunk) -> None:
        if len(chunk.sizes):
            self._chunks.append(chunk)
            self.num_tokens += len(chunk.ids)

    def finish(self, dtype: np.dtype[Any]) -> Shard:
        ids = [chunk.ids for chunk in self._chunks]
        tokens = _concatenate(ids, dtype)
        sizes = _concatenate([chunk.sizes for chunk in self._chunks], np.dtype(np.int64))
        num_bytes = sum(int(chunk.num_bytes.sum()) for chunk in self._chunks)
        # The checksums are computed when the files are written.
        record = ShardRecord(
            name=self.name,
            documents=len(sizes),
            tokens=len(tokens),
            bytes=num_bytes,
            shortest=int(sizes.min()) if len(sizes) else 0,
            longest=int(sizes.max(initial=0)),
            tokens_sha256="",
            ends_sha256="",
        )
        return Shard(tokens, np.cumsum(sizes, dtype=np.int64), record)


class _Build:
    """Build of a folder of shards, resumed from the journal of an interrupted build."""

    def __init__(self, folder: Path, identity: dict[str, Any], shard_tokens: int) -> None:
        self._folder = folder
        self._identity = identity
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype(identity["dtype"])
        # This process has the lock, so no other process writes these files. The first pattern
        # matches the partial files of older versions.
        for abandoned in (*folder.glob("*.partial"), *folder.glob(f"*{PARTIAL}*")):
            abandoned.unlink()
        journal = _read_journal(folder / JOURNAL, identity)
        self.parts: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
        self.parts.update(journal.get("parts", {}))
        self.cursor: Any = journal.get("cursor")
        self.round: int = journal.get("round", 0)
        self._open_shards()

    def run(
        self, chunks: Chunks, tokenizer: Tokenizer, held_out: float, workers: int, total: int | None
    ) -> None:
        began = time.monotonic()
        done = 0
        cursor = self.cursor
        with show_progress(total, "tokenizing", start=self._sum("documents")) as bar:
            encoded = encode_chunks(chunks(cursor), tokenizer, held_out=held_out, workers=workers)
            for chunk, found in encoded:
                if not done:  # the first chunk is enough to warn
                    check_round_trip(tokenizer, chunk.texts)
                for part, shard in self._unfinished.items():
                    shard.add(found.select(held_out=part == VALIDATION))
                done += len(found.ids)
                cursor = chunk.cursor
                rate = done / max(1e-9, time.monotonic() - began)
                bar.advance(len(chunk.texts), tokens=done, tokens_per_second=rate)
                if self._num_unwritten() >= self._shard_tokens:
                    self._write_pair(cursor)
        if self._num_unwritten():
            self._write_pair(cursor)
        if not self._sum("tokens"):
            raise DataError("The source has no token. Give texts that are not empty.")
        self._finish(tokenizer)

    def _open_shards(self) -> None:
        self._unfinished = {part: _UnfinishedShard(f"{part}_{self.round:05}") for part in PARTS}

    def _num_unwritten(self) -> int:
        return sum(shard.num_tokens for shard in self._unfinished.values())

    def _sum(self, key: str) -> int:
        return sum(record[key] for records in self.parts.values() for record in records)

    def _write_pair(self, cursor: Any) -> None:
        """Write a training and a validation shard, then the journal that lists the shards.

        `cursor`: position in the source after the last document of the shards. After a kill, shards
        that the journal does not list are written again.
        """
        for part, unfinished in self._unfinished.items():
            shard = unfinished.finish(self._dtype)
            if shard.record.documents:
                self.parts[part].append(asdict(self._write_shard(shard)))
        self.round += 1
        self.cursor = cursor
        journal = {
            "identity": self._identity,
            "parts": self.parts,
            "cursor": cursor,
            "round": self.round,
        }
        write_atomic(self._folder / JOURNAL, json.dumps(journal), sync=True)
        self._open_shards()

    def _write_shard(self, shard: Shard) -> ShardRecord:
        name = shard.record.name
        return replace(
            shard.record,
            tokens_sha256=_write_array(self._folder / f"{name}.tokens.npy", shard.tokens),
            ends_sha256=_write_array(self._folder / f"{name}.ends.npy", shard.ends),
        )

    def _finish(self, tokenizer: Tokenizer) -> None:
        manifest = {**self._identity, "parts": self.parts}
        for part in PARTS:
            counts = _count_tokens(self._written_shards(part), tokenizer.num_tokens)
            _write_array(self._folder / f"{part}.counts.npy", counts)
        tokenizer.save(str(self._folder / "tokenizer.json"))
        made = Shards(self._folder, manifest)
        train = made.stream(TRAIN)
        validation = made.stream(VALIDATION)
        manifest["overlap"] = find_overlap(train, validation, self._folder)
        # The manifest is written last: a folder with a manifest is complete.
        write_atomic(self._folder / MANIFEST, json.dumps(manifest, indent=1), sync=True)
        (self._folder / JOURNAL).unlink(missing_ok=True)

    def _written_shards(self, part: str) -> Iterator[Shard]:
        """Yield the written shards of a part, without the end positions of their documents."""
        for record in self.parts[part]:
            path = self._folder / f"{record['name']}.tokens.npy"
            yield Shard(np.load(path, mmap_mode="r"), _NO_ENDS, ShardRecord(**record))


def _read_journal(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the journal of an interrupted build, or {} if there is no such journal.

    `identity`: source and tokenizer of the build. A journal of another identity, or with invalid
    entries, is ignored; the build then starts again.
    """
    if not path.is_file():
        return {}
    journal = _read_json(path)
    if journal.get("identity") != identity or journal.get("cursor") is None:
        return {}
    try:
        check_manifest({**journal["identity"], "parts": journal["parts"]}, path)
    except (DataError, KeyError):
        return {}
    return journal if _is_count(journal.get("round")) else {}


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable_error(folder, error) from error


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder for the duration of the `with` block.

    The operating system releases the lock if the process is killed.
    """
    try:
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise not_writable_error(folder, error) from error
    with lock:
        lock_file(lock, patience=math.inf)
        yield


def _concatenate(arrays: list[Any], dtype: np.dtype[Any]) -> Any:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _count_tokens(shards: Iterable[Shard], num_tokens: int) -> NDArray[np.int64]:
    counts = np.zeros(num_tokens, np.int64)
    for shard in shards:
        for start in range(0, len(shard.tokens), _COUNT_AT_ONCE):
            tokens = shard.tokens[start : start + _COUNT_AT_ONCE]
            counts += np.bincount(tokens, minlength=num_tokens)
    return counts


def _memory_map(path: Path, dtype: np.dtype[Any], size: int) -> Any:
    """Memory-map a one-dimensional array with `size` entries from a file.

    Raises DataError if the file cannot be read, or has another dtype or size.
    """
    try:
        # An array without entries cannot be memory-mapped, so it is read.
        array = np.load(path, mmap_mode="r" if size else None)
    except (OSError, ValueError, EOFError) as error:
        raise _damage_error(path, f"it cannot be read ({error})") from error
    if array.dtype != dtype or array.shape != (size,):
        raise _damage_error(
            path,
            f"its dtype is {array.dtype} and its shape {array.shape}, not {dtype} and ({size},)",
        )
    # A plain view of the same memory, because slices of a memmap object are slow.
    return array.view(np.ndarray)


def _damage_error(path: Path, what: str) -> DataError:
    return DataError(
        f"The shard {path} is damaged: {what}. Copy the file again from the machine that made the "
        f"shards, or delete the folder {path.parent} and run the same command to tokenize again."
    )


def _write_array(path: Path, array: NDArray[Any]) -> str:
    """Write a `.npy` file atomically and return the SHA-256 of the file."""
    with open_atomic(path, sync=True) as file:
        # These are the bytes that numpy.save writes. numpy.save itself is not used, because its
        # error on a full disk has no errno.
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).data)
    return file_sha256(path)


def _modification_time(path: Path) -> float:
    return path.stat().st_mtime


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    raise DataError(
        f"{path} is damaged. Delete the folder {path.parent} and run the same command to make the "
        "folder again."
    )

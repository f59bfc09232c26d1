"""Token shards: a corpus tokenized once and memory-mapped wherever it is read.

A folder holds the ids of every shard and the ends of its documents, both as plain `.npy` arrays:

    train_00000.tokens.npy   [n] uint16 (uint32 above 65536 tokens), documents with their end marks
    train_00000.ends.npy     [k] int64, place after each document's last token, within the shard
    train.counts.npy         [V] int64, number of occurrences of each token in the part
    manifest.json            tokenizer, source, and of every shard its size and checksums

Rows of any length are cut when they are read (`ddiff.data.packing`), so that another length needs no
other shards. A shard is written under another name and renamed; the manifest is written last. A
build that was killed resumes after its last complete shard, for which `journal.json` keeps the
cursor of the source.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ddiff.atomic import PARTIAL, lock_file, open_atomic, write_atomic
from ddiff.data.cache import fingerprint, not_writable_error
from ddiff.data.overlap import find_overlap
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
from ddiff.progress import progress

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
"""Function (cursor): yield the chunks of a source after a cursor, all for None."""


@final
@dataclass(frozen=True)
class ShardRecord:
    """Entry of a shard in the manifest: sizes, and the SHA-256 of both files.

    `shortest` and `longest` are the numbers of tokens of the shortest and the longest document.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    shortest: int
    longest: int
    tokens_sha256: str
    ends_sha256: str


@final
@dataclass(frozen=True)
class Shard:
    """Documents one after another.

    tokens: [n] ids.
    ends: [k] place after the last token of each document.
    """

    tokens: NDArray[np.unsignedinteger]
    ends: NDArray[np.int64]
    record: ShardRecord

    def read(self, start: int, stop: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """Return ids [stop - start] and the document of each, counted from the shard's first."""
        # Only the ends of the documents in the range are searched for each position.
        first, last = np.searchsorted(self.ends, (start, stop - 1), side="right")
        inside = np.searchsorted(self.ends[first:last], np.arange(start, stop), side="right")
        return self.tokens[start:stop], first + inside


@final
class TokenStream:
    """Shards of a part in order, as one stream of tokens that is read from disk on demand."""

    def __init__(self, shards: Sequence[Shard], counts: Callable[[], NDArray[np.int64]]) -> None:
        """Take the shards; `counts()` returns the number of occurrences of each token, [V]."""
        self.shards = shards
        self.counts = counts
        # [number of shards + 1] tokens and documents before each shard, the totals last.
        self._starts = _cumulative_sums(shard.record.tokens for shard in shards)
        self._documents = _cumulative_sums(shard.record.documents for shard in shards)

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        return int(self._documents[-1])

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of the text."""
        return sum(shard.record.bytes for shard in self.shards)

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return ids [stop - start] of a range of the stream, and the document of each."""
        ids = np.empty(stop - start, np.int32)
        document = np.empty(stop - start, np.int64)
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        while at < stop:
            base, end = int(self._starts[number]), min(stop, int(self._starts[number + 1]))
            if at < end:
                into = slice(at - start, end - start)
                ids[into], inside = self.shards[number].read(at - base, end - base)
                document[into] = self._documents[number] + inside
            at, number = end, number + 1
        return ids, document

    def document_ends(self) -> Iterator[NDArray[np.int64]]:
        """Where documents end in the stream, shard by shard."""
        for start, shard in zip(self._starts, self.shards):
            yield start + shard.ends

    def find_wrong_size(self, size: int) -> tuple[int, int] | None:
        """The first document that has not `size` tokens, and how many it has; None when all have."""
        for first, shard in zip(self._documents, self.shards):
            if shard.record.documents and not shard.record.shortest == shard.record.longest == size:
                sizes = np.diff(shard.ends, prepend=0)
                wrong = int(np.argmax(sizes != size))
                return int(first) + wrong, int(sizes[wrong])
        return None

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of the content, by the checksums of its shards."""
        return fingerprint(
            [[shard.record.tokens_sha256, shard.record.ends_sha256] for shard in self.shards]
        )


@final
@dataclass(frozen=True)
class Shards:
    """A folder of token shards: its manifest, and the parts as streams."""

    folder: Path
    manifest: Mapping[str, Any]

    def records(self, part: str) -> list[ShardRecord]:
        return [ShardRecord(**record) for record in self.manifest["parts"][part]]

    def stream(self, part: str) -> TokenStream:
        """The part's shards, memory-mapped; DataError when one is missing or not as long as the manifest says."""
        dtype = np.dtype(self.manifest["dtype"])
        shards = [
            Shard(
                _mapped(self.folder / f"{record.name}.tokens.npy", dtype, record.tokens),
                _mapped(
                    self.folder / f"{record.name}.ends.npy", np.dtype(np.int64), record.documents
                ),
                record,
            )
            for record in self.records(part)
        ]
        counts = self.folder / f"{part}.counts.npy"
        return TokenStream(
            shards,
            lambda: _mapped(counts, np.dtype(np.int64), self.manifest["tokenizer"]["num_tokens"]),
        )

    @cached_property
    def overlap(self) -> dict[str, list[int]]:
        """Documents that occur more than once, as `find_overlap` counts them when shards are written; else counted now."""
        return self.manifest.get("overlap") or find_overlap(
            self.stream(TRAIN), self.stream(VALIDATION)
        )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """DataError, saying what differs, when the shards were made with another tokenizer."""
        theirs, ours = self.manifest["tokenizer"], described(tokenizer)
        if differing := [
            f"{key} was {theirs.get(key)!r} and is {ours[key]!r}"
            for key in ours
            if theirs.get(key) != ours[key]
        ]:
            raise DataError(
                f"The shards in {self.folder} were made with another tokenizer: {'; '.join(differing)}. Take the tokenizer "
                f'that they were made with ([tokenizer] kind = "saved", path = "{self.folder / "tokenizer.json"}"), or '
                "tokenize the text anew with `ddiff data`."
            )

    def files(self) -> list[str]:
        """The names of all files but the manifest."""
        shards = [
            f"{record.name}.{kind}.npy"
            for part in PARTS
            for record in self.records(part)
            for kind in KINDS
        ]
        return [*shards, *self.unsealed()]

    def unsealed(self) -> list[str]:
        """The names of the files that the manifest has no checksum of."""
        return [*(f"{part}.counts.npy" for part in PARTS), "tokenizer.json"]

    def written_since(self, began: float) -> tuple[int, float]:
        """How many tokens were written after a time (seconds since 1970), and how long it took until all were finished."""
        records = [record for part in PARTS for record in self.records(part)]
        new = [
            record
            for record in records
            if _written(self.folder / f"{record.name}.tokens.npy") >= began
        ]
        return sum(record.tokens for record in new), _written(self.folder / MANIFEST) - began

    def verify(self) -> None:
        """Read every shard and hold it against its checksum and the counts.

        DataError names the one that is damaged, and the remedy.
        """
        records = [record for part in PARTS for record in self.records(part)]
        with progress(len(records), "verifying shards") as bar:
            for record in records:
                for path, due in self.sealed(record):
                    if not path.is_file() or file_sha256(path) != due:
                        raise _damaged(path, "its checksum is not the manifest's")
                bar.advance(1)
        for part in PARTS:
            self._check_counts(part)

    def sealed(self, record: ShardRecord) -> Iterator[tuple[Path, str]]:
        """Both files of a shard with the SHA-256 of each."""
        for kind, due in zip(KINDS, (record.tokens_sha256, record.ends_sha256)):
            yield self.folder / f"{record.name}.{kind}.npy", due

    def check_touched(self) -> None:
        """Hold small files against their checksums, and large ones that were written to after the manifest.

        It takes no time that counts, unlike `verify`. DataError as there.
        """
        records = [record for part in PARTS for record in self.records(part)]
        finished = _written(self.folder / MANIFEST)
        for path, due in (file for record in records for file in self.sealed(record)):
            try:
                is_suspect = path.stat().st_size <= SMALL or _written(path) > finished
                if is_suspect and file_sha256(path) != due:
                    raise _damaged(path, "its checksum is not the manifest's")
            except OSError as error:
                raise _damaged(path, f"it cannot be read ({error})") from error

    def _check_counts(self, part: str) -> None:
        """No checksum of the counts is kept: they are counted again. Ids that are no tokens are found by it too."""
        stream = self.stream(part)
        num_tokens = self.manifest["tokenizer"]["num_tokens"]
        counts = stream.counts()
        for shard in stream.shards:
            if len(shard.tokens) and int(shard.tokens.max()) >= num_tokens:
                path = self.folder / f"{shard.record.name}.tokens.npy"
                raise _damaged(
                    path,
                    f"it holds the id {shard.tokens.max()}, and the tokenizer has {num_tokens} tokens",
                )
            if (np.diff(shard.ends, prepend=0) < 0).any() or shard.ends[-1:].tolist() != [
                len(shard.tokens)
            ]:
                path = self.folder / f"{shard.record.name}.ends.npy"
                raise _damaged(
                    path, "documents do not end one after another, the last where the shard does"
                )
        if not np.array_equal(counts, _counts(stream.shards, num_tokens)):
            raise _damaged(
                self.folder / f"{part}.counts.npy", "the tokens of the shards are others"
            )


def read_shards(folder: Path, name: str | None = None) -> Shards:
    """Read the manifest of a folder that `write_shards` finished; `name` takes the place of the folder in messages.

    DataError when there is none, or one that is damaged, newer, or names files that are not in the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = (
            " It holds a build that was stopped: the command that began it goes on."
            * (folder / JOURNAL).is_file()
        )
        raise DataError(
            f"{folder} is no folder of token shards: it has no {MANIFEST}.{unfinished} `ddiff data RECIPE --out {folder}` "
            "makes one."
        )
    manifest = _read_json(path)
    shown = f"{name.rstrip('/')}/{MANIFEST}" if name else path
    if manifest.get("format") != FORMAT or "parts" not in manifest:
        raise DataError(
            f"{shown} is no manifest that this ddiff reads: format {manifest.get('format')!r}, and {FORMAT} is due. "
            "Tokenize the text anew with `ddiff data`, or take the ddiff that wrote it."
        )
    check_manifest(manifest, shown)
    return Shards(folder, manifest)


def check_manifest(manifest: Mapping[str, Any], path: Path | str) -> None:
    """Raise DataError unless a manifest has what shards are read by.

    Shards must be named as ddiff names them: a name is a part of paths, and another one may lead out of the folder.
    """
    parts, tokenizer = manifest.get("parts"), manifest.get("tokenizer")
    if not isinstance(parts, dict) or sorted(parts) != sorted(PARTS):
        raise _wrong_manifest(path, f"parts must be {' and '.join(PARTS)}")
    if manifest.get("dtype") not in ("uint16", "uint32"):
        raise _wrong_manifest(
            path, f"dtype must be uint16 or uint32; it is {manifest.get('dtype')!r}"
        )
    if not isinstance(tokenizer, dict) or not _is_count(tokenizer.get("num_tokens")):
        raise _wrong_manifest(path, "tokenizer must say its num_tokens")
    for part, records in parts.items():
        if not isinstance(records, list):
            raise _wrong_manifest(path, f"{part} must be a list of shards")
        for record in records:
            _check_record(record, part, path)
        names = [record["name"] for record in records]
        if len(set(names)) != len(names):
            raise _wrong_manifest(path, f"{part} names a shard twice")


def _check_record(record: Any, part: str, path: Path | str) -> None:
    if not isinstance(record, dict) or set(record) != {field.name for field in fields(ShardRecord)}:
        raise _wrong_manifest(
            path, f"{part} holds {str(record)[:80]!r}, which does not describe a shard"
        )
    name = record["name"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.startswith(f"{part}_"):
        raise _wrong_manifest(
            path,
            f"the shards of {part} are named {part}_00000, {part}_00001, ... and lie in its folder; got {name!r}",
        )
    for key, value in record.items():
        if key.endswith("sha256"):
            if not isinstance(value, str) or not _SHA256.fullmatch(value):
                raise _wrong_manifest(path, f"{key} of {name} is no SHA-256: {str(value)[:80]!r}")
        elif key != "name" and not _is_count(value):
            raise _wrong_manifest(
                path, f"{key} of {name} must be a whole number from 0; got {str(value)[:80]!r}"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _wrong_manifest(path: Path | str, what: str) -> DataError:
    return DataError(
        f"{path} is no manifest of token shards that ddiff wrote: {what}. Nothing was read by it. Copy the folder again "
        "from where the shards were made, or tokenize the text anew with `ddiff data`."
    )


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    """What shards must agree with a tokenizer in."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "num_tokens": tokenizer.num_tokens,
        "eos_id": tokenizer.eos_id,
        "unit": tokenizer.unit,
    }


def encode_in_memory(chunks: Iterable[Chunk], tokenizer: Tokenizer) -> TokenStream:
    """The stream of all chunks in memory, in one shard."""
    opened = _Open("")
    for _, found in encode_chunks(chunks, tokenizer):
        opened.add(found)
    return _in_memory(opened.closed(token_dtype(tokenizer.num_tokens)), tokenizer.num_tokens)


def stream_from_ids(ids: NDArray[np.integer], num_tokens: int) -> TokenStream:
    """Documents of one length, ids [R,L], as a stream in memory."""
    documents, size = ids.shape
    record = ShardRecord("", documents, ids.size, 0, size, size, "", "")
    tokens = np.ascontiguousarray(ids).astype(token_dtype(num_tokens)).ravel()
    return _in_memory(Shard(tokens, size * np.arange(1, documents + 1), record), num_tokens)


def _in_memory(shard: Shard, num_tokens: int) -> TokenStream:
    return TokenStream([shard], lambda: _counts([shard], num_tokens))


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
    """Tokenize a source into `folder`, going on where an earlier call was stopped; what is finished is not done again.

    A pair of shards, train and validation, is closed once both together hold `shard_tokens` tokens, at the end of a chunk:
    what is written does not depend on `workers`. `source` (JSON) and the tokenizer say what the shards are of; `total` is
    the number of documents, where it is known. Two processes that build the same folder take turns. DataError when the
    source has no token.
    """
    identity = {
        "format": FORMAT,
        "source": dict(source),
        "held_out": held_out,
        "tokenizer": described(tokenizer),
        "dtype": token_dtype(tokenizer.num_tokens).name,
        "shard_tokens": shard_tokens,
    }
    if not (
        folder / MANIFEST
    ).is_file():  # what is finished is read, also where nothing can be written
        _make(folder)
        with _alone(folder):
            if not (folder / MANIFEST).is_file():
                build = _Build(folder, json.loads(json.dumps(identity)), shard_tokens)
                build.run(chunks, tokenizer, held_out, workers, total)
    made = read_shards(folder)
    if differing := [
        key for key in identity if made.manifest.get(key) != json.loads(json.dumps(identity[key]))
    ]:
        made.check_tokenizer(tokenizer)
        raise DataError(
            f"{folder} holds shards of something else: {', '.join(differing)} differ. Name another folder, or delete it."
        )
    return made


class _Open:
    """A shard that is being filled."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_tokens = 0
        self._found: list[EncodedChunk] = []

    def add(self, found: EncodedChunk) -> None:
        if len(found.sizes):
            self._found.append(found)
            self.num_tokens += len(found.ids)

    def closed(self, dtype: np.dtype[Any]) -> Shard:
        tokens = _joined([found.ids for found in self._found], dtype)
        sizes = _joined([found.sizes for found in self._found], np.dtype(np.int64))
        num_bytes = sum(int(found.num_bytes.sum()) for found in self._found)
        ends = np.cumsum(sizes, dtype=np.int64)
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
        return Shard(tokens, ends, record)


class _Build:
    """A folder of shards under way."""

    def __init__(self, folder: Path, identity: dict[str, Any], shard_tokens: int) -> None:
        self._folder, self._identity, self._shard_tokens = folder, identity, shard_tokens
        self._dtype = np.dtype(identity["dtype"])
        for abandoned in (*folder.glob("*.partial"), *folder.glob(f"*{PARTIAL}*")):
            abandoned.unlink()
        journal = _read_json(folder / JOURNAL) if (folder / JOURNAL).is_file() else {}
        goes_on = journal.get("identity") == identity and journal.get("cursor") is not None
        standing = journal if goes_on and _is_ours(journal, folder / JOURNAL) else {}
        self.parts: dict[str, list[dict[str, Any]]] = standing.get(
            "parts", {TRAIN: [], VALIDATION: []}
        )
        self.cursor: Any = standing.get("cursor")
        self.round: int = standing.get("round", 0)
        self._reopen()

    def run(
        self, chunks: Chunks, tokenizer: Tokenizer, held_out: float, workers: int, total: int | None
    ) -> None:
        began, done, cursor = time.monotonic(), 0, self.cursor
        with progress(total, "tokenizing", start=self._sum("documents")) as bar:
            for chunk, found in encode_chunks(
                chunks(cursor), tokenizer, held_out=held_out, workers=workers
            ):
                if not done:
                    check_round_trip(tokenizer, chunk.texts)
                for part, opened in self._opened.items():
                    opened.add(found.select(held_out=part == VALIDATION))
                done, cursor = done + len(found.ids), chunk.cursor
                bar.advance(
                    len(chunk.texts),
                    tokens=done,
                    tokens_per_second=done / max(1e-9, time.monotonic() - began),
                )
                if sum(opened.num_tokens for opened in self._opened.values()) >= self._shard_tokens:
                    self._close(cursor)
        if any(opened.num_tokens for opened in self._opened.values()):
            self._close(cursor)
        if not self._sum("tokens"):
            raise DataError("The source gave no token. Give texts that are not empty.")
        self._finish(tokenizer)

    def _reopen(self) -> None:
        self._opened = {part: _Open(f"{part}_{self.round:05}") for part in PARTS}

    def _sum(self, what: str) -> int:
        return sum(record[what] for records in self.parts.values() for record in records)

    def _close(self, cursor: Any) -> None:
        """Write both shards, then the journal that knows them: a kill in between leaves files that are written again."""
        for part, opened in self._opened.items():
            shard = opened.closed(self._dtype)
            if shard.record.documents:
                sums = [
                    _write_array(self._folder / f"{opened.name}.{kind}.npy", array)
                    for kind, array in zip(KINDS, (shard.tokens, shard.ends))
                ]
                self.parts[part].append(
                    asdict(replace(shard.record, tokens_sha256=sums[0], ends_sha256=sums[1]))
                )
        self.round += 1
        self.cursor = cursor
        journal = {
            "identity": self._identity,
            "parts": self.parts,
            "cursor": cursor,
            "round": self.round,
        }
        write_atomic(self._folder / JOURNAL, json.dumps(journal), sync=True)
        self._reopen()

    def _finish(self, tokenizer: Tokenizer) -> None:
        num_tokens = self._identity["tokenizer"]["num_tokens"]
        manifest = {**self._identity, "parts": self.parts}
        for part in PARTS:
            shards = (
                Shard(
                    np.load(self._folder / f"{record['name']}.tokens.npy", mmap_mode="r"),
                    _NO_ENDS,
                    ShardRecord(**record),
                )
                for record in self.parts[part]
            )
            _write_array(self._folder / f"{part}.counts.npy", _counts(shards, num_tokens))
        tokenizer.save(str(self._folder / "tokenizer.json"))
        made = Shards(self._folder, manifest)
        manifest["overlap"] = find_overlap(
            made.stream(TRAIN), made.stream(VALIDATION), self._folder
        )
        write_atomic(self._folder / MANIFEST, json.dumps(manifest, indent=1), sync=True)
        (self._folder / JOURNAL).unlink(missing_ok=True)


def _is_ours(journal: Mapping[str, Any], path: Path) -> bool:
    """Whether a journal describes shards as a build writes them; a damaged one is passed over, and all is done again."""
    try:
        check_manifest({**journal["identity"], "parts": journal["parts"]}, path)
    except (DataError, KeyError):
        return False
    return _is_count(journal.get("round"))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable_error(folder, error) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    try:
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise not_writable_error(folder, error) from error
    with lock:
        lock_file(lock, patience=math.inf)
        yield


def _cumulated(sizes: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *sizes], dtype=np.int64)


def _joined(arrays: list[Any], dtype: np.dtype[Any]) -> Any:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _counts(shards: Iterable[Shard], num_tokens: int) -> NDArray[np.int64]:
    counts = np.zeros(num_tokens, np.int64)
    for shard in shards:
        for start in range(0, len(shard.tokens), 2**22):  # counting makes 64-bit copies
            counts += np.bincount(shard.tokens[start : start + 2**22], minlength=num_tokens)
    return counts


def _mapped(path: Path, dtype: np.dtype[Any], size: int) -> Any:
    """A one-dimensional array of that type and size; one without entries cannot be mapped and is read."""
    try:
        array = np.load(path, mmap_mode="r" if size else None)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    if array.dtype != dtype or array.shape != (size,):
        raise _damaged(path, f"it holds {array.dtype} {array.shape}, and {dtype} ({size},) is due")
    return array.view(
        np.ndarray
    )  # a plain view of the same memory: slices of a memmap object are slow


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"The shard {path} is damaged: {what}. Copy it again from where the shards were made; or delete the folder "
        f"{path.parent} and tokenize anew: the same command does it."
    )


def _write_array(path: Path, array: NDArray[Any]) -> str:
    """Write a `.npy` file, whole or not at all; the SHA-256 of the file."""

    with open_atomic(path, sync=True) as file:
        # The bytes of numpy.save, which writes by tofile: its error on a full disk has no errno that tells what it is.
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).data)
    return file_sha256(path)


def _written(path: Path) -> float:
    return path.stat().st_mtime


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    raise DataError(
        f"{path} is damaged. Delete the folder {path.parent}; the same command makes it anew."
    )

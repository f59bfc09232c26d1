"""Encode the documents of a corpus as vectors: a job of any number of processes.

Every process reads the texts in order and claims shards of documents by lock files, which the
operating system releases when a process dies. A claimed shard is encoded, written under a temporary
name and renamed. A shard is done if its file exists and has the expected settings and texts. A
process that finds no free shard waits for the others. At the end one process checks all shards and
writes the manifest, whose content depends on neither the number of processes nor on interruptions.
`ddiff.data.encoded_vectors` describes the files.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ddiff.atomic import NO_LOCKS, PARTIAL, lock_file, original_name, write_atomic
from ddiff.data.corpus import Corpus
from ddiff.data.documents import Documents
from ddiff.data.encoded_vectors import (
    ENDING,
    MANIFEST,
    SETTINGS,
    EncodingSettings,
    Moments,
    VectorShard,
    read_settings,
    read_shard,
    shard_name,
    text_keys,
    write_shard,
)
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.errors import (
    ArgumentError,
    DataError,
    DdiffError,
    NonFiniteError,
    PluginError,
    is_out_of_memory,
    shorten,
)
from ddiff.progress import Progress, show_progress

TEXTS_AT_ONCE = 512  # texts of one call of `encode`, among which an encoder may sort by length
LOCK = ".lock"  # locked while the settings or the manifest are written
_log = logging.getLogger(__name__)


class Encoder(Protocol):
    """Encoder of texts as vectors of a fixed dimension."""

    @property
    def dim(self) -> int:
        """Dimension D of a vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digits that identify the vectors: weights, tokenizer and all settings."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector per text, [n,D].

        A row of NaN means that the text has no vector, for example because it has no known token.
        The vector of a text must not depend on the other texts, except for rounding.
        """
        ...


@runtime_checkable
class TokenEncoder(Encoder, Protocol):
    """Encoder that may give several vectors per text, for example one per token.

    `encode` returns [n,P,D]. The vectors of a text come first, and the rows after them are NaN.
    """

    @property
    def positions(self) -> int | None:
        """Largest number P of vectors of a text; None: one vector per text, as `Encoder`."""
        ...


def get_positions(encoder: Encoder) -> int | None:
    """Return the largest number of vectors of a text; None for an encoder of one vector."""
    return encoder.positions if isinstance(encoder, TokenEncoder) else None


class Shard(NamedTuple):
    """Consecutive documents that are encoded into one file.

    Args:
        part: "train" or "validation".
        number: number of the shard in its part.
        texts: texts of the documents.
    """

    part: str
    number: int
    texts: list[str]

    @property
    def name(self) -> str:
        return shard_name(self.part, self.number)


class EncodingResult(NamedTuple):
    """Result of a job.

    Args:
        manifest: content of `manifest.json`.
        encoded: number of texts that this process encoded.
        seconds: duration of the job in this process.
        was_finished: whether a valid manifest existed before.
    """

    manifest: dict[str, Any]
    encoded: int
    seconds: float
    was_finished: bool


def check_vector_folder(folder: Path) -> None:
    """Raise ArgumentError if a folder holds files that no encoding job wrote."""
    if not folder.is_dir() or (folder / SETTINGS).is_file():
        return
    foreign = sorted(path.name for path in folder.iterdir() if not _is_own_name(path.name))
    if foreign:
        raise ArgumentError(
            f"{folder} has no {SETTINGS} of an encoding job, but other files, such as "
            f"{shorten(foreign[0])}. Use an empty folder or a new name."
        )


def _is_own_name(name: str) -> bool:
    return name == LOCK or original_name(name) in (SETTINGS, MANIFEST)


@final
class EncodingJob:
    """Job that encodes all documents of a corpus into a folder.

    Args:
        folder: output folder on this machine.
        documents: the corpus; its parts must have texts.
        encoder: the encoder.
        settings: settings of the job, with the fingerprint, dimension and positions of `encoder`.
        label: beginning of messages about the encoder, such as "[encoder]".
    """

    def __init__(
        self,
        folder: Path,
        documents: Documents | Corpus,
        encoder: Encoder,
        settings: EncodingSettings,
        label: str = "encoder",
    ) -> None:
        self.folder = folder
        self.settings = settings
        self._documents = documents
        self._encoder = encoder
        self._label = label
        self._encoded = 0
        self._known_sizes = self._find_sizes()

    def run(self) -> EncodingResult:
        """Encode all shards that are not done, and write the manifest.

        Raises DataError, before anything is written, if the folder was made with other settings.
        """
        began = time.monotonic()
        self._prepare_folder()
        was_finished = (self.folder / MANIFEST).is_file()
        total = sum(self._known_sizes.values()) or None
        with show_progress(total, "encoding", start=self._count_done()) as bar:
            report = _Report(bar, self._count_done)
            manifest = None
            # again if the last check finds a damaged shard
            while manifest is None:
                sizes = self._encode_shards(report)
                manifest = self._finish(sizes, was_finished)
        seconds = time.monotonic() - began
        return EncodingResult(manifest, self._encoded, seconds, was_finished)

    # ------------------------------------------------------------------ the folder

    def _prepare_folder(self) -> None:
        """Create the folder with its settings, or check the settings of an existing folder."""
        check_vector_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _lock(self.folder / LOCK, math.inf):
            existing = read_settings(self.folder)
            if existing is None:
                text = json.dumps(self.settings.to_dict(), indent=1)
                write_atomic(self.folder / SETTINGS, text, sync=True)
                return
        differences = existing.differences(self.settings)
        if differences:
            raise DataError(
                f"{self.folder} was encoded with other settings: {'; '.join(differences)}. Use "
                "another folder (--out), restore the settings, or delete the folder."
            )
        # The description may differ, such as the path of the same model. The first one is kept.
        self.settings = existing

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{ENDING}"

    def _count_done(self) -> int:
        """Count the documents of the existing shards."""
        size = self.settings.shard_size
        existing = self.folder.glob(f"*{ENDING}")
        return sum(self._known_sizes.get(path.name, size) for path in existing)

    def _find_sizes(self) -> dict[str, int]:
        """Return the number of documents of each shard by file name.

        The result is empty for a corpus whose number of documents is unknown until it is read.
        """
        sizes: dict[str, int] = {}
        if not isinstance(self._documents, Documents):
            return sizes
        size = self.settings.shard_size
        for part, documents in self._parts():
            total = min(len(documents), self.settings.max_samples or len(documents))
            for number, start in enumerate(range(0, total, size)):
                name = shard_name(part, number)
                sizes[self._path(name).name] = min(size, total - start)
        return sizes

    def _parts(self) -> tuple[tuple[str, Any], ...]:
        return (TRAIN, self._documents.train), (VALIDATION, self._documents.validation)

    # ------------------------------------------------------------------ shards

    def _read_shards(self) -> Iterator[Shard]:
        """Read all texts, in shards."""
        for part, documents in self._parts():
            texts = islice(iter(documents["text"]), self.settings.max_samples)
            number = 0
            while block := list(islice(texts, self.settings.shard_size)):
                yield Shard(part, number, block)
                number += 1

    def _encode_shards(self, report: _Report) -> dict[str, list[int]]:
        """Encode until all shards are done, and return the sizes of the shards by part."""
        while True:
            sizes: dict[str, list[int]] = {TRAIN: [], VALIDATION: []}
            claimed_by_others = []
            for shard in self._read_shards():
                sizes[shard.part].append(len(shard.texts))
                keys = text_keys(shard.texts)
                if not self._is_done(shard, keys) and not self._encode_if_free(shard, keys, report):
                    # the texts are not kept, because another process may claim many shards
                    claimed_by_others.append((shard._replace(texts=[]), keys))
            for shard, keys in claimed_by_others:
                # The lock is free when the other process has finished the shard, or has died.
                if not self._is_done(shard, keys):
                    with _lock(self.folder / f"{shard.name}{LOCK}", math.inf):
                        report.refresh()
            if all(self._is_done(shard, keys) for shard, keys in claimed_by_others):
                return sizes

    def _is_done(self, shard: Shard, keys: NDArray[np.uint64]) -> bool:
        """Return whether the file of a shard exists and holds vectors of these texts."""
        try:
            found = read_shard(self._path(shard.name))
        except DataError:
            return False
        is_same_text = np.array_equal(found.keys, keys)
        has_shape = found.vectors.shape == (len(keys), *self.settings.vector_shape)
        return found.fingerprint == self.settings.fingerprint and is_same_text and has_shape

    def _encode_if_free(self, shard: Shard, keys: NDArray[np.uint64], report: _Report) -> bool:
        """Encode a shard, unless another process has claimed it. Return whether it is done."""
        claim = self.folder / f"{shard.name}{LOCK}"
        with _lock(claim) as is_free:
            if not is_free:
                return False
            # another process may have finished the shard between the check and the lock
            if not self._is_done(shard, keys):
                self._remove_damaged(shard.name)
                vectors, lengths = self._encode_shard(shard, report)
                self._write(shard, keys, vectors, lengths)
                report.refresh()
            # A process that waits for this file finds the shard done, so the file can be removed.
            claim.unlink(missing_ok=True)
        return True

    def _remove_damaged(self, name: str) -> None:
        """Remove a damaged shard, with a warning, and partial files of a killed process.

        The caller must hold the lock of the shard `name`, or of the folder.
        """
        if self._path(name).is_file():
            _log.warning(
                "The shard %s is damaged or holds other documents. Its documents are encoded "
                "again.",
                self._path(name),
            )
            self._path(name).unlink(missing_ok=True)
        for path in self.folder.glob(f"{name}{ENDING}{PARTIAL}*"):
            path.unlink(missing_ok=True)

    def _write(
        self,
        shard: Shard,
        keys: NDArray[np.uint64],
        vectors: NDArray[np.float32],
        lengths: NDArray[np.int32],
    ) -> None:
        stored = None if self.settings.positions is None else lengths
        write_shard(
            self._path(shard.name), keys, vectors, lengths > 0, self.settings, lengths=stored
        )

    def _encode_shard(
        self, shard: Shard, report: _Report
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the vectors [n,D] or [n,P,D] of a shard, and the number of each document [n]."""
        vectors = np.zeros((len(shard.texts), *self.settings.vector_shape), np.float32)
        lengths = np.zeros(len(shard.texts), np.int32)
        # Blank texts have no vector: an encoder would give all of them the vector of its padding.
        filled = [row for row, text in enumerate(shard.texts) if text.strip()]
        for start in range(0, len(filled), TEXTS_AT_ONCE):
            rows = np.array(filled[start : start + TEXTS_AT_ONCE])
            found = self._encode_texts(shard, rows)
            is_vector = ~np.isnan(found).all(-1).reshape(len(rows), -1)  # [n,1] or [n,P]
            # rows of NaN stay zero in the file
            vectors[rows] = np.where(np.isnan(found), np.float32(0), found)
            lengths[rows] = is_vector.sum(1)
            self._encoded += len(rows)
            report.refresh(start + len(rows))
        return vectors, lengths

    def _encode_texts(self, shard: Shard, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Call the encoder for some rows of a shard, and check the result."""
        texts = [shard.texts[row] for row in rows]
        try:
            found = np.asarray(self._encoder.encode(texts))
        except DdiffError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DataError(
                f"{self._label}: out of memory while encoding {len(texts)} texts of the shard "
                f"{shard.name} ({shorten(' '.join(str(error).split()))}). Set a smaller batch or "
                "fewer tokens per text in [encoder], or use fewer --processes. Complete shards are "
                "kept."
            ) from error
        expected = (len(texts), *self.settings.vector_shape)
        if found.shape != expected or found.dtype.kind != "f":
            count = self.settings.positions
            each = "one vector" if count is None else f"{count} vectors (positions)"
            raise PluginError(
                f"{self._label}: encode must return a float array {expected}, {each} of dim = "
                f"{self.settings.dim} per text; got {found.dtype} {found.shape}. Fix the encoder."
            )
        self._check_finite(shard, rows, found)
        return found

    def _check_finite(
        self, shard: Shard, rows: NDArray[np.int64], vectors: NDArray[np.float32]
    ) -> None:
        """Raise NonFiniteError for a vector with some values that are infinite or NaN.

        Raises PluginError for a vector after a row of NaN, which ends the vectors of a text.
        """
        flat = vectors.reshape(len(vectors), -1, vectors.shape[-1])
        # a row of NaN is valid: the text has no vector, or no further one
        is_end: Any = np.isnan(flat).all(2)
        is_finite: Any = np.isfinite(flat).all(2)
        is_wrong = (~is_finite & ~is_end).any(1)
        if is_wrong.any():
            row = int(rows[is_wrong][0])
            document = shard.number * self.settings.shard_size + row
            raise NonFiniteError(
                f"{self._label}: the vector of {shard.part} document {document} "
                f"({shorten(shard.texts[row], 60)!r}) has infinite or NaN values. Use an encoder "
                "with finite vectors for this text, or remove the document."
            )
        if (is_end[:, :-1] & ~is_end[:, 1:]).any():
            raise PluginError(
                f"{self._label}: encode must return the vectors of a text first, and rows of NaN "
                "after them; got a vector after a row of NaN. Fix the encoder."
            )

    # ------------------------------------------------------------------ manifest

    def _finish(self, sizes: dict[str, list[int]], was_finished: bool) -> dict[str, Any] | None:
        """Check all shards, and write the manifest unless it is already correct.

        Returns None if a shard is damaged. The damaged file is removed, to be encoded again.

        Args:
            sizes: numbers of documents of the shards, by part.
            was_finished: whether the manifest is older than this job, so that it must be checked.
        """
        path = self.folder / MANIFEST
        with _lock(self.folder / LOCK, math.inf):
            self._remove_leftovers()
            if path.is_file() and not was_finished:
                # another process of this job has checked the shards and written the manifest
                return json.loads(path.read_bytes())
            manifest = self._make_manifest(sizes)
            if manifest is None:
                return None
            text = json.dumps(manifest, indent=1)
            if not path.is_file() or path.read_text() != text:
                write_atomic(path, text, sync=True)
            return manifest

    def _remove_leftovers(self) -> None:
        """Remove lock files of shards, which are all done, and partial files of the manifest."""
        leftovers = [path for path in self.folder.glob(f"*{LOCK}") if path.name != LOCK]
        leftovers += self.folder.glob(f"*.json{PARTIAL}*")
        for path in leftovers:
            path.unlink(missing_ok=True)

    def _make_manifest(self, sizes: dict[str, list[int]]) -> dict[str, Any] | None:
        """Read all shards and return the manifest; None if a shard is damaged and was removed."""
        moments = Moments(self.settings.dim)
        parts: dict[str, list[dict[str, Any]]] = {}
        for part, documents in sizes.items():
            parts[part] = []
            for number in range(len(documents)):
                found = self._read_intact(shard_name(part, number))
                if found is None:
                    return None
                if part == TRAIN:
                    moments.add(found.valid_vectors())
                missing = int((~found.present).sum())
                record = {"documents": len(found.keys), "missing": missing, "sha256": found.sha256}
                parts[part].append(record)
        return {
            **self.settings.to_dict(),
            "documents": {part: sum(count) for part, count in sizes.items()},
            "missing": {
                part: sum(record["missing"] for record in records)
                for part, records in parts.items()
            },
            "mean": moments.mean.tolist(),
            "std": moments.std.tolist(),
            "parts": parts,
        }

    def _read_intact(self, name: str) -> VectorShard | None:
        """Read a shard and compare its checksum. A damaged file is removed; then return None."""
        with suppress(DataError):
            found = read_shard(self._path(name))
            if found.is_intact():
                return found
        self._remove_damaged(name)
        return None


class _Report:
    """Progress of all processes of a job, from the number of existing shards.

    Args:
        bar: progress bar.
        count_done: function that counts the documents of the existing shards.
    """

    def __init__(self, bar: Progress, count_done: Callable[[], int]) -> None:
        self._bar = bar
        self._count_done = count_done
        self._shown = count_done()
        self._at_start = self._shown
        self._began = time.monotonic()

    def refresh(self, unfinished: int = 0) -> None:
        """Update the bar. `unfinished`: texts that are encoded, but not yet in a file."""
        done = self._count_done() + unfinished
        new = max(0, done - self._shown)
        seconds = max(1e-9, time.monotonic() - self._began)
        self._shown += new
        self._bar.advance(new, texts_per_second=(self._shown - self._at_start) / seconds)


@contextmanager
def _lock(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Lock a file in a `with` block, and return whether the lock was acquired.

    On a file system without locks the result is True. Processes may then encode a shard twice,
    which costs time and does not change the files.
    """
    with path.open("a") as file:
        try:
            is_locked = lock_file(file, patience)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            is_locked = True
        yield is_locked

"""A folder of files that are written once and then sealed: size and SHA-256 of each, in a marker that is written last.

Without its marker the folder counts for nothing, so files go straight to their places: a store of objects cannot rename.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Protocol, final

from fsspec.implementations.local import LocalFileSystem

from ddiff.errors import CheckpointError

FORMAT = 2
MARKER = "complete.json"
BLOCK = 1 << 24  # bytes that are hashed, read and written at a time


class Seal(NamedTuple):
    """What a file must be: so many bytes with this SHA-256."""

    bytes: int
    sha256: str


class Sink(Protocol):
    """Where a file's bytes go."""

    def write(self, data: bytes | memoryview, /) -> Any: ...


@final
class Folder:
    """A sealed folder, or one that shall be; `remedy` says what to do where it is damaged."""

    def __init__(self, fs: Any, path: str, remedy: Callable[[], str]) -> None:
        self._fs, self.path, self._remedy = fs, path, remedy
        self._seals: dict[str, Seal] | None = None

    @property
    def complete(self) -> bool:
        return self._fs.exists(f"{self.path}/{MARKER}")

    # ------------------------------------------------------------------ writing

    def make(self) -> None:
        """Empty, whatever stood there."""
        self.remove()
        self._fs.makedirs(self.path, exist_ok=True)

    def remove(self) -> None:
        if self.complete:  # first, so that a half-removed folder is an incomplete one
            self._fs.rm(f"{self.path}/{MARKER}")
        if self._fs.exists(self.path):
            self._fs.rm(self.path, recursive=True)

    def write(self, name: str, fill: Callable[[Sink], None]) -> Seal:
        """Write a file by `fill(sink)`."""
        with self._fs.open(f"{self.path}/{name}", "wb") as file:
            sink = _Sealing(file)
            fill(sink)
            self._reach_the_disk(file)
        return sink.seal

    def mark(self, step: int, seals: Mapping[str, Seal]) -> None:
        """All files are written: from now on the folder counts."""
        files = {name: seal._asdict() for name, seal in sorted(seals.items())}
        marker = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1).encode()
        path = f"{self.path}/{MARKER}"
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(path, marker)  # an object is there whole or not at all
            return
        # A file is there as soon as it is opened, and empty until it is written; to rename one on a disk is one act.
        with open(f"{path}.part", "wb") as file:
            file.write(marker)
            self._reach_the_disk(file)
        os.replace(f"{path}.part", path)

    def _reach_the_disk(self, file: IO[bytes]) -> None:
        if isinstance(self._fs, LocalFileSystem):  # the marker must not get there before what it speaks of
            file.flush()
            os.fsync(file.fileno())

    # ------------------------------------------------------------------ reading

    def check(self) -> None:
        """Raises CheckpointError unless every file is there in its size; the marker alone is read."""
        self._fs.invalidate_cache(self.path)
        there = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in self._fs.ls(self.path, detail=True)}
        for name, seal in self.seals.items():
            if name not in there:
                raise CheckpointError(
                    f"{self.path}/{name} is missing though its checkpoint was completed. {self._remedy()}"
                )
            if there[name] != seal.bytes:
                raise CheckpointError(
                    f"{self.path}/{name} has {there[name]} bytes and was completed with {seal.bytes}: it was cut off or "
                    f"replaced later. {self._remedy()}"
                )

    @property
    def seals(self) -> dict[str, Seal]:
        if self._seals is None:
            self._seals = self._read_marker()
        return self._seals

    def read(self, name: str) -> bytes:
        """A whole file; CheckpointError where it is damaged."""
        return b"".join(self.chunks(name, [(0, self.seals[name].bytes)]))

    def chunks(self, name: str, places: Sequence[tuple[int, int]]) -> Iterator[bytearray]:
        """The bytes of each (begin, length) of a file, in ascending order and apart from one another.

        The file is read once and whole. CheckpointError after the last chunk when its SHA-256 is not the sealed one.
        """
        if name not in self.seals:
            raise CheckpointError(
                f"{self.path} has no file {name} that its marker knows, though another file of it says so: it was changed "
                f"later. {self._remedy()}"
            )
        if any(begin + length > self.seals[name].bytes for begin, length in places):
            raise CheckpointError(
                f"{self.path}/{name} has {self.seals[name].bytes} bytes, and a tensor is said to lie beyond them: the "
                f"manifest was changed later. {self._remedy()}"
            )
        digest, at = hashlib.sha256(), 0
        with self._fs.open(f"{self.path}/{name}", "rb") as file:
            for begin, length in places:
                for skipped in _blocks(file, begin - at):
                    digest.update(skipped)
                data = bytearray(length)
                _read_into(file, memoryview(data))
                digest.update(data)
                yield data
                at = begin + length
            for skipped in _blocks(file, self.seals[name].bytes - at):
                digest.update(skipped)
        if digest.hexdigest() != self.seals[name].sha256:
            raise CheckpointError(
                f"{self.path}/{name} is damaged: its SHA-256 is not the recorded one. {self._remedy()}"
            )

    def _read_marker(self) -> dict[str, Seal]:
        path = f"{self.path}/{MARKER}"
        try:
            marker = json.loads(self._fs.cat_file(path))
            found, seals = marker["format"], marker["files"]
            if found == FORMAT:
                if outside := [name for name in seals if "/" in name or "\\" in name or name in ("", ".", "..")]:
                    raise ValueError(f"{outside[0]!r} is no file of the folder")
                return {name: Seal(int(seal["bytes"]), str(seal["sha256"])) for name, seal in seals.items()}
            found = int(found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: it is no checkpoint marker. {self._remedy()}") from error
        raise CheckpointError(
            f"{path} has format {found}; this ddiff reads format {FORMAT} alone: it was written by "
            f"{'an older' if found < FORMAT else 'a newer'} ddiff. Go on with that one, or start anew with --fresh."
        )


class _Sealing:
    """A file open for writing; what goes through is counted and hashed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            self._hash.update(block)
            self._file.write(block)
        self._bytes += len(view)

    @property
    def seal(self) -> Seal:
        return Seal(self._bytes, self._hash.hexdigest())


def _blocks(file: IO[bytes], length: int) -> Iterator[memoryview]:
    """The next `length` bytes, each block until the next is asked for."""
    block = memoryview(bytearray(min(length, BLOCK)))
    while length > 0:
        part = block[: min(length, BLOCK)]
        _read_into(file, part)
        yield part
        length -= len(part)


def _read_into(file: Any, view: memoryview) -> None:
    """Fill `view`; a file that has become shorter leaves the rest as it is, and its SHA-256 tells."""
    while len(view) and (count := file.readinto(view)):
        view = view[count:]

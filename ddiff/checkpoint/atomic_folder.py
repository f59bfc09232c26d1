"""A folder of files that are written once and then sealed: size and SHA-256 of each, in a marker that is written last.

Without its marker the folder counts for nothing, so files go straight to their places: a store of objects cannot rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Protocol, final

from fsspec.implementations.local import LocalFileSystem

from ddiff.atomic import write_atomic
from ddiff.errors import CheckpointError

FORMAT = 2
MARKER = "complete.json"
STATE = "state.json"
STEP = re.compile(r"step_(\d{8,})")
_OWN = re.compile(
    r"[\w.]+\.safetensors|(manifest|state)\.json"
)  # of a checkpoint that was cut short
BLOCK = 1 << 24  # bytes that are hashed, read and written at a time


class Seal(NamedTuple):
    """What a file must be: so many bytes with this SHA-256."""

    bytes: int
    sha256: str


class Sink(Protocol):
    """Where a file's bytes go."""

    def write(self, data: bytes | memoryview, /) -> Any: ...


def complete_steps(fs: Any, root: str) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    if not fs.isdir(root):
        return []
    fs.invalidate_cache(root)
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)]
    steps = [int(match[1]) for name in names if (match := STEP.fullmatch(name))]
    return sorted(step for step in steps if fs.exists(f"{root}/{step_name(step)}/{MARKER}"))


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def newest_state(root: str) -> dict[str, Any] | None:
    """The plain values of the newest checkpoint's state, read without torch; None without a checkpoint.

    Raises CheckpointError when the file is damaged.
    """
    fs = LocalFileSystem()
    steps = complete_steps(fs, root)
    if not steps:
        return None
    folder = Folder(
        fs,
        f"{root}/{step_name(steps[-1])}",
        lambda: "Repeat `ddiff run` with the recipe of that run.",
    )
    return json.loads(folder.read(STATE))["state"]


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
        """Make the folder, without files of an earlier checkpoint."""
        self.remove()
        self._fs.makedirs(self.path, exist_ok=True)

    def remove(self) -> None:
        """Delete the checkpoint's files, and the folder unless something else stands in it."""
        sealed = self._sealed_names()
        if self.complete:  # first, so that a half-removed folder is an incomplete one
            self._fs.rm(f"{self.path}/{MARKER}")
        if not self._fs.exists(self.path):
            return
        self._fs.invalidate_cache(self.path)
        entries = self._fs.ls(self.path, detail=True)
        own = [entry["name"] for entry in entries if _is_own(entry, sealed)]
        if len(own) == len(entries):
            self._fs.rm(self.path, recursive=True)
        elif own:
            self._fs.rm(own)

    def _sealed_names(self) -> set[str]:
        """The files that the marker names; none where there is no marker, or a damaged one."""
        try:
            return set(self.seals) if self.complete else set()
        except CheckpointError:
            return set()

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
        # A file exists as soon as it is opened, empty until it is written; to rename one is a single act.
        write_atomic(path, marker, system=self._fs, sync=True)

    def _reach_the_disk(self, file: IO[bytes]) -> None:
        if isinstance(
            self._fs, LocalFileSystem
        ):  # the marker must not get there before what it speaks of
            file.flush()
            os.fsync(file.fileno())

    # ------------------------------------------------------------------ reading

    def check(self) -> None:
        """Raises CheckpointError unless every file is there in its size; the marker alone is read."""
        self._fs.invalidate_cache(self.path)
        there = {
            entry["name"].rsplit("/", 1)[-1]: entry["size"]
            for entry in self._fs.ls(self.path, detail=True)
        }
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
        size = self.seals[name].bytes if name in self.seals else 0
        return b"".join(self.chunks(name, [(0, size)]))

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
        with self._opened(name) as file:
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

    def _opened(self, name: str) -> Any:
        """A file of the folder, open for reading; CheckpointError when there is none, or a folder, or no access."""
        if name not in self.seals:
            raise CheckpointError(
                f"{self.path}/{MARKER} is damaged: it does not list {name}, which every checkpoint has. {self._remedy()}"
            )
        try:
            return self._fs.open(f"{self.path}/{name}", "rb")
        except OSError as error:
            raise CheckpointError(
                f"{self.path}/{name} cannot be read ({error.strerror or error}). {self._remedy()}"
            ) from error

    def _read_marker(self) -> dict[str, Seal]:
        path = f"{self.path}/{MARKER}"
        try:
            marker = json.loads(self._fs.cat_file(path))
        except (OSError, ValueError, RecursionError) as error:
            raise self._no_marker() from error
        if not isinstance(marker, dict) or not _is_count(marker.get("format")):
            raise self._no_marker()
        found, files = marker["format"], marker.get("files")
        if found != FORMAT:
            raise CheckpointError(
                f"{path} has format {found}; this ddiff reads format {FORMAT} alone: it was written by "
                f"{'an older' if found < FORMAT else 'a newer'} ddiff. Go on with that one, or start anew with --fresh."
            )
        if not isinstance(files, dict) or not files or not all(map(_is_seal, files.values())):
            raise self._no_marker()
        if any("/" in name or "\\" in name or name in ("", ".", "..") for name in files):
            raise self._no_marker()
        return {name: Seal(seal["bytes"], seal["sha256"]) for name, seal in files.items()}

    def _no_marker(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}/{MARKER} is damaged: it is no checkpoint marker. {self._remedy()}"
        )


def _is_own(entry: dict[str, Any], sealed: set[str]) -> bool:
    """Whether an entry of a listing is a file of the checkpoint: one of those `sealed`, or named as if it were."""
    name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
    is_named = name in sealed if sealed else _OWN.fullmatch(name) is not None
    return entry["type"] == "file" and (is_named or name.startswith(MARKER))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_seal(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_count(value.get("bytes"))
        and isinstance(value.get("sha256"), str)
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

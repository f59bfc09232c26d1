"""Folder of files that is complete only if it contains a marker file.

The marker is written last, and contains the size and the SHA-256 of every other file. A folder
without a marker is incomplete. No file has to be renamed, so that the folder can also be on an
object store, which cannot rename files atomically.
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
# Names of checkpoint files. They identify the files of a folder without a marker.
_OWN = re.compile(r"[\w.]+\.safetensors|(manifest|state)\.json")
BLOCK = 1 << 24  # number of bytes that are hashed, read or written at a time


class FileDigest(NamedTuple):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class Writable(Protocol):
    """An object with the `write` method of a binary file."""

    def write(self, data: bytes | memoryview, /) -> Any: ...


def complete_steps(fs: Any, root: str) -> list[int]:
    """List the steps of the complete checkpoints in the folder `root`, in ascending order."""
    if not fs.isdir(root):
        return []
    fs.invalidate_cache(root)
    steps: list[int] = []
    for path in fs.ls(root, detail=False):
        match = STEP.fullmatch(base_name(path))
        if match and fs.exists(f"{root}/{step_name(int(match[1]))}/{MARKER}"):
            steps.append(int(match[1]))
    return sorted(steps)


def base_name(path: str) -> str:
    """Return the last component of a path. The path may end with a slash."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def step_name(step: int) -> str:
    """Return the name of the checkpoint folder of a step."""
    return f"step_{step:08d}"


def newest_state(root: str) -> dict[str, Any] | None:
    """Read the state of the newest checkpoint in `root` as JSON values, without importing torch.

    Return None if there is no checkpoint. Raises CheckpointError if the state file is damaged.
    """
    fs = LocalFileSystem()
    steps = complete_steps(fs, root)
    if not steps:
        return None
    folder = AtomicFolder(
        fs,
        f"{root}/{step_name(steps[-1])}",
        lambda: "Repeat `ddiff run` with the recipe of that run.",
    )
    return json.loads(folder.read_file(STATE))["state"]


@final
class AtomicFolder:
    """Folder that is complete once its marker file is written.

    `remedy()` returns the last sentence of each error message about damaged files. The sentence
    tells the user what to do.
    """

    def __init__(
        self,
        fs: Any,
        path: str,
        remedy: Callable[[], str],
    ) -> None:
        self._fs = fs
        self.path = path
        self._remedy = remedy
        self._digests: dict[str, FileDigest] | None = None

    @property
    def is_complete(self) -> bool:
        return self._fs.exists(f"{self.path}/{MARKER}")

    # ------------------------------------------------------------------ writing

    def create(self) -> None:
        """Create an empty folder. If it exists, the files of an earlier checkpoint are deleted."""
        self.remove()
        self._fs.makedirs(self.path, exist_ok=True)

    def remove(self) -> None:
        """Delete the files of the checkpoint, and the folder if no other file is left."""
        listed = self._listed_names()
        # The marker is deleted first, so that a partly deleted checkpoint counts as incomplete.
        if self.is_complete:
            self._fs.rm(f"{self.path}/{MARKER}")
        if not self._fs.exists(self.path):
            return
        self._fs.invalidate_cache(self.path)
        entries = self._fs.ls(self.path, detail=True)
        own = [entry["name"] for entry in entries if _is_own(entry, listed)]
        if len(own) == len(entries):
            self._fs.rm(self.path, recursive=True)
        elif own:
            self._fs.rm(own)

    def _listed_names(self) -> set[str]:
        """Return the file names in the marker file, or an empty set if it cannot be read."""
        try:
            return set(self.digests) if self.is_complete else set()
        except CheckpointError:
            return set()

    def write_file(self, name: str, fill: Callable[[Writable], None]) -> FileDigest:
        """Write the file `name` by calling `fill(file)`, and return its digest."""
        with self._fs.open(f"{self.path}/{name}", "wb") as file:
            writer = _HashingWriter(file)
            fill(writer)
            if isinstance(self._fs, LocalFileSystem):
                # The marker must not reach the disk before the files that the marker lists.
                file.flush()
                os.fsync(file.fileno())
        return writer.digest

    def mark_complete(self, step: int, digests: Mapping[str, FileDigest]) -> None:
        """Write the marker file. Call this method after all other files are written.

        `step`: training step of the checkpoint. `digests`: size and SHA-256 of each file by name.
        """
        files = {name: digest._asdict() for name, digest in sorted(digests.items())}
        content = {"format": FORMAT, "step": step, "files": files}
        marker = json.dumps(content, indent=1).encode()
        path = f"{self.path}/{MARKER}"
        if isinstance(self._fs, LocalFileSystem):
            # A local file exists, still empty, as soon as it is opened; a rename is atomic.
            write_atomic(path, marker, system=self._fs, sync=True)
        else:
            self._fs.pipe_file(path, marker)  # object stores create an object atomically

    # ------------------------------------------------------------------ reading

    def check(self) -> None:
        """Raise CheckpointError unless every file exists with the size recorded in the marker file.

        Only the marker file is read.
        """
        self._fs.invalidate_cache(self.path)
        entries = self._fs.ls(self.path, detail=True)
        sizes = {base_name(entry["name"]): entry["size"] for entry in entries}
        for name, digest in self.digests.items():
            if name not in sizes:
                raise CheckpointError(
                    f"{self.path}/{name} is missing: it was removed after the checkpoint was "
                    f"saved. {self._remedy()}"
                )
            if sizes[name] != digest.bytes:
                raise CheckpointError(
                    f"{self.path}/{name} has {sizes[name]} bytes, but was saved with "
                    f"{digest.bytes} bytes: the file was truncated or replaced later. "
                    f"{self._remedy()}"
                )

    @property
    def digests(self) -> dict[str, FileDigest]:
        """Map the name of each file to its size and SHA-256, as read from the marker."""
        if self._digests is None:
            self._digests = self._read_marker()
        return self._digests

    def read_file(self, name: str) -> bytes:
        """Return the content of the file `name`. Raises CheckpointError if the file is damaged."""
        size = self.digests[name].bytes if name in self.digests else 0
        return b"".join(self.read_ranges(name, [(0, size)]))

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytearray]:
        """Yield the bytes of each range (begin, length) of a file.

        The ranges must be in ascending order and must not overlap. The whole file is read once, to
        compute its SHA-256. After the last range, raises CheckpointError if the SHA-256 differs
        from that in the marker.
        """
        self._check_ranges(name, ranges)
        digest = hashlib.sha256()
        position = 0
        with self._open(name) as file:
            for begin, length in ranges:
                for skipped in _read_blocks(file, begin - position):
                    digest.update(skipped)
                data = bytearray(length)
                _read_into(file, memoryview(data))
                digest.update(data)
                yield data
                position = begin + length
            for skipped in _read_blocks(file, self.digests[name].bytes - position):
                digest.update(skipped)
        if digest.hexdigest() != self.digests[name].sha256:
            raise CheckpointError(
                f"{self.path}/{name} is damaged: its SHA-256 differs from the value in {MARKER}. "
                f"{self._remedy()}"
            )

    def _check_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        if name not in self.digests:
            raise CheckpointError(
                f"{self.path}/{MARKER} does not list the file {name}, which the checkpoint needs: "
                f"the checkpoint was changed after it was saved. {self._remedy()}"
            )
        size = self.digests[name].bytes
        if any(begin + length > size for begin, length in ranges):
            raise CheckpointError(
                f"{self.path}/{name} has {size} bytes, but the manifest places a tensor after the "
                "end of the file: the manifest was changed after the checkpoint was saved. "
                f"{self._remedy()}"
            )

    def _open(self, name: str) -> Any:
        """Open a file for reading.

        Raises CheckpointError if the file is missing, is a folder or cannot be read.
        """
        try:
            return self._fs.open(f"{self.path}/{name}", "rb")
        except OSError as error:
            raise CheckpointError(
                f"{self.path}/{name} cannot be read ({error.strerror or error}). {self._remedy()}"
            ) from error

    def _read_marker(self) -> dict[str, FileDigest]:
        path = f"{self.path}/{MARKER}"
        try:
            marker = json.loads(self._fs.cat_file(path))
        except (OSError, ValueError, RecursionError) as error:
            raise self._no_marker() from error
        if not isinstance(marker, dict) or not _is_count(marker.get("format")):
            raise self._no_marker()
        found = marker["format"]
        if found != FORMAT:
            writer = "an older" if found < FORMAT else "a newer"
            raise CheckpointError(
                f"{path} has format {found}; this ddiff reads only format {FORMAT}: the checkpoint "
                f"was written by {writer} version of ddiff. Use that version, or start over with "
                "`ddiff run` and --fresh."
            )
        files = marker.get("files")
        if not isinstance(files, dict) or not files:
            raise self._no_marker()
        if not all(map(_is_digest, files.values())):
            raise self._no_marker()
        if not all(map(_is_file_name, files)):
            raise self._no_marker()
        digests: dict[str, FileDigest] = {}
        for name, file in files.items():
            digests[name] = FileDigest(file["bytes"], file["sha256"])
        return digests

    def _no_marker(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}/{MARKER} is damaged: its content is not a list of checkpoint files with "
            f"sizes and SHA-256. {self._remedy()}"
        )


def _is_own(entry: dict[str, Any], listed: set[str]) -> bool:
    """Return whether a directory entry is a file of the checkpoint.

    `listed` contains the file names that the marker file of the folder lists. If `listed` is empty,
    every file with a name of the form that ddiff writes is a file of the checkpoint.
    """
    name = base_name(entry["name"])
    has_own_name = name in listed if listed else _OWN.fullmatch(name) is not None
    return entry["type"] == "file" and (has_own_name or name.startswith(MARKER))


def _is_file_name(name: str) -> bool:
    """Return whether `name`, read from a marker, is a file name without a folder."""
    return "/" not in name and "\\" not in name and name not in ("", ".", "..")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_digest(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_count(value.get("bytes"))
        and isinstance(value.get("sha256"), str)
    )


class _HashingWriter:
    """File writer that counts and hashes the written bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            self._hash.update(block)
            self._file.write(block)
        self._bytes += len(view)

    @property
    def digest(self) -> FileDigest:
        return FileDigest(self._bytes, self._hash.hexdigest())


def _read_blocks(file: IO[bytes], length: int) -> Iterator[memoryview]:
    """Yield the next `length` bytes of a file in blocks. Each block overwrites the previous one."""
    block = memoryview(bytearray(min(length, BLOCK)))
    while length > 0:
        part = block[: min(length, BLOCK)]
        _read_into(file, part)
        yield part
        length -= len(part)


def _read_into(file: Any, view: memoryview) -> None:
    """Fill `view` with the next bytes of a file.

    If the file is too short, the rest of `view` remains unchanged, and the SHA-256 will differ.
    """
    while len(view) and (count := file.readinto(view)):
        view = view[count:]

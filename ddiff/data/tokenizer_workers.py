"""Encode chunks of texts as token ids, in this process or in worker processes.

The workers communicate over pipes. A `ProcessPoolExecutor` is not used, for these reasons:

- A forked worker would copy the locks of the threads of torch and of the tokenizers library.
- A spawned worker runs the script of the caller again. A script without
  `if __name__ == "__main__"`, or a script read from standard input, would fail in every worker.
- A spawned worker would outlive a killed parent, because the worker itself has the write end of the
  call queue open. A worker of this module stops at the end of its standard input.
- If a worker is killed, the executor reports neither the worker nor its exit code.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ddiff.data.tokenizer import Tokenizer, Unencodable
from ddiff.errors import ArgumentError, DataError

TRAIN = "train"
VALIDATION = "validation"
DOCUMENTS_AT_ONCE = 64
_AHEAD = 3  # chunks per worker that are queued or being encoded, so that no worker is idle
_WORKER = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from ddiff.data.tokenizer_workers import run_worker; run_worker()"
)


@final
@dataclass(frozen=True)
class Chunk:
    """Chunk of consecutive documents of a source.

    texts: texts of the documents.
    cursor: position in the source after these documents (JSON).
    part: "train" or "validation"; None: the hash of each text decides.
    names: names of the documents for error messages; [] if the documents have no names.
    """

    texts: list[str]
    cursor: Any = None
    part: str | None = TRAIN
    names: list[str] = field(default_factory=list)


@final
@dataclass(frozen=True)
class EncodedChunk:
    """Token ids of k documents.

    ids: array [n], token ids of all documents in order, with end marks.
    sizes: array [k], number of ids of each document.
    num_bytes: array [k], number of UTF-8 bytes of each document.
    held_out: bool array [k], True for validation documents.
    """

    ids: NDArray[np.unsignedinteger]
    sizes: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    held_out: NDArray[np.bool_]

    def select(self, *, held_out: bool) -> EncodedChunk:
        """Return the validation documents if `held_out`, otherwise the training documents."""
        chosen = self.held_out == held_out
        if chosen.all():  # the usual case, without a copy
            return self
        return EncodedChunk(
            ids=self.ids[np.repeat(chosen, self.sizes)],
            sizes=self.sizes[chosen],
            num_bytes=self.num_bytes[chosen],
            held_out=self.held_out[chosen],
        )


def token_dtype(num_tokens: int) -> np.dtype[Any]:
    """Return the smallest dtype for ids below `num_tokens`: uint16 or uint32."""
    return np.dtype(np.uint16 if num_tokens <= 2**16 else np.uint32)


def hash_to_unit(text: bytes) -> float:
    """Hash the text of a document to a number in [0, 1).

    Documents with a number below the held-out fraction are validation documents.
    """
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") / 2**64


def encode_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, *, held_out: float = 0.0, workers: int = 1
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """Yield (chunk, encoded chunk) for each chunk, in the order of `chunks`.

    If `workers` is 1, this process encodes the chunks; otherwise `workers` other processes encode
    them. If `chunk.part` is None, the hash of the text assigns a fraction `held_out` of the
    documents to the validation part.
    """
    if workers < 1:
        raise ArgumentError(f"workers must be a number of processes, at least 1; got {workers}.")
    if workers == 1:
        for first, chunk in _number_documents(chunks):
            encode = partial(encode_chunk, tokenizer, chunk, held_out)
            yield chunk, _locate_errors(encode, chunk, first)
        return
    with _WorkerPool(tokenizer, held_out, workers) as pool:
        pending: deque[tuple[int, Chunk, Future[EncodedChunk]]] = deque()
        for first, chunk in _number_documents(chunks):
            pending.append((first, chunk, pool.submit(chunk)))
            if len(pending) >= _AHEAD * workers:
                yield _await_oldest(pending)
        while pending:
            yield _await_oldest(pending)


def encode_chunk(tokenizer: Tokenizer, chunk: Chunk, held_out: float = 0.0) -> EncodedChunk:
    """Encode the documents of a chunk, each followed by its end mark (the token `eos_id`).

    If `chunk.part` is None, the fraction `held_out` of the documents is marked as held out for
    validation. Raises DataError if the tokenizer returns ids outside 0..num_tokens-1.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    documents = [ids + end for ids in tokenizer.encode(chunk.texts)]
    sizes = np.array([len(ids) for ids in documents], np.int64)
    # The ids have 64 bits until their range is checked, because a cast to fewer bits would wrap
    # around without an error.
    wide = np.fromiter(chain.from_iterable(documents), np.int64, int(sizes.sum()))
    if wide.size and (wide.min() < 0 or wide.max() >= tokenizer.num_tokens):
        raise DataError(
            f"The tokenizer has num_tokens = {tokenizer.num_tokens}, but returned the ids "
            f"{wide.min()}..{wide.max()}. Fix the tokenizer: num_tokens must include added tokens."
        )
    contents = [text.encode() for text in chunk.texts]
    if chunk.part is None:
        is_held_out = np.array([hash_to_unit(content) < held_out for content in contents], bool)
    else:
        is_held_out = np.full(len(contents), chunk.part == VALIDATION)
    return EncodedChunk(
        ids=wide.astype(token_dtype(tokenizer.num_tokens)),
        sizes=sizes,
        num_bytes=np.array([len(content) for content in contents], np.int64),
        held_out=is_held_out,
    )


def run_worker() -> None:
    """Tokenize chunks from standard input and write their token ids to standard output.

    The function returns at the end of the input.
    """
    # Ctrl-C reaches the whole process group. The parent handles it, and closes the input of the
    # workers when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = sys.stdin.buffer
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a tokenizer that prints must not write into the pipe of the results
    tokenizer, held_out = pickle.load(source)
    while True:
        try:
            chunk = pickle.load(source)
        except EOFError:
            return
        result: EncodedChunk | Exception
        try:
            result = encode_chunk(tokenizer, chunk, held_out)
        except DataError as error:
            result = error
        except Exception:  # sent as text, because not every exception can be pickled
            result = RuntimeError(traceback.format_exc())
        try:
            pickle.dump(result, results, pickle.HIGHEST_PROTOCOL)
            results.flush()
        except BrokenPipeError:  # the parent was killed
            os._exit(0)


class _WorkerPool:
    """Pool of worker processes; a thread of this process sends chunks to each worker."""

    def __init__(self, tokenizer: Tokenizer, held_out: float, workers: int) -> None:
        # Each process gets one thread. By default each process would start one thread per
        # processor.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        setup = pickle.dumps(sys.path) + pickle.dumps((tokenizer, held_out))
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(workers)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers)
        # All processes start before the first setup is written, because writing a large setup
        # blocks until the process reads it.
        for process in self._processes:
            self._idle.put(process)
            with suppress(BrokenPipeError):  # the first chunk reports that the worker ended
                _pipe(process.stdin).write(setup)

    def __enter__(self) -> _WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        # Killing the processes ends the reads in which the threads are blocked.
        for process in self._processes:
            process.kill()
            process.wait()
        # A generator that is not finished may be garbage-collected in one of the threads. A thread
        # cannot join itself.
        with suppress(RuntimeError):
            self._threads.shutdown(wait=True)
        for process in self._processes:
            with suppress(BrokenPipeError):
                _pipe(process.stdin).close()
            _pipe(process.stdout).close()

    def submit(self, chunk: Chunk) -> Future[EncodedChunk]:
        return self._threads.submit(self._encode_in_worker, chunk)

    def _encode_in_worker(self, chunk: Chunk) -> EncodedChunk:
        process = self._idle.get()
        try:
            pickle.dump(chunk, _pipe(process.stdin), pickle.HIGHEST_PROTOCOL)
            _pipe(process.stdin).flush()
            result = pickle.load(_pipe(process.stdout))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise DataError(
                f"A tokenizing process ended with exit code {process.wait()}. Possible causes: too "
                "little memory, or a tokenizer that another process cannot import. Set fewer "
                "workers and run the same command to resume after the last complete shard."
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(result, Exception):
            raise result
        return result


def _pipe(pipe: Any) -> Any:
    assert pipe is not None  # typed as optional by subprocess
    return pipe


def _number_documents(chunks: Iterable[Chunk]) -> Iterator[tuple[int, Chunk]]:
    """Yield (document, chunk) for each chunk; `document` is the number of its first document.

    Document numbers count from 0.
    """
    first = 0
    for chunk in chunks:
        yield first, chunk
        first += len(chunk.texts)


def _await_oldest(
    pending: deque[tuple[int, Chunk, Future[EncodedChunk]]],
) -> tuple[Chunk, EncodedChunk]:
    first, chunk, future = pending.popleft()
    return chunk, _locate_errors(future.result, chunk, first)


def _locate_errors(encode: Callable[[], EncodedChunk], chunk: Chunk, first: int) -> EncodedChunk:
    """Return `encode()`; an Unencodable error gets the row and name of the text in the corpus.

    `first` is the index of the first document of `chunk` in the corpus.
    """
    try:
        return encode()
    except Unencodable as error:
        name = chunk.names[error.row] if chunk.names else "the corpus"
        row = first + error.row
        raise error.at(row, f"Row {row} ({name})") from None

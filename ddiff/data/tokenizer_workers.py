"""From chunks of texts to chunks of ids, in this process or in several: the same ids in the same order.

The other processes are started anew and not forked: a fork would copy the threads of torch and of the tokenizers library
half alive, and one by `multiprocessing` would run the caller's script again.
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
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ddiff.data.tokenizer import Tokenizer, Unencodable
from ddiff.errors import ArgumentError, DataError

TRAIN, VALIDATION = "train", "validation"
DOCUMENTS_AT_ONCE = 64
_AHEAD = 3  # chunks under way for each process: one is worked on while others wait
_SERVE = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from ddiff.data.tokenizer_workers import serve; serve()"
)


@final
@dataclass(frozen=True)
class Chunk:
    """Some documents of a source, and the `cursor` (JSON) with which the source goes on after them.

    `part` is theirs, "train" or "validation"; None leaves it to the hash of each text. `names` serve messages.
    """

    texts: list[str]
    cursor: Any = None
    part: str | None = TRAIN
    names: list[str] = field(default_factory=list)


@final
@dataclass(frozen=True)
class EncodedChunk:
    """Documents as ids: all `ids` [n] in order, `sizes` [k] of the documents with their end marks, `num_bytes` [k] of
    their UTF-8 text, and whether they are held out, [k]."""

    ids: NDArray[np.unsignedinteger]
    sizes: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    held_out: NDArray[np.bool_]

    def of(self, held_out: bool) -> EncodedChunk:
        """Those documents that are (not) held out."""
        chosen = self.held_out == held_out
        if chosen.all():
            return self
        return EncodedChunk(
            self.ids[np.repeat(chosen, self.sizes)],
            self.sizes[chosen],
            self.num_bytes[chosen],
            self.held_out[chosen],
        )


def token_dtype(num_tokens: int) -> np.dtype[Any]:
    """The smallest unsigned integers that ids below `num_tokens` fit into: 16 or 32 bits."""
    return np.dtype(np.uint16 if num_tokens <= 2**16 else np.uint32)


def hash_to_unit(text: bytes) -> float:
    """A document's place in [0, 1) by its hash: those below the share held out are for validation."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") / 2**64


def encode_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, *, held_out: float = 0.0, workers: int = 1
) -> Iterator[tuple[Chunk, EncodedChunk]]:
    """Every chunk with its ids, in the order of the chunks whatever the number of `workers` (processes).

    Documents of a chunk without a part are held out with probability `held_out` by the hash of their text.
    """
    if workers < 1:
        raise ArgumentError(f"workers must be at least 1 process; got {workers}.")
    numbered = _numbered(chunks)
    if workers == 1:
        for first, chunk in numbered:
            yield (
                chunk,
                _named(lambda chunk=chunk: encode_chunk(tokenizer, chunk, held_out), chunk, first),
            )
        return
    with _Processes(tokenizer, held_out, workers) as processes:
        waiting: deque[tuple[int, Chunk, Future[EncodedChunk]]] = deque()
        for first, chunk in numbered:
            waiting.append((first, chunk, processes.submit(chunk)))
            if len(waiting) >= _AHEAD * workers:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def encode_chunk(tokenizer: Tokenizer, chunk: Chunk, held_out: float = 0.0) -> EncodedChunk:
    """The ids of a chunk; DataError where the tokenizer gives ids that it does not have."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    documents = [ids + end for ids in tokenizer.encode(chunk.texts)]
    sizes = np.array([len(ids) for ids in documents], np.int64)
    wide = np.fromiter(chain.from_iterable(documents), np.int64, int(sizes.sum()))
    if wide.size and (wide.min() < 0 or wide.max() >= tokenizer.num_tokens):
        raise DataError(
            f"The tokenizer says that it has {tokenizer.num_tokens} tokens, but gave the ids {wide.min()}..{wide.max()}. "
            "Its num_tokens must count added tokens too."
        )
    contents = [text.encode() for text in chunk.texts]
    if chunk.part is None:
        held = np.array([hash_to_unit(content) < held_out for content in contents], bool)
    else:
        held = np.full(len(contents), chunk.part == VALIDATION)
    num_bytes = np.array([len(content) for content in contents], np.int64)
    return EncodedChunk(wide.astype(token_dtype(tokenizer.num_tokens)), sizes, num_bytes, held)


def serve() -> None:
    """What a tokenising process does: read chunks from standard input and answer until there are no more."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the process that asks decides; its end closes our input
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a tokenizer prints is no answer
    tokenizer, held_out = pickle.load(source)
    while True:
        try:
            chunk = pickle.load(source)
        except EOFError:
            return
        answer: EncodedChunk | Exception
        try:
            answer = encode_chunk(tokenizer, chunk, held_out)
        except DataError as error:
            answer = error
        except Exception:
            answer = RuntimeError(traceback.format_exc())
        try:
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:  # who asked was killed
            os._exit(0)


class _Processes:
    """Some tokenising processes, each with a thread here that speaks with it."""

    def __init__(self, tokenizer: Tokenizer, held_out: float, workers: int) -> None:
        # one thread each, or every process would start as many as there are processors
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        hello = pickle.dumps(sys.path) + pickle.dumps((tokenizer, held_out))
        self._running = [
            subprocess.Popen(
                [sys.executable, "-c", _SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(workers)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers)
        for process in self._running:
            self._idle.put(process)
            with suppress(BrokenPipeError):  # one that ended at once is told of when it is asked
                _pipe(process.stdin).write(hello)

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._running:
            process.kill()
            process.wait()
        self._threads.shutdown(wait=True)
        for process in self._running:
            with suppress(BrokenPipeError):
                _pipe(process.stdin).close()
            _pipe(process.stdout).close()

    def submit(self, chunk: Chunk) -> Future[EncodedChunk]:
        return self._threads.submit(self._ask, chunk)

    def _ask(self, chunk: Chunk) -> EncodedChunk:
        process = self._idle.get()
        try:
            pickle.dump(chunk, _pipe(process.stdin), pickle.HIGHEST_PROTOCOL)
            _pipe(process.stdin).flush()
            answer = pickle.load(_pipe(process.stdout))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise DataError(
                f"A tokenising process ended (exit code {process.wait()}): out of memory, or a tokenizer that another "
                "process cannot import? Take fewer workers; the same command goes on from the shards that are whole."
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _pipe(pipe: Any) -> Any:
    assert pipe is not None
    return pipe


def _numbered(chunks: Iterable[Chunk]) -> Iterator[tuple[int, Chunk]]:
    """Each chunk with the number of its first document, counted from where the chunks start."""
    first = 0
    for chunk in chunks:
        yield first, chunk
        first += len(chunk.texts)


def _finished(first: int, chunk: Chunk, answer: Future[EncodedChunk]) -> tuple[Chunk, EncodedChunk]:
    return chunk, _named(answer.result, chunk, first)


def _named(result: Any, chunk: Chunk, first: int) -> EncodedChunk:
    try:
        return result()
    except Unencodable as error:
        name = chunk.names[error.row] if chunk.names else "the corpus"
        raise error.at(first + error.row, f"Row {first + error.row} ({name})") from None

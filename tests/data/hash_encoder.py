"""Deterministic test encoder, and helpers that run encoding jobs in processes."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddiff import ComponentConfig
from ddiff.data.documents import Documents, documents_from_texts, fingerprint_texts
from ddiff.data.encoded_vectors import EncodingSettings
from ddiff.data.encoding import Encoder, EncodingJob, EncodingResult, get_positions

DIM = 4


class HashEncoder:
    """Encoder whose vectors are hashes of the texts, so that they are equal to the last bit.

    `seconds`: duration of encoding one text. `dim` and `fingerprint` are those of an encoder.
    """

    def __init__(self, seconds: float = 0.0, dim: int = DIM, fingerprint: str = "hash") -> None:
        self.seconds = seconds
        self.dim = dim
        self.fingerprint = fingerprint

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        time.sleep(self.seconds * len(texts))
        return np.stack([hash_vector(text, self.dim) for text in texts])


class HashTokenEncoder:
    """Encoder with one vector per word, up to `positions`.

    The word "none" has no vector, and neither have the words after it. The class is also an encoder
    component.
    """

    class Config(ComponentConfig):
        positions: int = 4

    @classmethod
    def build(cls, config: Config) -> HashTokenEncoder:
        return cls(config.positions)

    def __init__(self, positions: int = 4) -> None:
        self.positions = positions
        self.dim = DIM
        self.fingerprint = f"hash of words, {positions}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.full((len(texts), self.positions, self.dim), np.nan, np.float32)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.split()[: self.positions]):
                if word == "none":
                    break
                vectors[row, place] = hash_vector(word)
        return vectors


def hash_vector(text: str, dim: int = DIM) -> NDArray[np.float32]:
    """Return a vector of `dim` numbers in [0,1) that the text determines."""
    digest = hashlib.sha256(text.encode()).digest()
    return np.frombuffer(digest, np.uint8)[:dim].astype(np.float32) / 256


def make_documents(train: int = 60, validation: int = 9) -> Documents:
    """Return documents with different texts."""
    return Documents(
        documents_from_texts(f"training text {number}" for number in range(train)),
        documents_from_texts(f"held-out text {number}" for number in range(validation)),
    )


def make_job(
    folder: Path,
    documents: Documents | None = None,
    encoder: Encoder | None = None,
    *,
    shard_size: int = 7,
    max_samples: int | None = None,
) -> EncodingJob:
    """Return a job that encodes documents into `folder`."""
    documents = documents or make_documents()
    encoder = encoder or HashEncoder()
    settings = EncodingSettings(
        encoder=encoder.fingerprint,
        dim=encoder.dim,
        data={
            "train": fingerprint_texts(documents.train),
            "validation": fingerprint_texts(documents.validation),
        },
        shard_size=shard_size,
        max_samples=max_samples,
        description={"kind": encoder.fingerprint},
        positions=get_positions(encoder),
    )
    return EncodingJob(folder, documents, encoder, settings, label="[encoder]")


def run_job(folder: Path, **arguments: object) -> EncodingResult:
    """Run the job of `make_job` in this process."""
    return make_job(folder, **arguments).run()


def fork_job(job: EncodingJob) -> int:
    """Run a job in a forked process, and return its process id. The exit code is 0 on success.

    A forked process starts in milliseconds, because all modules are imported.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        job.run()
        code = 0
    finally:
        os._exit(code)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder by name, except that of the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}

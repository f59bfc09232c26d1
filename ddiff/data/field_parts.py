"""Training and validation parts of samples of several fields, and fingerprints of their files."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddiff.data.cache import fingerprint
from ddiff.data.documents import file_fingerprint
from ddiff.data.overlap import check_overlap
from ddiff.data.paths import file_version
from ddiff.errors import ArgumentError, DataError

HASHED = 2**30  # bytes; larger sets of files are identified by name, size and modification time

Numbers = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def hash_key(key: bytes) -> int:
    """Return the first 8 bytes of the SHA-256 of a key, as an integer."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little")


def hash_keys(keys: Iterable[bytes]) -> Hashes:
    """Return the hash of each key, uint64 [N]."""
    return np.array(array("Q", map(hash_key, keys)), np.uint64)


def split_samples(hashes: Hashes, held_out: float, source: str) -> tuple[Numbers, Numbers]:
    """Hold out a fraction of samples by the hashes of their keys.

    Samples with equal keys are in the same part, and further samples move no sample to the other
    part. A text is held out by the same rule in `split_documents`.

    Args:
        hashes: hash of the key of each sample, for example of its text.
        held_out: fraction in (0,1) of the samples for validation.
        source: name of the samples in messages.

    Returns the numbers of the training samples and of the validation samples. Raises DataError if
    one of the two is empty.
    """
    if not 0 < held_out < 1:
        raise ArgumentError(
            f"{source}: held_out must lie in (0, 1); got {held_out}. Set held_out, or name "
            "validation samples."
        )
    is_held_out = hashes / 2.0**64 < held_out
    train = np.flatnonzero(~is_held_out)
    validation = np.flatnonzero(is_held_out)
    if not len(train) or not len(validation):
        raise DataError(
            f"{source}: {len(is_held_out)} sample(s) cannot be divided with held_out = "
            f"{held_out}: {len(train)} for training and {len(validation)} for validation. Name "
            "validation samples, or choose another held_out."
        )
    return train, validation


def check_parts(train: Hashes, validation: Hashes, source: str) -> None:
    """Compare validation samples with training samples by the hashes of their keys.

    Raises DataError if all validation samples are training samples too, and logs a warning if some
    are. `source` names the samples in messages.
    """
    seen = int(np.isin(validation, train).sum())
    # repetitions within a part are not counted: an image may have several captions
    counts = {
        "validation_in_train": [seen, len(validation)],
        "train_repeated": [0, len(train)],
        "validation_repeated": [0, len(validation)],
    }
    check_overlap(counts, source)


def fingerprint_files(paths: Sequence[str], about: Any) -> str:
    """Return an identifier of files, 32 hexadecimal digits.

    It depends on the contents, or, if the files together are larger than 1 GiB, on their names,
    sizes and modification times. `about`: further JSON values that are part of the identity.
    """
    size = sum(os.stat(path).st_size for path in paths)
    if size <= HASHED:
        return fingerprint([about, [file_fingerprint(path) for path in paths]])
    return fingerprint([about, [file_version(path) for path in paths]])

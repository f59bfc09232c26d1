"""Texts, files and a tokenizer shared by the tests of large corpora."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddiff.data.tokenizer import BytePairTokenizer
from ddiff.data.tokenizer_workers import Chunk

SENTENCE = "the cat sat on a mat and the dog ran to the old red house by the sea with a hat"
WORDS = SENTENCE.split()
TOKENIZER = BytePairTokenizer.train([SENTENCE] * 4, 275)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return distinct texts of 1 to 40 words."""
    rng = np.random.default_rng(seed)
    texts = []
    for number in range(count):
        words = rng.choice(WORDS, rng.integers(1, 40))
        texts.append(" ".join([f"{number}:", *words]))
    return texts


def parquet_files(folder: Path, texts: list[str], files: int = 3, column: str = "text") -> str:
    """Write the texts to parquet files of several row groups and return their glob."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, some in enumerate(np.array_split(np.arange(len(texts)), files)):
        table = pa.table({column: [texts[i] for i in some], "n": some})
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=37)
    return str(folder / "*.parquet")


def json_file(path: Path, texts: list[str]) -> str:
    """Write the texts as JSON lines to `path` and return the path as a string."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def chunks_of(texts: list[str], at_once: int = 8) -> Any:
    """Return a function that yields `texts` in chunks of `at_once` texts.

    Its argument `cursor` is the number of texts to skip.
    """

    def chunks(cursor: int | None) -> Iterator[Chunk]:
        for start in range(cursor or 0, len(texts), at_once):
            yield Chunk(texts[start : start + at_once], start + at_once, None)

    return chunks

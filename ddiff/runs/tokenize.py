"""Tokenize the text of a recipe before a run: `ddiff data`."""

from __future__ import annotations

import time
from typing import NamedTuple

from ddiff.data.cache import Cache
from ddiff.data.corpus import StreamedCorpus, check_repetitions, copy_shards, load_or_build_shards
from ddiff.data.packing import pack_stream
from ddiff.data.shards import Shards
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.errors import find_disk_full
from ddiff.recipe.model import Recipe
from ddiff.run_dir.destination import Destination, check_destination, unwritable_error
from ddiff.runs.data import build_documents


class Prepared(NamedTuple):
    """Output of `ddiff data`: a table of sizes for training and validation text, and remarks."""

    titles: list[str]
    parts: list[list[str]]
    remarks: list[str]


def prepare_data(recipe: Recipe, out: str | None = None) -> Prepared:
    """Tokenize the text of a recipe and write the shards to the cache.

    A run of the recipe then uses the cached shards. Shards that already exist are verified by their
    checksums. `out`: folder or fsspec URL to which the shards are also copied, or None.
    """
    target = None
    if out is not None:
        target = check_destination(out, "ddiff data --out", folder=True)
    cache = Cache()
    documents = build_documents(recipe, cache)
    tokenizer = recipe.tokenizer.build(documents=documents, cache=cache)
    began = time.time()
    with recipe.data.prefix_errors():
        shards = load_or_build_shards(documents, tokenizer, cache)
        check_repetitions(documents, shards)
        parts = [
            _part_sizes(shards, part, tokenizer, recipe.length) for part in (TRAIN, VALIDATION)
        ]
    remarks = [
        f"Tokens of {recipe.tokenizer.component.name}, {tokenizer.num_tokens} of them; shards in "
        f"{shards.folder}",
        _verify_or_time(shards, began),
    ]
    if isinstance(documents, StreamedCorpus):
        remarks.append("The table counts only the start of a stream; training tokenizes the rest.")
    if target is not None:
        _copy(shards, target)
        remarks.append(
            f'Copied to {out}: [data] kind = "shards", path = "{out}"; [tokenizer] kind = "saved", '
            f'path = "{out}/tokenizer.json"'
        )
    titles = ["part", "documents", "tokens", "bytes", f"rows of {recipe.length}"]
    return Prepared(titles, parts, remarks)


def _part_sizes(shards: Shards, part: str, tokenizer: Tokenizer, length: int) -> list[str]:
    """Return a table row with the numbers of documents, tokens, bytes and packed rows of a part.

    `part`: "train" or "validation".
    """
    stream = shards.stream(part)
    rows = pack_stream(stream, tokenizer, length, separate=part == VALIDATION)
    sizes = (stream.num_documents, stream.num_tokens, stream.num_bytes, len(rows))
    return [part, *(f"{size:,}" for size in sizes)]


def _verify_or_time(shards: Shards, began: float) -> str:
    """Return a remark on the speed of tokenization, or on the checksums.

    If no shard was written since the time `began`, the checksums of all shards are verified.
    """
    tokens, seconds = shards.written_since(began)
    if not tokens:
        shards.verify()
        return "The shards existed already; the checksums of all files are correct."
    speed = tokens / seconds
    return f"{tokens:,} tokens were written in {seconds:.1f} s: {speed:,.0f} tokens/s."


def _copy(shards: Shards, target: Destination) -> None:
    """Copy the shards to the path given by the user."""
    try:
        copy_shards(shards, target.name)
    except OSError as error:
        if find_disk_full(error) is not None:
            raise  # the command line has a message for a full disk
        raise unwritable_error(target, error) from error

"""`ddiff data`: the text of a recipe tokenised ahead of its run, or into a folder to carry elsewhere."""

from __future__ import annotations

import errno
import time
from typing import NamedTuple

from ddiff.data.cache import Cache
from ddiff.data.corpus import StreamedCorpus, check_repetitions, copy_shards, load_or_build_shards
from ddiff.data.packing import pack_stream
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.recipe.model import Recipe
from ddiff.run_dir.destination import check_destination, unwritable_error
from ddiff.runs.build import build_documents


class Prepared(NamedTuple):
    """What `ddiff data` tells: sizes by part under `titles`, then sentences."""

    titles: list[str]
    parts: list[list[str]]
    remarks: list[str]


def prepare_data(recipe: Recipe, out: str | None = None) -> Prepared:
    """Tokenise the text of a recipe where its run will look for it, and copy the shards to `out`, any fsspec path.

    Shards that were there already are held against their checksums.
    """
    target = None if out is None else check_destination(out, "ddiff data --out", folder=True)
    cache = Cache()
    documents = build_documents(recipe, cache)
    tokenizer = recipe.tokenizer.build(documents=documents, cache=cache)
    began = time.time()
    with recipe.data.prefix_errors():
        made = load_or_build_shards(documents, tokenizer, cache)
        check_repetitions(documents, made)
        streams = {part: made.stream(part) for part in (TRAIN, VALIDATION)}
        rows = {
            part: pack_stream(stream, tokenizer, recipe.length, separate=part == VALIDATION)
            for part, stream in streams.items()
        }
    tokens, seconds = made.written_since(began)
    remarks = [
        f"Tokens of {recipe.tokenizer.component.name}, {tokenizer.num_tokens} of them; shards in {made.folder}"
    ]
    if tokens:
        remarks.append(
            f"{tokens:,} tokens were made now, in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s."
        )
    else:
        made.verify()
        remarks.append("They were there already; every file has its checksum.")
    if isinstance(documents, StreamedCorpus):
        remarks.append("That is the head of a stream; the rest is tokenised while the run trains.")
    if out is not None and target is not None:
        try:
            copy_shards(made, out)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # told as such by the command
            raise unwritable_error(target, error) from error
        remarks.append(
            f'Copied to {out}: [data] kind = "shards", path = "{out}"; [tokenizer] kind = "saved", path = '
            f'"{out}/tokenizer.json"'
        )
    sizes = [
        [
            part,
            *(
                f"{size:,}"
                for size in (
                    stream.num_documents,
                    stream.num_tokens,
                    stream.num_bytes,
                    len(rows[part]),
                )
            ),
        ]
        for part, stream in streams.items()
    ]
    return Prepared(
        ["part", "documents", "tokens", "bytes", f"rows of {recipe.length}"], sizes, remarks
    )

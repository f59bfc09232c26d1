"""Evaluation of a text run on other texts: `ddiff eval RUN --data FILE`.

The texts are tokenized with the tokenizer of the run. Results are written to evaluation-NAME.json
and never replace evaluation.json.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ddiff.data.cache import Cache
from ddiff.data.compression import open_uncompressed
from ddiff.data.conditions import Conditions
from ddiff.data.documents import documents_from_texts, fingerprint_texts
from ddiff.data.packing import PackedRows, pack_ids, pack_texts
from ddiff.data.paths import find_all_files, printable
from ddiff.data.text import text_documents
from ddiff.data.tokenizer import Tokenizer
from ddiff.errors import ArgumentError, DataError
from ddiff.evaluation.likelihood import Evaluation
from ddiff.evaluation.protocols import PUBLISHED, find_protocol
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.files import find_shipped_recipes
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.destination import Destination, write_text
from ddiff.run_dir.location import check_writable
from ddiff.runs.conditioning import SampleConditions
from ddiff.runs.data import build_documents
from ddiff.runs.evaluation import score_rows
from ddiff.runs.evaluation_header import describe_record
from ddiff.runs.evaluation_report import find_impossible, print_remarks, print_weights
from ddiff.runs.kinds import EvaluationOptions
from ddiff.runs.provenance import component_fingerprints
from ddiff.runs.record import write_run_file
from ddiff.runs.run import Run
from ddiff.runs.summary import print_evaluation


@dataclass(frozen=True)
class GivenTexts:
    """Documents to evaluate.

    Attributes:
        name: name of the data, for the file of the results.
        texts: the documents, after the rules of the protocol.
        protocol: name of the protocol of the figures.
        entropy_rate: entropy of the source in nats per symbol; None if it is unknown.
    """

    name: str
    texts: Sequence[str]
    protocol: str
    entropy_rate: float | None = None


def evaluate_given_texts(
    run: Run, target: Destination | None, options: EvaluationOptions
) -> Evaluation:
    """Evaluate a loaded run on the texts that `options` names, write and print the results.

    The results are written to `target`, by default to evaluation-NAME.json of the run.
    """
    given = read_given_texts(options)
    path = run.run_dir / f"evaluation-{given.name}.json"
    if target is None:
        check_writable(run.run_dir)
    start = time.monotonic()
    evaluation, lossy = _score(run, given, options)
    seconds = time.monotonic() - start
    written = _make_record(run, given, evaluation, lossy, seconds)
    text = json.dumps(written, indent=2) + "\n"
    if target is None:
        write_run_file(path, text)
    else:
        write_text(target, text)
    print_weights(run)
    print_evaluation(evaluation, None, given.entropy_rate, title=given.protocol)
    print_remarks(evaluation, written, options.until)
    print(f"Written to {path if target is None else target.name}")
    return evaluation


# ---------------------------------------------------------------------- texts


def read_given_texts(options: EvaluationOptions) -> GivenTexts:
    """Read the documents that the option --data of `ddiff eval` names.

    A name that ends in .toml, or is the name of a shipped recipe, is a recipe, whose validation
    documents are read. Other names are text files or globs.
    """
    first = options.data[0]
    is_recipe = first.endswith(".toml") or first in find_shipped_recipes()
    if is_recipe:
        given = _read_recipe_texts(options)
    else:
        given = _read_files(options)
    if not given.texts:
        raise DataError(
            f"ddiff eval --data: {', '.join(options.data)} contain no text. Name files with text."
        )
    return given


def _read_recipe_texts(options: EvaluationOptions) -> GivenTexts:
    name = options.data[0]
    if len(options.data) > 1:
        raise ArgumentError(
            f"ddiff eval --data: expected one recipe, or text files; got {len(options.data)} "
            f"names, and {name} is a recipe. Evaluate one recipe at a time."
        )
    recipe = require_text_recipe(read_recipe(name), "ddiff eval --data")
    documents = build_documents(recipe, Cache())
    texts = list(documents.validation["text"])
    stem = PurePosixPath(name).stem
    return _apply_protocol(stem, texts, options, documents.entropy_rate)


def _read_files(options: EvaluationOptions) -> GivenTexts:
    split = options.split
    if options.protocol is not None:
        split = find_protocol(options.protocol).split
    texts = []
    for path in find_all_files(options.data):
        with open_uncompressed(path) as file:
            for _, text in text_documents(file, printable(path), split):
                texts.append(text)
    return _apply_protocol(PurePosixPath(options.data[0]).stem, texts, options, None)


def _apply_protocol(
    stem: str, texts: Sequence[str], options: EvaluationOptions, entropy_rate: float | None
) -> GivenTexts:
    """Apply the rules of the protocol, and name the data and the protocol.

    `stem`: name of the data. `entropy_rate`: entropy of the source, if the data have one.
    """
    name = re.sub(r"[^\w.-]+", "_", stem).strip("._") or "data"
    protocol = name
    if options.protocol is not None:
        chosen = find_protocol(options.protocol)
        texts = [chosen.detokenize(text) for text in texts]
        texts = [text for text in texts if text]
        protocol = chosen.name
        name = chosen.name
    if options.published:
        protocol = f"{PUBLISHED.name} {protocol}"
        name = f"{PUBLISHED.name}-{name}"
        entropy_rate = None  # the published value may be below the entropy
    return GivenTexts(name, texts, protocol, entropy_rate)


# ---------------------------------------------------------------------- scores


def _score(run: Run, given: GivenTexts, options: EvaluationOptions) -> tuple[Evaluation, int]:
    """Return the evaluation, and the number of texts that the tokenizer does not keep."""
    tokenizer = run.tokenizer
    length = run.recipe.length
    lossy = count_lossy_texts(given.texts, tokenizer)
    if options.published:
        rows = _pack_blocks(given.texts, tokenizer, length)
    else:
        rows = pack_texts(given.texts, tokenizer, length)
        check_bytes(given.texts, rows)
    conditions = SampleConditions.parse(run.denoiser, {}, len(given.texts))
    evaluation = score_rows(
        run.model,
        rows,
        run.recipe,
        tokenizer,
        numbers=np.arange(len(rows)),
        draws=run.recipe.evaluate.draws,
        conditions=Conditions(conditions.values),
        until=options.until,
        published=PUBLISHED if options.published else None,
        # the bytes of the text are not those of other tokens
        has_bytes=lossy == 0 and not options.published,
    )
    return evaluation, lossy


def _pack_blocks(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> PackedRows:
    mark = tokenizer.eos_id
    if mark is None or tokenizer.unit == "symbol":
        raise ArgumentError(
            "ddiff eval --published: the published protocol needs a tokenizer with an end mark; "
            "this run has none. Evaluate without --published."
        )
    ids: list[int] = []
    for text_ids in tokenizer.encode(texts):
        ids.extend(text_ids)
        ids.append(mark)
    return pack_ids(PUBLISHED.make_blocks(ids, length, mark), tokenizer.num_tokens)


def count_lossy_texts(texts: Sequence[str], tokenizer: Tokenizer) -> int:
    """Return the number of texts that differ after encoding and decoding.

    If a tokenizer replaces or drops characters, its tokens are not those of all bytes of the text,
    and bits per byte would be too small.
    """
    decoded = tokenizer.decode(tokenizer.encode(texts))
    return sum(text != again for text, again in zip(texts, decoded, strict=True))


def check_bytes(texts: Sequence[str], rows: PackedRows) -> None:
    """Raise DataError unless the number of bytes of the rows is that of the texts."""
    expected = sum(len(text.encode()) for text in texts)
    found = rows.tokens.num_bytes
    if found != expected:
        raise DataError(
            f"The tokens claim {found} bytes, but the text has {expected} bytes of UTF-8. Bits per "
            "byte would be wrong. The cached tokens belong to another text: delete the cache."
        )


def _make_record(
    run: Run, given: GivenTexts, evaluation: Evaluation, lossy: int, seconds: float
) -> dict[str, Any]:
    """Return the content of the file with the results."""
    figures = evaluation.to_dict()
    data = fingerprint_texts(documents_from_texts(given.texts))
    tokenizer = run.tokenizer.fingerprint
    window = PUBLISHED.window if evaluation.bound == "PUBLISHED" else run.recipe.evaluate.window
    protocol = {
        **figures["protocol"],
        "name": given.protocol,
        "window": list(window),
        "tokenizer": tokenizer,
        "data": data,
        "conditions": [],
        "texts_that_the_tokenizer_changes": lossy,
    }
    weights = "ema" if run.uses_ema else "trained"
    written = {"step": run.step, "weights": weights, **figures, "protocol": protocol}
    written["baselines"] = {}
    written[f"entropy_rate_nats_per_{evaluation.unit}"] = given.entropy_rate
    if warning := find_impossible(evaluation, given.entropy_rate):
        written["warning"] = warning
    fingerprints = {**component_fingerprints(run.data, run.model), "data": data}
    return describe_record(run, written, fingerprints, seconds, given.protocol) | written

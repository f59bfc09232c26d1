"""Evaluation of a text run on other texts: `ddiff eval RUN --data FILE|RECIPE|NAME`.

The texts are those of files, of a recipe, or of a public test set on the hub. They are tokenized
with the tokenizer of the run. If they are conversations, only answers are scored, given their
prompts. Results are written to evaluation-NAME.json and never replace
evaluation.json.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ddiff.data.cache import Cache
from ddiff.data.chat import ChatCorpus, ChatSettings
from ddiff.data.compression import ENDINGS as COMPRESSIONS
from ddiff.data.compression import open_uncompressed
from ddiff.data.conditions import Conditions
from ddiff.data.conversations import has_conversations, read_conversation_table
from ddiff.data.documents import Documents, documents_from_texts, fingerprint_texts
from ddiff.data.packing import PackedRows, pack_ids, pack_texts
from ddiff.data.paths import base_name, find_all_files, printable
from ddiff.data.sources import open_file_source, open_hub_source
from ddiff.data.symbol_rows import fill_rows
from ddiff.data.text import text_documents
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import VALIDATION
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, DataError
from ddiff.evaluation.likelihood import Evaluation
from ddiff.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    PublishedProgram,
    find_program,
    find_protocol,
)
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.files import find_shipped_recipes
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.destination import Destination, write_text
from ddiff.run_dir.files import CHAT
from ddiff.run_dir.location import check_writable
from ddiff.runs.conditioning import SampleConditions
from ddiff.runs.data import build_documents
from ddiff.runs.evaluation import PROMPTS, score_rows
from ddiff.runs.evaluation_header import describe_record
from ddiff.runs.evaluation_report import find_impossible, print_remarks, print_weights
from ddiff.runs.kinds import EvaluationOptions
from ddiff.runs.provenance import component_fingerprints
from ddiff.runs.record import write_run_file
from ddiff.runs.run import Run
from ddiff.runs.summary import print_evaluation
from ddiff.runs.text_bytes import check_num_bytes, describe_bytes

# Endings of files whose text is in a column, without the ending of a compression.
_TABLES = (".parquet", ".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class GivenTexts:
    """Documents to evaluate.

    Attributes:
        name: name of the data, for the file of the results.
        texts: the documents, after the rules of the protocol.
        protocol: name of the protocol of the figures.
        entropy_rate: entropy of the source in nats per symbol; None if it is unknown.
        program: published program that evaluates the documents; None for our evaluation.
        conversations: the documents as conversations, of which only answers are scored; None for
            texts.
    """

    name: str
    texts: Sequence[str]
    protocol: str
    entropy_rate: float | None = None
    program: PublishedProgram | None = None
    conversations: ChatCorpus | None = None


def evaluate_given_texts(
    run: Run, target: Destination | None, options: EvaluationOptions, ranks: Ranks
) -> Evaluation:
    """Evaluate a loaded run on the texts that `options` names, write and print the results.

    The results are written to `target`, by default to evaluation-NAME.json of the run. `ranks`
    divide the batches; only rank 0 prints and writes.
    """
    given = read_given_texts(run, options)
    path = run.run_dir / f"evaluation-{given.name}.json"
    if target is None:
        check_writable(run.run_dir)
    start = time.monotonic()
    evaluation, lossy = _score(run, given, options, ranks)
    if not ranks.is_first:
        return evaluation
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


def read_given_texts(run: Run, options: EvaluationOptions) -> GivenTexts:
    """Read the documents that the option --data of `ddiff eval` names.

    A name of a protocol is the data set of the protocol on the hub. A name that ends in .toml, or
    is the name of a shipped recipe, is a recipe, whose validation documents are read. Other names
    are files or globs. For a run of conversations, parquet and JSON files may hold conversations.
    """
    first = options.data[0]
    if first in PROTOCOLS:
        given = _read_test_set(options)
    elif first.endswith(".toml") or first in find_shipped_recipes():
        given = _read_recipe_texts(run, options)
    else:
        given = _read_files(run, options)
    if not any(given.texts):
        content = "conversation or text" if (run.run_dir / CHAT).is_file() else "text"
        raise DataError(
            f"ddiff eval --data: there is no {content} in {', '.join(options.data)}. Name other "
            "files."
        )
    return given


def _read_test_set(options: EvaluationOptions) -> GivenTexts:
    """Read the documents of a public test set from the hub."""
    protocol = find_protocol(options.data[0])
    if len(options.data) > 1 or options.protocol not in (None, protocol.name):
        raise ArgumentError(
            f"ddiff eval --data: {protocol.name} is the test set of the protocol "
            f"{protocol.name}, and is evaluated by itself, with this protocol. For your own files "
            f"of this data set, give --data FILE --protocol {protocol.name}."
        )
    hub = protocol.hub
    source = open_hub_source(
        hub.path, config=hub.config, split=hub.split, column=hub.column, revision=hub.revision
    )
    rows: list[str | None] = []
    try:
        for texts, _ in source.read(None):
            rows.extend(texts)
    except DataError as error:
        raise _missing_test_set_error(protocol, error) from error
    return _apply_protocol(protocol.name, protocol.join_rows(rows), options, protocol)


def _missing_test_set_error(protocol: Protocol, error: DataError) -> DataError:
    """Return the error for a test set that cannot be loaded. It names the local alternative."""
    hub = protocol.hub
    cause = error.__cause__ or error
    first = (str(cause).splitlines() or [""])[0]
    download = f"hf download {hub.path} --repo-type dataset --local-dir FOLDER"
    if hub.revision is not None:
        download += f" --revision {hub.revision}"
    place = f"{hub.split}" if hub.config is None else f"{hub.config}, {hub.split}"
    return DataError(
        f"ddiff eval --data {protocol.name}: the data set {hub.path} ({place}) cannot be loaded "
        f"from the hub: {type(cause).__name__}: {first}. Give its file instead: --data FILE "
        f"--protocol {protocol.name}. FILE is a text file with one document or line per line, or "
        f'a .parquet or .jsonl file with the column "{hub.column}". On a machine with a '
        f"connection, `{download}` downloads it."
    )


def _read_recipe_texts(run: Run, options: EvaluationOptions) -> GivenTexts:
    name = options.data[0]
    if len(options.data) > 1:
        raise ArgumentError(
            f"ddiff eval --data: expected one recipe, or text files; got {len(options.data)} "
            f"names, and {name} is a recipe. Evaluate one recipe at a time."
        )
    recipe = require_text_recipe(read_recipe(name), "ddiff eval --data")
    documents = build_documents(recipe, Cache())
    stem = PurePosixPath(name).stem
    if isinstance(documents, ChatCorpus):
        return _give_conversations(run, stem, documents, options)
    texts = list(documents.validation["text"])
    return _apply_protocol(stem, texts, options, _chosen_protocol(options), documents.entropy_rate)


def _read_files(run: Run, options: EvaluationOptions) -> GivenTexts:
    protocol = _chosen_protocol(options)
    split = options.split if protocol is None else protocol.split
    paths = find_all_files(options.data)
    if (run.run_dir / CHAT).is_file():
        conversations = [path for path in paths if _is_table(path) and has_conversations(path)]
        if conversations:
            return _read_conversation_files(run, paths, conversations, options)
    parts = []
    for path in paths:
        if _is_table(path):
            parts += _read_column(path, protocol)
            continue
        with open_uncompressed(path) as file:
            for _, text in text_documents(file, printable(path), split):
                parts.append(text)
    return _apply_protocol(name_files(options.data), parts, options, protocol)


def _read_conversation_files(
    run: Run, paths: Sequence[str], conversations: Sequence[str], options: EvaluationOptions
) -> GivenTexts:
    """Read the files `paths`, of which `conversations` hold conversations."""
    if len(conversations) < len(paths):
        other = next(path for path in paths if path not in conversations)
        raise ArgumentError(
            f"ddiff eval --data: {printable(conversations[0])} holds conversations, of which only "
            f"answers are scored, but {printable(other)} holds texts. Evaluate them separately."
        )
    table = read_conversation_table(paths)
    corpus = ChatCorpus(Documents(table, table), run.data.text.chat_settings())
    return _give_conversations(run, name_files(options.data), corpus, options)


def _give_conversations(
    run: Run, stem: str, corpus: ChatCorpus, options: EvaluationOptions
) -> GivenTexts:
    """Return conversations to evaluate, with the template and the answer length of the run."""
    if options.protocol is not None or options.published:
        name = "--published" if options.published else f"--protocol {options.protocol}"
        raise ArgumentError(
            f"ddiff eval {name}: {', '.join(options.data)} are conversations, of which only "
            f"answers are scored. A protocol needs whole texts. Leave out {name}."
        )
    own = run.data.text.chat_settings()
    settings: ChatSettings = replace(
        corpus.settings, template=own.template, answer_length=own.answer_length
    )
    name = _name_data(stem)
    texts = list(corpus.validation["text"])
    return GivenTexts(name, texts, name, conversations=replace(corpus, settings=settings))


def name_files(names: Sequence[str]) -> str:
    """Return a name of the data in files: the names of up to three files, joined by "-"."""
    stems = [PurePosixPath(name).stem for name in names]
    if len(stems) > 3:
        stems = [stems[0], f"and-{len(stems) - 1}-more"]
    return "-".join(stems)


def _is_table(path: str) -> bool:
    name = base_name(path).lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return name.endswith(_TABLES)


def _read_column(path: str, protocol: Protocol | None) -> list[str]:
    """Return the texts of a parquet or JSON-lines file: the parts of the protocol, or documents."""
    column = "text" if protocol is None else protocol.hub.column
    rows: list[str | None] = []
    for texts, _ in open_file_source([path], column=column).read(None):
        rows.extend(texts)
    if protocol is not None:
        return protocol.join_rows(rows)
    return [row for row in rows if row is not None and row.strip()]


def _chosen_protocol(options: EvaluationOptions) -> Protocol | None:
    return None if options.protocol is None else find_protocol(options.protocol)


def _apply_protocol(
    stem: str,
    parts: Sequence[str],
    options: EvaluationOptions,
    protocol: Protocol | None,
    entropy_rate: float | None = None,
) -> GivenTexts:
    """Make the documents of a protocol, and name the data and the protocol.

    `stem`: name of the data. `parts`: its lines, files or documents. `entropy_rate`: entropy of the
    source, if the data have one.
    """
    name = _name_data(stem)
    program = find_program(options.program) if options.published else None
    texts: Sequence[str] = parts
    if protocol is not None:
        name = protocol.name
        if program is None:
            texts = protocol.read_documents(parts)
        else:
            texts = protocol.read_published_documents(parts)
    if program is None:
        return GivenTexts(name, texts, name, entropy_rate)
    # without entropy rate: the published value may be below it
    return GivenTexts(
        f"published-{program.paper}-{name}", texts, f"{program.name} {name}", program=program
    )


def _name_data(stem: str) -> str:
    """Return `stem` as a part of a file name, with "_" for all other characters."""
    return re.sub(r"[^\w.-]+", "_", stem).strip("._") or "data"


# ---------------------------------------------------------------------- scores


def _score(
    run: Run, given: GivenTexts, options: EvaluationOptions, ranks: Ranks
) -> tuple[Evaluation, int]:
    """Return the evaluation, and the number of texts that the tokenizer does not keep."""
    tokenizer = run.tokenizer
    length = run.recipe.length
    if given.conversations is not None:
        rows = given.conversations.rows(VALIDATION, tokenizer, length, Cache())
        return _score_rows(run, given, rows, options, ranks, has_bytes=False), 0
    lossy = count_lossy_texts(given.texts, tokenizer)
    program = given.program
    if program is None:
        texts = fill_rows(given.texts, tokenizer, length)
        rows = pack_texts(texts, tokenizer, length)
        check_bytes(texts, rows)
    else:
        rows = _pack_blocks(given.texts, tokenizer, length, program)
    # the bytes of the text are not those of other tokens
    has_bytes = lossy == 0 and program is None
    return _score_rows(run, given, rows, options, ranks, has_bytes), lossy


def _score_rows(
    run: Run,
    given: GivenTexts,
    rows: PackedRows,
    options: EvaluationOptions,
    ranks: Ranks,
    has_bytes: bool,
) -> Evaluation:
    conditions = SampleConditions.parse(run.denoiser, {}, len(given.texts))
    evaluation = score_rows(
        run.model,
        rows,
        run.recipe,
        run.tokenizer,
        numbers=np.arange(len(rows)),
        draws=run.recipe.evaluate.draws,
        conditions=Conditions(conditions.values),
        until=options.until,
        published=given.program,
        has_bytes=has_bytes,
        ranks=ranks,
    )
    return evaluation if given.conversations is None else evaluation.mark_given(PROMPTS)


def _pack_blocks(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, program: PublishedProgram
) -> PackedRows:
    mark = tokenizer.eos_id
    if mark is None or tokenizer.unit == "symbol":
        raise ArgumentError(
            "ddiff eval --published: the published programs need a tokenizer with an end mark; "
            "this run has none. Evaluate without --published."
        )
    blocks = program.make_blocks(tokenizer.encode(texts), length, mark)
    return pack_ids(blocks, tokenizer.num_tokens)


def count_lossy_texts(texts: Sequence[str], tokenizer: Tokenizer) -> int:
    """Return the number of texts that differ after encoding and decoding.

    If a tokenizer replaces or drops characters, its tokens are not those of all bytes of the text,
    and bits per byte would be too small.
    """
    decoded = tokenizer.decode(tokenizer.encode(texts))
    return sum(text != again for text, again in zip(texts, decoded, strict=True))


def check_bytes(texts: Sequence[str], rows: PackedRows) -> None:
    """Raise DataError unless the number of bytes of the rows is that of the texts."""
    check_num_bytes(rows, sum(len(text.encode()) for text in texts))


def _make_record(
    run: Run, given: GivenTexts, evaluation: Evaluation, lossy: int, seconds: float
) -> dict[str, Any]:
    """Return the content of the file with the results."""
    figures = evaluation.to_dict()
    data = fingerprint_texts(documents_from_texts(given.texts))
    tokenizer = run.tokenizer.fingerprint
    window = run.recipe.evaluate.window if given.program is None else given.program.window
    protocol = {
        **figures["protocol"],
        "name": given.protocol,
        "window": list(window),
        "tokenizer": tokenizer,
        "data": data,
        "conditions": [],
        "texts_that_the_tokenizer_changes": lossy,
    }
    if given.program is not None:
        protocol["program"] = asdict(given.program)
    if given.conversations is not None:
        protocol["answers"] = given.conversations.settings.answers
    weights = "ema" if run.uses_ema else "trained"
    written = {"step": run.step, "weights": weights, **figures, "protocol": protocol}
    written["baselines"] = {}
    written["bytes"] = describe_bytes(evaluation)
    written[f"entropy_rate_nats_per_{evaluation.unit}"] = given.entropy_rate
    if warning := find_impossible(evaluation, given.entropy_rate):
        written["warning"] = warning
    fingerprints = {**component_fingerprints(run.data, run.model), "data": data}
    return describe_record(run, written, fingerprints, seconds, given.protocol) | written

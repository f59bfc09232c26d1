"""Read conversations from JSON lines and parquet files, also compressed ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ddiff.data.cache import Cache
from ddiff.data.chat_template import ASSISTANT, ROLES
from ddiff.data.compression import open_decompressed
from ddiff.data.documents import Documents, read_corpus, split_documents
from ddiff.data.jsonl import check_no_duplicates, json_objects
from ddiff.data.paths import find_train_and_validation, open_file, printable
from ddiff.data.text import check_text
from ddiff.errors import ArgumentError, DataError, shorten
from ddiff.progress import show_progress

_SCHEMA = pa.schema(
    [("text", pa.large_string()), ("name", pa.string()), ("messages", pa.large_string())]
)
_ROWS_AT_ONCE = 1024
Record = Mapping[str, Any]


@dataclass(frozen=True)
class ConversationFields:
    """Names of the fields of a record.

    A record has either the field `messages`, a list of {"role", "content"}, or the two fields
    `prompt` and `response`.
    """

    messages: str = "messages"
    prompt: str = "prompt"
    response: str = "response"


def read_conversations(
    train: Sequence[str],
    *,
    fields: ConversationFields | None = None,
    validation: Sequence[str] = (),
    held_out: float = 0.05,
    cache: Cache | None = None,
) -> Documents:
    """Read conversations from files, given by fsspec paths or globs.

    The documents have the columns "text" (the messages, one per line, with their roles), "name" and
    "messages" (JSON). `train`, `validation`, `held_out` and `cache` are as in `read_text_files`.

    Raises DataError for a record that is not a conversation with an answer of the assistant; the
    message names the file and the line.
    """
    if not validation and not 0 < held_out < 1:
        raise ArgumentError(
            f"read_conversations: held_out must lie in (0, 1); got {held_out}. Set held_out, or "
            "name validation files."
        )
    fields = fields or ConversationFields()
    paths, validation_paths = find_train_and_validation(train, validation)
    corpus = _read(paths, fields, cache)
    if validation_paths:
        return Documents(corpus, _read(validation_paths, fields, cache))
    return split_documents(corpus, held_out, "", "conversation(s)")


def conversation_table(conversations: Sequence[Sequence[Mapping[str, str]]]) -> Dataset:
    """Build the table of `read_conversations` in memory from lists of messages."""
    rows = []
    for number, messages in enumerate(conversations):
        name = f"conversation {number}"
        rows.append(_make_row(check_messages(list(messages), name), name))
    return Dataset.from_list(rows)


def check_messages(messages: Any, place: str) -> list[dict[str, str]]:
    """Return the messages with only role and content.

    Raises DataError, which begins with `place`, unless they are a list of {"role", "content"} with
    an answer of the assistant that follows another message.
    """
    example = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{place}: messages must be a list such as {example}; got {shorten(repr(messages))}."
        )
    checked = []
    for message in messages:
        is_pair = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        if not is_pair or not isinstance(message["content"], str):
            raise DataError(
                f'{place}: every message must have the texts "role" and "content", such as '
                f"{example}; got {shorten(repr(message))}."
            )
        if message["role"] not in ROLES:
            raise DataError(
                f"{place}: the role of a message must be one of {', '.join(ROLES)}; got "
                f"{shorten(repr(message['role']))}. Rename the roles."
            )
        checked.append({"role": message["role"], "content": check_text(message["content"], place)})
    if not any(message["role"] == ASSISTANT for message in checked[1:]):
        raise DataError(
            f"{place}: a conversation must have a message of the assistant after another message, "
            "since only answers are learned. Add the answer, or remove the conversation."
        )
    return checked


def read_conversation_table(paths: Sequence[str]) -> Dataset:
    """Read the conversations of files into one table with the columns of `read_conversations`.

    Raises DataError as `read_conversations` does.
    """
    return _read(paths, ConversationFields(), None)


def has_conversations(path: str) -> bool:
    """Return whether the first record of a parquet or JSON file has the fields of a conversation.

    The names of the fields are the defaults of `ConversationFields`.
    """
    fields = ConversationFields()
    _, record = next(_records(path, fields), (path, {}))
    pair = (record.get(fields.prompt), record.get(fields.response))
    return record.get(fields.messages) is not None or None not in pair


def _read(paths: Sequence[str], fields: ConversationFields, cache: Cache | None) -> Dataset:
    return read_corpus(
        paths,
        _SCHEMA,
        lambda: _batches(paths, fields),
        kind="conversations",
        settings={"fields": asdict(fields)},
        cache=cache,
        content="conversation",
    )


def _batches(paths: Sequence[str], fields: ConversationFields) -> Iterator[pa.RecordBatch]:
    with show_progress(len(paths), "reading conversations") as bar:
        for path in paths:
            rows = _rows(path, fields)
            while batch := list(islice(rows, _ROWS_AT_ONCE)):
                yield pa.RecordBatch.from_pylist(batch, schema=_SCHEMA)
            bar.advance(1)


def _rows(path: str, fields: ConversationFields) -> Iterator[dict[str, str]]:
    for place, record in _records(path, fields):
        messages = check_messages(_find_messages(record, fields, place), place)
        yield _make_row(messages, place)


def _make_row(messages: Sequence[Mapping[str, str]], name: str) -> dict[str, str]:
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return {"text": text, "name": name, "messages": json.dumps(messages, ensure_ascii=False)}


def _find_messages(record: Record, fields: ConversationFields, place: str) -> Any:
    if record.get(fields.messages) is not None:
        return record[fields.messages]
    missing = [name for name in (fields.prompt, fields.response) if record.get(name) is None]
    if missing:
        raise DataError(
            f'{place} has neither the field "{fields.messages}" nor "{fields.prompt}" and '
            f'"{fields.response}"; its fields are {sorted(record)}. Name the fields in [data]: '
            'messages = "...", or prompt = "..." and response = "...".'
        )
    return [
        {"role": "user", "content": record[fields.prompt]},
        {"role": ASSISTANT, "content": record[fields.response]},
    ]


def _records(path: str, fields: ConversationFields) -> Iterator[tuple[str, Record]]:
    is_parquet = path.lower().endswith(".parquet")
    return _parquet_records(path) if is_parquet else _json_records(path, fields)


def _json_records(path: str, fields: ConversationFields) -> Iterator[tuple[str, Record]]:
    with open_decompressed(path) as file:
        for _, place, found in json_objects(file, path):
            check_no_duplicates(found, asdict(fields).values(), place)
            yield place, found


def _parquet_records(path: str) -> Iterator[tuple[str, Record]]:
    name = printable(path)
    with open_file(path) as file:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(_ROWS_AT_ONCE):
            for record in batch.to_pylist():
                number += 1
                yield f"{name} row {number}", record

"""Chat template of a run of conversations in the folder of a saved model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddiff.data.chat import ChatEncoder
from ddiff.data.chat_template import ASSISTANT, Message, find_template
from ddiff.errors import DdiffError
from ddiff.run_dir.files import CHAT
from ddiff.runs.hub.tokenizer_files import (
    CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    load_tokenizer_files,
)

if TYPE_CHECKING:
    from ddiff.runs.run import Run

EXAMPLES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "1 + 2?"}],
    [
        {"role": "user", "content": "1 + 2?"},
        {"role": ASSISTANT, "content": "3"},
        {"role": "user", "content": "2 + 2?"},
    ],
)
"""Conversations that ddiff and transformers write, to compare their prompts."""

_SPLITS = "split_special_tokens"


@dataclass(frozen=True)
class SavedChat:
    """Chat template of a saved model.

    Attributes:
        answer_length: number of tokens of an answer; None: the rest of the row.
        is_equal: whether `apply_chat_template` of the saved tokenizer gives the prompts of ddiff.
    """

    answer_length: int | None
    is_equal: bool


def write_chat_template(run: Run, folder: Path) -> SavedChat | None:
    """Add the chat template of a run to the tokenizer in a folder.

    The saved tokenizer reads the spelling of a special token in a text as this token, because the
    template writes such spellings. For a run of other data than conversations, nothing changes, and
    the result is None.
    """
    if not (run.run_dir / CHAT).is_file():
        return None
    settings = run.data.text.chat_settings()
    template = find_template(run.tokenizer, settings.template)
    (folder / CHAT_TEMPLATE).write_text(template.source, encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config[_SPLITS] = False
    config.pop("chat_template", None)  # the file replaces the template of a pretrained tokenizer
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    encoder = ChatEncoder(run.tokenizer, template)
    return SavedChat(settings.answer_length, _gives_equal_prompts(encoder, folder))


def _gives_equal_prompts(encoder: ChatEncoder, folder: Path) -> bool:
    """Return whether the saved tokenizer gives the same ids of prompts as ddiff."""
    written = load_tokenizer_files(folder)
    return all(_give_prompt(written, each) == _encode(encoder, each) for each in EXAMPLES)


def _give_prompt(tokenizer: Any, messages: list[Message]) -> list[int] | None:
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
        )
    except Exception:  # the template and the library may raise any error
        return None
    return list(ids)


def _encode(encoder: ChatEncoder, messages: list[Message]) -> list[int] | None:
    """Return the ids of a prompt; None if the template refuses the roles."""
    try:
        return encoder.encode_prompt(messages)
    except DdiffError:
        return None

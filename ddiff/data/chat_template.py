"""Chat templates: Jinja templates that write a conversation as one text.

A conversation is a list of messages {"role": ..., "content": ...}. The template is that of a
pretrained tokenizer, a file, or `DEFAULT_TEMPLATE`. It runs in the sandbox of Jinja, which gives no
access to files and to the internals of Python objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import jinja2
from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ddiff.data.tokenizer import PretrainedTokenizer, Tokenizer
from ddiff.errors import DataError, end_sentence, explain_error

ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT, "tool")
Message = Mapping[str, str]

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Template of tokenizers without their own: `User: ...`, `Assistant: ...`, one message per line."""


@final
@dataclass(frozen=True)
class ChatTemplate:
    """Jinja template of conversations.

    Attributes:
        source: text of the template.
        tokens: values of the variables `bos_token`, `eos_token` and so on.
        name: name in error messages.
    """

    source: str
    tokens: Mapping[str, str]
    name: str = "the chat template"

    def render(self, messages: Sequence[Message], *, opens_answer: bool = False) -> str:
        """Write the messages as one text.

        With `opens_answer`, the text ends where the answer of the assistant begins. Raises
        DataError if the template refuses the messages.
        """
        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=opens_answer,
                **self.tokens,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.name} refuses a conversation with the roles "
                f"{[message['role'] for message in messages]}: {end_sentence(str(error))} Change "
                "the conversations, or choose another template."
            ) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # The options and names with which the transformers library runs such templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(self.source)
        except TemplateError as error:
            raise DataError(
                f"{self.name} is not a Jinja template: {end_sentence(str(error))} Correct the "
                "template, or choose another one."
            ) from error


def find_template(tokenizer: Tokenizer, source: str | None = None) -> ChatTemplate:
    """Return the chat template of a tokenizer.

    `source`: text of a template that replaces that of the tokenizer; None: the tokenizer's own, or
    `DEFAULT_TEMPLATE` if it has none.
    """
    end = "" if tokenizer.eos_id is None else tokenizer.tokens()[tokenizer.eos_id]
    tokens = {"bos_token": "", "eos_token": end}
    own = None
    if isinstance(tokenizer, PretrainedTokenizer):
        tokens |= tokenizer.named_tokens
        own = tokenizer.chat_template
    if source is not None:
        return ChatTemplate(source, tokens, "The chat template of [data] template")
    if own is not None:
        return ChatTemplate(own, tokens, "The chat template of the tokenizer")
    return ChatTemplate(DEFAULT_TEMPLATE, tokens, "The default chat template")


def read_template(path: str) -> str:
    """Read the text of a template from a UTF-8 file; "default" is `DEFAULT_TEMPLATE`."""
    if path == "default":
        return DEFAULT_TEMPLATE
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"template: {path} cannot be read as a UTF-8 file with a Jinja template: "
            f"{end_sentence(explain_error(error) or str(error))} Name a file, or set template = "
            '"default".'
        ) from error


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # The filter of Jinja escapes HTML characters, which a template of text must not.
    return json.dumps(value, ensure_ascii=False, indent=indent)

"""Corpora of conversations as recipe components.

The modules that read conversations are imported inside `build`, so that parsing a recipe stays
fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ddiff import ComponentConfig, PositiveInt, Seed
from ddiff_core.data import HeldOut, Paths, TextFiles

if TYPE_CHECKING:
    from ddiff import Cache, ChatCorpus, ChatSettings


class ChatKeys(ComponentConfig):
    """Keys of every corpus of conversations."""

    answers: Literal["last", "each", "all"] = "last"
    """Scored answers. "last": the last one. "each": each one, given only what precedes it; one
    example per answer. "all": all of them at once, each given also the later prompts."""
    answer_length: PositiveInt | None = None
    """Number of tokens of the last answer, which is filled up with end marks, so that the model
    learns where an answer ends; by default the answer and one end mark."""
    long: Literal["cut", "drop", "error"] = "cut"
    """Rule for examples that are longer than a row. "cut": the beginning of the prompt is cut.
    "drop": the example is left out. "error": an error. Answers are never cut."""
    pack: bool = True
    """Put several examples into one training row. Attention never crosses examples."""
    template: str | None = None
    """Path of a Jinja chat template, or "default" for the template of ddiff; by default that of
    the tokenizer."""


class Chat(TextFiles):
    """Corpus of conversations in JSON lines or parquet files, also compressed.

    A record has the field `messages`, a list of {"role", "content"}, or the fields `prompt` and
    `response`. Only answers of the assistant are noised and scored.
    """

    class Config(ChatKeys):
        files: Paths
        """Paths or globs, local or of any fsspec protocol."""
        messages: str = "messages"
        """Field with the list of messages."""
        prompt: str = "prompt"
        """Field with the prompt, in records without messages."""
        response: str = "response"
        """Field with the answer, in records without messages."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation documents; without them `held_out` selects some."""
        held_out: HeldOut = 0.05
        """Fraction of the conversations for validation, chosen by the hash of their text."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> ChatCorpus:
        from ddiff import ChatCorpus, ConversationFields, read_conversations

        documents = read_conversations(
            config.files,
            fields=ConversationFields(config.messages, config.prompt, config.response),
            validation=config.validation,
            held_out=config.held_out,
            cache=cache,
        )
        return ChatCorpus(documents, make_settings(config))

    @staticmethod
    def preview(config: Config) -> None:
        """Raise an error if a file is listed for training and validation, or the template fails."""
        TextFiles.preview(config)
        make_settings(config)


class NumberQuestions:
    """Generated conversations about two numbers, which need no file.

    The user asks which of two numbers is larger, or smaller; the assistant answers in one sentence.
    """

    class Config(ChatKeys):
        largest: Annotated[int, Field(ge=10, le=10_000)] = 99
        """Largest number."""
        count: PositiveInt = 2000
        """Number of conversations for training."""
        validation: PositiveInt = 100
        """Number of conversations for validation, about other pairs of numbers."""
        seed: Seed = 0
        """Seed of the numbers."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> ChatCorpus:
        from ddiff import ChatCorpus, make_number_questions

        documents = make_number_questions(
            config.count, config.validation, largest=config.largest, seed=config.seed
        )
        return ChatCorpus(documents, make_settings(config))

    @staticmethod
    def preview(config: Config) -> None:
        """Raise an error if the template cannot be read."""
        make_settings(config)


def make_settings(config: ChatKeys) -> ChatSettings:
    """Return the settings of a recipe, with the text of the template file."""
    from ddiff import ChatSettings, read_template

    return ChatSettings(
        template=None if config.template is None else read_template(config.template),
        answers=config.answers,
        answer_length=config.answer_length,
        long=config.long,
        pack=config.pack,
    )

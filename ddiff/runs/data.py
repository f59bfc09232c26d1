"""Data of a run: documents, tokenizer, rows, conditions and fingerprints, loaded at first use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddiff.atomic import write_atomic
from ddiff.core.rng import CounterRng
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.batch import Batch
from ddiff.data.cache import Cache
from ddiff.data.chat import ChatCorpus, ChatSettings
from ddiff.data.chat_template import ASSISTANT, Message, find_template
from ddiff.data.condition_forms import Form
from ddiff.data.conditions import Conditions, read_conditions
from ddiff.data.corpus import (
    Corpus,
    build_train_rows,
    build_validation_rows,
    check_repetitions,
    load_or_build_shards,
)
from ddiff.data.documents import Documents
from ddiff.data.packing import PackedRows, Rows, batch_rows
from ddiff.data.tokenizer import Tokenizer
from ddiff.errors import DataError
from ddiff.evaluation.judges import Judge
from ddiff.recipe.model import Recipe
from ddiff.run_dir.files import CHAT, read_json


def build_documents(recipe: Recipe, cache: Cache) -> Documents | Corpus:
    """Build the data set that the recipe table [data] describes."""
    return recipe.data.build(length=recipe.length, seed=recipe.seed, cache=cache)


class RunText:
    """Documents of a recipe, tokenized and packed into rows of [data] length tokens.

    `tokenizer`: saved tokenizer of a trained run. If `tokenizer` is None, the tokenizer of the
    recipe is built at first use, because some tokenizers are trained on the documents.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        self.recipe = recipe
        self._tokenizer = tokenizer
        self._cache = Cache()

    def with_recipe(self, recipe: Recipe) -> RunText:
        """Return the same text for another recipe with equal [data] and [tokenizer]."""
        other = RunText(recipe, self._tokenizer)
        if "documents" in self.__dict__:
            other.documents = self.documents
        return other

    @cached_property
    def documents(self) -> Documents | Corpus:
        return build_documents(self.recipe, self._cache)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is not None:
            return self._tokenizer
        return self.recipe.tokenizer.build(documents=self.documents, cache=self._cache)

    def chat_settings(self) -> ChatSettings:
        """Return the settings of the conversations, or those in chat.json of the run directory.

        A run of other data has the template of its tokenizer, and answers of any length.
        """
        documents = self.__dict__.get("documents")  # files are not read for this purpose
        if isinstance(documents, ChatCorpus):
            return documents.settings
        saved = read_json(Path(self.recipe.run_dir) / CHAT, allow_missing=True)
        return ChatSettings(
            saved.get("template"),
            saved.get("answers", ChatSettings.answers),
            saved.get("answer_length"),
            saved.get("long", ChatSettings.long),
        )

    def save_chat(self, directory: Path) -> None:
        """Write chat.json to a run directory, if the documents are conversations."""
        if not isinstance(self.__dict__.get("documents"), ChatCorpus):
            return
        settings = self.chat_settings()
        template = find_template(self.tokenizer, settings.template)
        content = {
            "template": template.source,
            "answers": settings.answers,
            "answer_length": settings.answer_length,
            "long": settings.long,
        }
        write_atomic(directory / CHAT, json.dumps(content, indent=2) + "\n")

    @cached_property
    def judge(self) -> Judge | None:
        """Judge of the samples; None if the recipe has no table [judge]."""
        if self.recipe.judge is None:
            return None
        return self.recipe.judge.build(documents=self.documents)

    @cached_property
    def train_rows(self) -> Rows:
        return build_train_rows(self.documents, self.tokenizer, self.recipe.length, self._cache)

    @cached_property
    def validation_rows(self) -> PackedRows:
        return build_validation_rows(
            self.documents, self.tokenizer, self.recipe.length, self._cache
        )

    def check_repetitions(self) -> None:
        """Raise DataError if the training text contains the validation documents."""
        if isinstance(self.documents, ChatCorpus):
            self.documents.check_repetitions(self.tokenizer, self.recipe.length, self._cache)
            return
        shards = load_or_build_shards(self.documents, self.tokenizer, self._cache)
        check_repetitions(self.documents, shards)

    def build_vocabulary(self) -> Vocabulary:
        """Build the vocabulary of the recipe for the tokenizer and the training rows."""
        return self.recipe.vocabulary.build(
            tokenizer=self.tokenizer, rows=self.train_rows, cache=self._cache
        )

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raise DataError if the vocabulary was built for another tokenizer."""
        tokenizer = self.tokenizer
        theirs = vocabulary.tokenizer_fingerprint
        has_other_fingerprint = bool(theirs) and theirs != tokenizer.fingerprint
        if vocabulary.num_tokens != tokenizer.num_tokens or has_other_fingerprint:
            raise DataError(
                "The vocabulary belongs to another tokenizer: the vocabulary has "
                f"{vocabulary.num_tokens} tokens of tokenizer {theirs or '(not recorded)'}, but "
                f"the tokenizer of the run has {tokenizer.num_tokens} tokens and fingerprint "
                f"{tokenizer.fingerprint}. Build the vocabulary from this tokenizer, or use the "
                "tokenizer of the vocabulary."
            )


class RunData:
    """Rows of a run, with the conditions that the denoiser takes as input.

    Args:
        text: documents, tokenizer and rows.
        condition_names: names of the document columns that are conditions. The names are the keys
            of the backbone's `condition_dropout`.
        condition_forms: form of each condition, label or vector, as the backbone declares.
    """

    def __init__(
        self,
        text: RunText,
        condition_names: Iterable[str] = (),
        condition_forms: Mapping[str, Form] = {},
    ) -> None:
        self.text = text
        self.recipe = text.recipe
        self._names = tuple(condition_names)
        self._forms = dict(condition_forms)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    @property
    def documents(self) -> Documents | Corpus:
        return self.text.documents

    @property
    def train_rows(self) -> Rows:
        return self.text.train_rows

    @property
    def validation_rows(self) -> PackedRows:
        return self.text.validation_rows

    @property
    def is_chat(self) -> bool:
        """True if the documents are conversations, of which only answers are scored."""
        return isinstance(self.documents, ChatCorpus)

    @property
    def counted_items(self) -> str:
        """Name of the items that are scored and counted, for messages."""
        return "tokens of answers" if self.is_chat else "tokens"

    def first_prompts(self, count: int) -> list[list[Message]]:
        """Return `count` validation conversations up to their last answer, in order.

        With fewer conversations, they are repeated. Only for conversations (`is_chat`).
        """
        written = self.documents.validation["messages"]
        chosen = [json.loads(written[number % len(written)]) for number in range(count)]
        prompts = []
        for messages in chosen:
            answers = [place for place, each in enumerate(messages) if each["role"] == ASSISTANT]
            prompts.append(messages[: answers[-1]])
        return prompts

    @property
    def validation_texts(self) -> Iterable[str] | None:
        """Texts of the validation documents; None if only their tokens are stored."""
        validation = self.documents.validation
        if "text" not in validation.column_names:
            return None
        return validation["text"]

    @property
    def training_texts(self) -> Iterable[str] | None:
        """Texts of the training documents; None if only their tokens are stored."""
        train = self.documents.train
        return train["text"] if "text" in train.column_names else None

    def name_validation_document(self, number: int) -> str | None:
        """Return the name of a validation document; None if it has none."""
        validation = self.documents.validation
        return validation[number]["name"] if "name" in validation.column_names else None

    @cached_property
    def train_conditions(self) -> Conditions:
        if not self._names:
            return Conditions({})
        return read_conditions(self.documents.train, self._names, self._forms)

    @cached_property
    def validation_conditions(self) -> Conditions:
        if not self._names:
            return Conditions({})
        return read_conditions(self.documents.validation, self._names, self._forms)

    def read_conditions(self) -> None:
        """Load the conditions of the training and the validation documents.

        Raises DataError if a column does not have the form that the denoiser declares.
        """
        # cached properties: the first access loads the values
        self.train_conditions  # noqa: B018
        self.validation_conditions  # noqa: B018

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of rows and conditions, by their names in a checkpoint."""
        found = {
            "training rows": self.train_rows.fingerprint,
            "validation rows": self.validation_rows.fingerprint,
        }
        if self.train_conditions.values:
            found["conditions"] = self.train_conditions.fingerprint
        if self.validation_conditions.values:
            found["validation conditions"] = self.validation_conditions.fingerprint
        return found

    def batch_at(self, step: int, micro: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return micro-batch `micro` of rank `rank` at a training step, on the CPU.

        A slot is an index of a row in the global batch. At step k, slot s contains the row with the
        index `order(seed, k * batch + s)`. Here `batch` is the number of slots, and `order`
        shuffles the training rows. The global batch therefore depends neither on the number of
        ranks nor on the number of micro-batches. Each pair (micro-batch, rank) gets the same number
        of consecutive slots, and the pairs are in lexicographic order.
        """
        keys = self.recipe.train
        size = keys.batch // (keys.accumulate * world_size)
        first = (micro * world_size + rank) * size
        slots = np.arange(first, first + size)  # of the global batch
        rows = self.train_rows.order(self.recipe.seed, step * keys.batch + slots)
        batch = batch_rows(self.train_rows, rows, index=slots, conditions=self.train_conditions)
        if keys.prefix > 0.0:
            batch = batch.with_prefixes(self._draw_prefixes(step, batch.index))
        return batch

    def _draw_prefixes(self, step: int, index: Tensor) -> Tensor:
        """Draw the lengths of the clean prefixes of B rows.

        With probability [train] prefix, the length is uniform on 0..L-1, where L is [data] length.
        Otherwise the length is 0. `index` [B]: slots of the rows in the global batch, which select
        the random numbers.
        """
        # two uniforms per row: the first decides about a prefix, the second is its length
        uniforms = CounterRng(self.recipe.seed, step, index, 2).uniform("prefix")
        chosen, size = uniforms.unbind(-1)
        lengths = (size * self.recipe.length).long()
        return torch.where(chosen < self.recipe.train.prefix, lengths, 0)

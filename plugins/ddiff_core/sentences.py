"""Data set of short sentences as a recipe component."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from ddiff import ComponentConfig, PositiveInt

if TYPE_CHECKING:
    from ddiff import Cache, ColumnShape, FieldsDocuments


class Sentences:
    """Short sentences of Jane Austen's six novels, bundled with the package.

    A sample has one column "text". No sentence occurs twice. The validation sentences are from
    other chapters than the training sentences.
    """

    class Config(ComponentConfig):
        shortest: PositiveInt = 4
        """Smallest number of words."""
        longest: PositiveInt = 10
        """Largest number of words."""
        held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.08
        """Fraction of the chapters for validation, chosen by the hash of their text."""

        @model_validator(mode="after")
        def _check_order(self) -> Sentences.Config:
            if self.shortest > self.longest:
                raise ValueError(
                    f"shortest must be at most longest; got shortest = {self.shortest}, longest = "
                    f"{self.longest}"
                )
            return self

    @staticmethod
    def build(config: Config, *, seed: int, cache: Cache | None) -> FieldsDocuments:
        from ddiff import FieldsDocuments, FieldsTable, TextColumn, load_sentences

        found = load_sentences(config.shortest, config.longest, config.held_out)
        train = FieldsTable({"text": TextColumn(found.train)})
        validation = FieldsTable({"text": TextColumn(found.validation)})
        return FieldsDocuments(train, validation)

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name."""
        from ddiff import ColumnShape

        return {"text": ColumnShape("texts")}

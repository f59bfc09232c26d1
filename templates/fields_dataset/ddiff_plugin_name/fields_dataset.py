"""Data set of two fields: tones, as vectors, and their names, as texts."""

from __future__ import annotations

import numpy as np

from ddiff import (
    ColumnShape,
    ComponentConfig,
    FieldsDocuments,
    FieldsTable,
    PositiveInt,
    TextColumn,
    VectorColumn,
)

FRAMES = 8  # positions of the field "sound"
WIDTH = 4  # numbers of a frame
WAVES = {"low": 1.0, "middle": 3.0, "high": 7.0}  # waves per tone


class PluginName:
    """Tones with a random phase: columns "sound" (vectors) and "text" (name of the tone)."""

    class Config(ComponentConfig):
        train: PositiveInt = 512
        """Number of training samples."""
        validation: PositiveInt = 64
        """Number of validation samples."""

    @classmethod
    def build(cls, config: Config, *, seed: int) -> FieldsDocuments:  # may also take cache
        rng = np.random.default_rng(seed)
        train = cls.draw(rng, config.train)
        return FieldsDocuments(train, cls.draw(rng, config.validation))

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        """Return the description of each column, by name, for a dry run."""
        sound = ColumnShape("vectors", positions=FRAMES, width=WIDTH)
        return {"sound": sound, "text": ColumnShape("texts")}

    @staticmethod
    def draw(rng: np.random.Generator, count: int) -> FieldsTable:
        """Draw `count` samples."""
        names = [str(name) for name in rng.choice(list(WAVES), count)]
        waves = np.array([WAVES[name] for name in names])
        time = np.arange(FRAMES * WIDTH) / (FRAMES * WIDTH)
        angle = 2.0 * np.pi * (waves[:, None] * time + rng.random((count, 1)))
        sound = np.sin(angle).reshape(count, FRAMES, WIDTH)
        return FieldsTable({"sound": VectorColumn.from_array(sound), "text": TextColumn(names)})

"""The data set plugin_name obeys every law of a data set, and its columns are as described."""

from __future__ import annotations

import numpy as np
from ddiff_plugin_name.fields_dataset import WAVES, PluginName

from ddiff import FieldsDocuments, TextColumn, VectorColumn
from ddiff.testing import assert_laws, check_dataset

CONFIG = PluginName.Config(train=20, validation=5)


def build() -> FieldsDocuments:
    return PluginName.build(CONFIG, seed=0)


def test_dataset_obeys_every_law() -> None:
    assert_laws(check_dataset(build, PluginName.preview(CONFIG)))


def test_sounds_have_the_waves_of_their_names() -> None:
    train = build().train
    sound, text = train["sound"], train["text"]
    assert isinstance(sound, VectorColumn)
    assert isinstance(text, TextColumn)
    waves = np.abs(np.fft.rfft(sound.read(range(20)).values.reshape(20, -1))).argmax(1)
    assert waves.tolist() == [WAVES[str(name)] for name in text.texts]
